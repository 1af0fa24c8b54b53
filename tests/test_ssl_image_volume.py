"""ImageVolume: features of slices and volumes, the three losses, stages, and what a run hands over."""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat import features
from pyfeat.losses import sinkhorn
from pyfeat.ssl.checkpoints import read_weights
from pyfeat.ssl.config import Config, Optimiser, make_config
from pyfeat.ssl.networks import ResNet, ResNetOptions
from pyfeat.ssl.networks.slices import SliceEncoder, SliceOptions, VolumeEncoder
from pyfeat.ssl.objectives.base import Plan
from pyfeat.ssl.objectives.image_volume import ImageVolume
from pyfeat.ssl.options import read_options
from pyfeat.ssl.parts import Masking
from pyfeat.ssl.registry import OBJECTIVES
from pyfeat.ssl.training import fit
from tests.support_ssl import interrupt_at

N, SIDE = 8, 16
PLAN = Plan(
    Optimiser(),
    steps_per_epoch=3,
    epochs=4,
    num_samples=12,
    batch_size=4,
    sample_shape=(1, N, SIDE, SIDE),
    num_images=10,
)
SMALL: dict[str, Any] = {
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "head_dim": 8,
    "ffn_dim": 24,
    "hidden_dim": 16,
    "out_dim": 8,
    "intra_clusters": [6],
    "inter_clusters": [3, 2],
    "slices": 3,
    "frozen_epochs": 0.0,
}
FORMS = ["swav", "deepcluster"]


def network() -> ResNet:
    return ResNet(ResNetOptions(width=4, blocks=(1, 1), in_channels=1))


def make(plan: Plan = PLAN, **options: Any) -> Any:
    entry = OBJECTIVES.find("image_volume")
    values = read_options("test", "", entry.options, {**SMALL, **options})
    return entry.make(network(), values, plan)


def batch(size: int = 4, *, images: int = 2) -> dict[str, Any]:
    data = {"volumes": torch.rand(size, 1, N, SIDE, SIDE), "index": torch.arange(size)}
    if images:
        data["images"] = torch.rand(size, images, 1, SIDE, SIDE)
        data["image_index"] = torch.arange(size * images).view(size, images)
    return data


class Fixed(nn.Module):
    """Views that are given."""

    def __init__(self, *views: Tensor) -> None:
        super().__init__()
        self.views = list(views)

    def forward(self, samples: Tensor) -> list[Tensor]:
        return self.views


def test_a_slice_is_all_stages_each_of_length_one() -> None:
    backbone = network().eval()
    encoder = VolumeEncoder(backbone, SliceEncoder([4, 8], N, SliceOptions(dim=16)))
    volumes = torch.rand(2, 1, N, SIDE, SIDE)
    assert encoder.slices.projection.in_features == 4 + 8
    for volume, slices in zip(volumes, encoder.each_slice(volumes), strict=True):
        for i in range(N):
            maps = backbone.maps(volume[None, :, i])
            pooled = [functional.normalize(x.mean(dim=(2, 3)), dim=1) for x in maps]
            expected = encoder.slices.projection(torch.cat(pooled, dim=1))
            torch.testing.assert_close(slices[i], expected[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"must have shape \(B, C, N, H, W\), got \(1, 1, 16, 16\)"
    ):
        encoder(volumes[:1, :, 0])


def test_a_layer_is_normalised_after_attention_and_after_the_network() -> None:
    encoder = SliceEncoder([4], N, SliceOptions(dim=16, layers=1)).eval()
    layer: Any = encoder.layers[0]
    x = torch.randn(2, N, 16)
    y = functional.layer_norm(x + layer.attention(x), (16,))
    expected = functional.layer_norm(y + layer.ffn(y), (16,))
    torch.testing.assert_close(encoder(x), expected)
    volumes = encoder.volumes(x)
    torch.testing.assert_close(volumes, functional.normalize(expected.mean(dim=1), dim=1))


@pytest.mark.parametrize("axis", ["slices", "features"])
def test_the_order_of_slices_is_in_a_volume_by_attention_along_them(axis: str) -> None:
    options = SliceOptions(dim=16, heads=4, axis=axis)  # type: ignore[arg-type]
    encoder, slices = SliceEncoder([4], N, options).eval(), torch.randn(3, N, 16)
    swapped = slices.roll(N // 2, dims=1)
    assert (encoder.volumes(slices) - encoder.volumes(swapped)).abs().max().item() > 1e-3
    torch.testing.assert_close(slices.mean(dim=1), swapped.mean(dim=1))
    length = {layer.attention.to_q.in_channels for layer in encoder.layers}  # type: ignore[union-attr]
    assert length == {16 if axis == "slices" else N}


def test_hidden_slices_are_not_looked_at() -> None:
    encoder, slices = SliceEncoder([4], N, SliceOptions(dim=16)).eval(), torch.randn(2, N, 16)
    hidden = torch.zeros(2, N, dtype=torch.bool)
    hidden[0, 3] = hidden[1, 0] = True
    guessed = encoder.fill_in(slices, hidden)
    assert torch.equal(encoder.fill_in(slices.masked_fill(hidden[..., None], 9.0), hidden), guessed)
    seen = slices.clone()
    seen[0, 4] = 9.0
    assert not torch.allclose(encoder.fill_in(seen, hidden)[0], guessed[0])
    token = torch.where(hidden[..., None], encoder.mask_token, slices)
    torch.testing.assert_close(guessed, encoder.predictor(encoder(token)))


def test_the_masked_loss_is_over_all_slices_with_one_mask_for_both_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, data = make(intra="none", inter="none", mask_ratio=0.15, dropout=0.0), batch()
    views = torch.rand(2, 4, 1, N, SIDE, SIDE)
    objective.augment = Fixed(*views)
    hidden = torch.tensor([[1, 4], [0, 2], [6, 7], [3, 5]])  # 0.15 of 8, rounded up
    seen = torch.tensor([[i for i in range(N) if i not in row] for row in hidden.tolist()])
    asked: list[Any] = []

    def masking(*arguments: Any, **_: Any) -> Masking:
        asked.append(arguments)
        return Masking(seen, hidden)

    monkeypatch.setattr("pyfeat.ssl.objectives.image_volume.random_masking", masking)
    losses = objective.training_loss(data)
    assert asked == [(4, N, 2 / N)]
    assert set(losses) == {"loss", "masked"}
    slices = objective.encoder.each_slice(views.flatten(0, 1)).detach().unflatten(0, (2, 4))
    mask = torch.zeros(4, N, dtype=torch.bool).scatter_(1, hidden, True)
    errors = [(objective.slices.fill_in(view, mask) - view).square().mean() for view in slices]
    torch.testing.assert_close(losses["loss"], (errors[0] + errors[1]) / 2)
    losses["loss"].backward()
    assert objective.slices.mask_token.grad.abs().sum() > 0
    assert all(p.grad is None for p in objective.backbone.parameters())
    assert objective.slices.projection.weight.grad is None


def test_hidden_slices_do_not_train_the_network_that_describes_them() -> None:
    objective = make()
    objective.training_loss(batch())["masked"].backward()
    for part in (objective.backbone, objective.slices.projection):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert objective.slices.layers[0].ffn[0].weight.grad is not None


def test_volumes_cluster_by_swapped_assignments() -> None:
    objective, data = make(intra="none", masked_weight=0.0, dropout=0.0), batch()
    views = torch.rand(2, 4, 1, N, SIDE, SIDE)
    objective.augment = Fixed(*views)
    loss = objective.training_loss(data)["loss"]
    z = objective.encoder(views.flatten(0, 1)).detach().chunk(2)
    torch.testing.assert_close(z[0].norm(dim=1), torch.ones(4))
    expected = []
    for head in objective.inter.prototypes:
        scores = [view @ head.weight.detach().T for view in z]
        codes = [sinkhorn(x, epsilon=0.05, iterations=3) for x in scores]
        predicted = [(x / 0.1).log_softmax(dim=1) for x in scores]
        expected += [-(codes[i] * predicted[1 - i]).sum(dim=1).mean() for i in (0, 1)]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-4, rtol=1e-4)
    loss.backward()
    for part in (objective.backbone.conv1, objective.slices.projection, objective.slices.layers):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters()) > 0


def test_volumes_cluster_by_a_bank_of_both_views() -> None:
    objective, data = make(intra="none", inter="deepcluster", masked_weight=0.0), batch()
    data["index"] = torch.tensor([7, 2, 11, 5])
    views = torch.rand(2, 4, 1, N, SIDE, SIDE)
    objective.augment = Fixed(*views)
    torch.manual_seed(1)
    assert objective.training_loss(data)["loss"].item() == 0.0
    torch.manual_seed(1)  # of dropout
    z = objective.encoder(views.flatten(0, 1)).detach().unflatten(0, (2, 4))
    objective.after_step()
    torch.testing.assert_close(objective.inter.banks[:, data["index"]], z)
    objective.start_epoch(1)
    assert (objective.inter.assigned[:, data["index"]] >= 0).all()
    assert objective.training_loss(data)["loss"].item() > 0.0


def test_slices_and_images_have_rows_of_their_own() -> None:
    objective, data = make(intra="deepcluster", inter="none", masked_weight=0.0), batch()
    data["index"] = torch.tensor([7, 2, 11, 5])
    assert len(objective.intra.seen) == 12 * N + 10
    samples: list[Tensor] = []
    objective.augment_slices.register_forward_pre_hook(lambda _, inputs: samples.append(*inputs))
    objective.training_loss(data)
    index, rows = objective.intra._waiting
    assert rows.shape == (2, 4 * 3 + 8, 8)
    assert index[12:].tolist() == list(range(96, 104))
    for row, sample in zip(index.tolist(), samples[0], strict=True):
        if row < 96:
            place = data["index"].tolist().index(row // N)
            assert torch.equal(sample, data["volumes"][place, :, row % N])
        else:
            assert torch.equal(sample, data["images"].flatten(0, 1)[row - 96])
    assert len(set(index.tolist())) == 20
    del data["images"], data["image_index"]
    objective.training_loss(data)
    assert len(objective.intra._waiting[0]) == 12


@pytest.mark.parametrize(("intra", "inter"), [FORMS, FORMS[::-1]])
def test_all_losses_fall_together(intra: str, inter: str) -> None:
    objective, data = make(intra=intra, inter=inter, dropout=0.0), batch()
    objective.augment = Fixed(*objective.augment(data["volumes"]))
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    totals = []
    for i in range(24):
        torch.manual_seed(5)  # of slices, masks and their views
        optimiser.zero_grad()
        losses = objective.training_loss(data)
        losses["loss"].backward()
        objective.on_before_optimizer_step(optimiser)
        optimiser.step()
        objective.after_step()
        if i == 5:
            objective.start_epoch(1)  # of the banks; clusters are not drawn again after it
        totals.append({name: float(loss.detach()) for name, loss in losses.items()})
    assert set(totals[0]) == {"loss", "intra", "masked", "inter"}
    assert all(math.isfinite(x) for total in totals for x in total.values())
    for name in ("intra", "masked", "inter"):
        assert totals[-1][name] < 0.97 * totals[7][name], name
    assert objective.eval().embed(data).shape == (4, 16)
    assert [len(view) for view in objective.two_views(data)] == [4, 4]


def test_stages_train_one_loss_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, data = make(stages=[1.0, 2.0, 1.0]), batch()
    expected = {0.0: "intra", 0.24: "intra", 0.26: "masked", 0.74: "masked", 0.76: "inter", 1.0: "inter"}  # fmt: skip
    parts = {
        "backbone": {"intra", "inter"},
        "slices.projection": {"intra", "inter"},
        "slices.layers": {"masked", "inter"},
        "slices.mask_token": {"masked"},
        "slices.predictor": {"masked"},
        "head": {"intra"},
        "intra": {"intra"},
        "inter": {"inter"},
    }
    for progress, name in expected.items():
        monkeypatch.setattr(ImageVolume, "progress", progress)
        objective.zero_grad()
        before = {key: x.clone() for key, x in objective.backbone.named_buffers()}
        losses = objective.training_loss(data)
        assert set(losses) == {"loss", name}
        # As where several processes give every parameter a gradient.
        (losses["loss"] + sum(0.0 * p.sum() for p in objective.parameters())).backward()
        objective.on_before_optimizer_step(None)
        for part, trained in parts.items():
            grads = [p.grad for key, p in objective.named_parameters() if key.startswith(part)]
            assert grads
            assert all((grad is not None) == (name in trained) for grad in grads), (name, part)
        moved = any(
            not torch.equal(x, before[key]) for key, x in objective.backbone.named_buffers()
        )
        assert moved == (name != "masked")  # frozen with its running statistics
        assert objective.backbone.bn1.training


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"intra": "none", "inter": "none", "masked_weight": 0.0}, "must be used, got 'none', 'none'"),
        ({"stages": [1, 0, 1]}, r"a share for each loss that is used \(intra, masked, inter\)"),
        ({"intra": "none", "stages": [1, 1, 1]}, r"is used \(masked, inter\) and no other, got"),
        ({"inter_clusters": []}, "inter_clusters must be given for one head at least"),
        ({"inter": "deepcluster", "inter_clusters": [13]}, "at most the 12 samples, got"),
        ({"heads": 3}, "embed_dim must be a multiple of num_groups = 3, got 16"),
        ({"slices": 0}, "slices must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make(**options)


def test_data_without_volumes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data must be volumes \(C, D, H, W\), got samples of shape"
    ):
        make(Plan(Optimiser(), sample_shape=(1, 16, 16)))


def run_config(folder: Path, out: str, **objective: Any) -> Config:
    volumes = folder / "volumes"
    if not volumes.exists():
        volumes.mkdir()
        rng = np.random.default_rng(0)
        for i in range(6):
            np.save(volumes / f"{i}.npy", rng.random((N, 10, 12)))
        np.save(folder / "images.npy", rng.random((5, 20, 20)))
    small = {k: v for k, v in SMALL.items() if k not in ("intra_clusters", "frozen_epochs")}
    return make_config(
        {
            "out": str(folder / out),
            "data": {
                "name": "volumes",
                "path": str(volumes),
                "size": [N, SIDE, SIDE],
                "images": str(folder / "images.npy"),
                "images_per_volume": 2,
            },
            "network": {"name": "resnet", "width": 4, "blocks": [1, 1], "in_channels": 1},
            "objective": {"name": "image_volume", "intra_clusters": [4], **small, **objective},
            "training": {"epochs": 3, "batch_size": 2, "progress": False, "log_every": 1},
            "watch": {"every": 3},
        }
    )


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
def test_a_run_resumes_bit_by_bit_and_hands_over_both_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {"intra": "deepcluster", "inter": "deepcluster"}
    run = fit(run_config(tmp_path, "whole", **forms))
    config = run_config(tmp_path, "part", **forms)
    with monkeypatch.context() as patch:  # when banks are filled and half an epoch is done
        patch.setattr(ImageVolume, "training_loss", interrupt_at(ImageVolume, 5, signal.SIGINT))
        assert fit(config).steps_done == 5
    again = fit(config, resume=True)
    weights = read_weights(run.checkpoint() or "")
    for name, value in read_weights(again.checkpoint() or "").items():
        assert torch.equal(value, weights[name]), name
    assert weights["inter.seen"].all()
    assert {"loss/intra", "loss/masked", "loss/inter"} <= {name for _, _, name, _ in run.metrics()}

    encoder = features.load_volumes(run.folder)
    objective = make(Plan(Optimiser(), num_samples=6, sample_shape=PLAN.sample_shape, num_images=5),
                     **forms, intra_clusters=[4])  # fmt: skip
    objective.load_state_dict(weights)
    volumes = torch.rand(2, 1, N, SIDE, SIDE)
    expected = objective.eval().embed({"volumes": volumes})
    torch.testing.assert_close(encoder(volumes), expected.detach())
    assert not encoder.training
    assert not encoder(volumes).requires_grad
    maps = features.load(run.folder, layers=["1"])(
        torch.rand(2, 1, SIDE, SIDE).expand(-1, 3, -1, -1)
    )
    assert maps[0].shape == (2, 8, 4, 4)


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
def test_volumes_of_another_objective_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run")
    values = {"name": "simclr", "hidden_dim": 8, "out_dim": 8}
    network = {"name": "resnet", "width": 4, "blocks": [1], "in_channels": 1, "ndim": 3}
    other = make_config(
        {
            "out": str(tmp_path / "other"),
            "data": {"name": "volumes", "path": config.data.options.path, "size": [8, 8, 8]},
            "network": network,
            "objective": values,
            "training": {"epochs": 1, "batch_size": 3, "progress": False},
            "watch": {"every": 0},
        }
    )
    fit(other)
    with pytest.raises(ValueError, match=r"run must be of image_volume, got .*other of simclr"):
        features.load_volumes(tmp_path / "other")


def test_views_of_volumes_keep_the_order_of_slices_unless_asked_for() -> None:
    ramp = torch.linspace(0, 1, N).view(1, 1, N, 1, 1).expand(12, 1, N, SIDE, SIDE)
    still: dict[str, Any] = dict.fromkeys(("degrees", "shift", "bias", "noise"), 0.0)
    for slice_flip, directions in ((0.0, {1}), (0.5, {-1, 1})):
        views = torch.cat(make(slice_flip=slice_flip, min_scale=1.0, **still).augment(ramp))
        slopes = (views[:, 0, -1] - views[:, 0, 0]).mean(dim=(1, 2))
        assert set(slopes.sign().int().tolist()) == directions
