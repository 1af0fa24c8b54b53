"""Objectives against their formulas in plain torch, and what they do beside their loss."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat.losses import sinkhorn
from pyfeat.ssl.config import Optimiser
from pyfeat.ssl.networks import ResNet, ResNetOptions, ViT, ViTOptions
from pyfeat.ssl.objectives.base import Objective, Plan
from pyfeat.ssl.options import describe, read_options
from pyfeat.ssl.parts import Masking
from pyfeat.ssl.registry import OBJECTIVES

PLAN = Plan(Optimiser(), steps_per_epoch=4, epochs=5, batch_size=8, sample_shape=(3, 32, 32))
NAMES = ["clip", "dino", "mae", "moco_v3", "simclr", "supcon", "swav"]
TEXTS = [f"sample number {i}" for i in range(8)]
SMALL: dict[str, Any] = {"hidden_dim": 16, "out_dim": 8}


class Fixed(nn.Module):
    """Views that are given."""

    def __init__(self, views: Iterable[Tensor]) -> None:
        super().__init__()
        self.views = list(views)

    def forward(self, samples: Tensor) -> list[Tensor]:
        return self.views


def make(name: str, plan: Plan = PLAN, backbone: nn.Module | None = None, **options: Any) -> Any:
    entry = OBJECTIVES.find(name)
    if backbone is None:
        vit = ViTOptions(image_size=32, patch_size=8, width=24, heads=2, depth=2)
        backbone = ViT(vit) if name == "mae" else ResNet(ResNetOptions(width=4, blocks=(1, 1)))
    return entry.make(backbone, read_options("test", "", entry.options, options), plan)


def batch(size: int = 8, *shape: int) -> dict[str, Any]:
    return {
        "images": torch.rand(size, *(shape or (3, 32, 32))),
        "index": torch.arange(size),
        "labels": torch.arange(size) % 3,
        "texts": TEXTS[:size],
    }


def unit(x: Tensor) -> Tensor:
    return functional.normalize(x.detach().double(), dim=1)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def step(objective: Objective, data: dict[str, Any], optimiser: torch.optim.Optimizer) -> float:
    optimiser.zero_grad()
    loss = objective.training_loss(data)["loss"]
    torch.autograd.backward(loss)
    objective.on_before_optimizer_step(optimiser)
    optimiser.step()
    objective.after_step()
    return float(loss.detach())


def test_all_objectives_are_in_the_table_and_say_what_their_options_mean() -> None:
    entries = {entry.name: entry for entry in OBJECTIVES.entries()}
    assert set(NAMES) <= set(entries)
    for name in NAMES:
        assert list(describe("objective", entries[name].options))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_one_batch(name: str) -> None:
    options = {"mae": {}, "clip": {}}.get(name, SMALL)
    if name in ("swav", "dino"):
        options = {**options, "num_prototypes": 16, "small_views": 2, "frozen_epochs": 0.0}
    if name == "dino":  # of a teacher that stays; of one that moves, the loss need not fall
        options |= {"momentum": 1.0, "center_momentum": 1.0}
    objective, data = make(name, **options), batch()
    views = objective.augment
    objective.augment = Fixed(views(data["images"]))
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = [step(objective, data, optimiser) for _ in range(12)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    objective.augment = views
    assert objective.eval().embed(data).shape == (8, objective.backbone.feature_dim)
    assert [len(features) for features in objective.two_views(data)] == [8, 8]


def test_probes_and_alarms_look_at_the_teacher_of_dino() -> None:
    objective, data = make("dino", num_prototypes=12, small_views=2, **SMALL).eval(), batch()
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.mul_(1.5)
    objective.augment.augmentations[0] = torch.nn.Identity()
    expected = objective.teacher.module[0](data["images"])
    assert not torch.allclose(expected, objective.backbone(data["images"]))
    for features in (objective.embed(data), *objective.two_views(data)):
        assert torch.equal(features, expected)


def test_simclr_is_the_cross_entropy_of_partners() -> None:
    objective, views = make("simclr", temperature=0.3, **SMALL), torch.rand(2, 6, 3, 32, 32)
    objective.augment = Fixed(views)
    loss = objective.training_loss(batch(6))["loss"]
    # Both views share the statistics of one pass.
    z = unit(objective.head(objective.backbone(views.flatten(0, 1))))
    logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    partners = torch.arange(12).roll(6)
    torch.testing.assert_close(loss.double(), functional.cross_entropy(logits, partners))


def test_supcon_takes_samples_without_a_label_for_themselves() -> None:
    objective, views = make("supcon", temperature=0.3, **SMALL), torch.rand(2, 5, 3, 32, 32)
    objective.augment = Fixed(views)
    data = batch(5)
    data["labels"] = torch.tensor([0, -1, 0, -1, 2])
    loss = objective.training_loss(data)["loss"]
    z = unit(objective.head(objective.backbone(views.flatten(0, 1))))
    logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    groups = torch.tensor([0, 1, 0, 2, 3]).repeat(2)
    positive = (groups[:, None] == groups) & ~torch.eye(10, dtype=torch.bool)
    expected = (logits.logsumexp(1) - (logits.where(positive, 0.0)).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(loss.double(), expected)
    del data["labels"]
    with pytest.raises(ValueError, match="SupCon: data must have labels, got none"):
        objective.training_loss(data)


def test_moco_predicts_the_keys_of_a_teacher_both_ways() -> None:
    objective, views = make("moco_v3", temperature=0.3, **SMALL), torch.rand(2, 6, 3, 32, 32)
    with torch.no_grad():  # a teacher that differs
        for parameter in objective.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    objective.augment = Fixed(views)
    loss = objective.training_loss(batch(6))["loss"]
    keys = [unit(objective.teacher(view)) for view in views]
    student = nn.Sequential(objective.backbone, objective.head, objective.predictor)
    queries = [unit(student(view)) for view in views]
    expected = sum(
        2 * 0.3 * functional.cross_entropy(queries[i] @ keys[1 - i].T / 0.3, torch.arange(6))
        for i in range(2)
    )
    torch.testing.assert_close(loss.double(), expected)
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert all(parameter.grad is not None for parameter in objective.predictor.parameters())


def test_a_teacher_follows_by_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("moco_v3", "dino"):
        objective = make(name, momentum=0.5, **SMALL)
        before = objective.teacher.module[0].conv1.weight.clone()
        with torch.no_grad():
            objective.backbone.conv1.weight.add_(1.0)
        for steps_done, share in ((1, 0.5), (PLAN.total_steps, 0.0)):
            monkeypatch.setattr(type(objective), "steps_done", steps_done)
            objective.teacher.module[0].conv1.weight.copy_(before)
            objective.after_step()
            moved = objective.teacher.module[0].conv1.weight - before
            torch.testing.assert_close(moved, torch.full_like(moved, share))


def multi_crop_views() -> list[Tensor]:
    return [torch.rand(6, 3, side, side) for side in (32, 32, 16, 16, 16)]


def test_swav_swaps_assignments_of_large_views() -> None:
    options = {"num_prototypes": 12, "small_views": 3, "temperature": 0.2, "epsilon": 0.1, **SMALL}
    objective, views = make("swav", **options), multi_crop_views()
    objective.augment = Fixed(views)
    loss = objective.training_loss(batch(6))["loss"]
    network = nn.Sequential(objective.backbone, objective.head)
    large, small = network(torch.cat(views[:2])), network(torch.cat(views[2:]))
    scores = [
        x @ unit(objective.prototypes.weight).T for x in unit(torch.cat([large, small])).chunk(5)
    ]
    codes = [sinkhorn(each, epsilon=0.1, iterations=3) for each in scores[:2]]
    pairs = [(a, v) for a in range(2) for v in range(5) if a != v]
    expected = sum(cross_entropy(codes[a], scores[v] / 0.2) for a, v in pairs) / len(pairs)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_swav_uses_its_queue_from_the_epoch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_prototypes": 12, "small_views": 0, "queue_size": 24, "queue_from": 1.0, **SMALL}
    objective = make("swav", **options)
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.1)
    for steps_done in range(4):
        monkeypatch.setattr(type(objective), "steps_done", steps_done)
        step(objective, batch(), optimiser)
        assert [len(queue) for queue in objective.queues] == [min(24, 8 * (steps_done + 1))] * 2
        assert objective._queues() is None
        norms = objective.prototypes.weight.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones(12))
    monkeypatch.setattr(type(objective), "steps_done", 4)
    objective.augment, data = Fixed(torch.rand(2, 8, 3, 32, 32)), batch()
    with_queue = objective.training_loss(data)["loss"]
    monkeypatch.setattr(type(objective), "steps_done", 3)
    assert not torch.isclose(with_queue, objective.training_loss(data)["loss"])


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_prototypes_stay_through_the_first_epoch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(name, num_prototypes=12, small_views=0, frozen_epochs=1.0, **SMALL)
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.1)
    before = objective.prototypes.weight.clone()
    for steps_done, moves in ((3, False), (4, True)):
        monkeypatch.setattr(type(objective), "steps_done", steps_done)
        step(objective, batch(), optimiser)
        assert torch.allclose(objective.prototypes.weight, before) != moves


@pytest.mark.parametrize("balance", ["center", "sinkhorn"])
def test_dino_says_what_its_teacher_says(balance: str) -> None:
    options = {"num_prototypes": 12, "small_views": 3, "teacher_temperature": 0.1, **SMALL}
    objective, views = make("dino", balance=balance, **options), multi_crop_views()
    with torch.no_grad():
        objective.center.center.copy_(0.1 * torch.randn(12))
        for parameter in objective.teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    objective.augment = Fixed(views)
    center = objective.center.center.double().clone()
    loss = objective.training_loss(batch(6))["loss"]

    def scores(views: list[Tensor], backbone: Any, head: Any, last: Any) -> Any:
        parts = [torch.cat(part) for part in (views[:2], views[2:]) if part]
        features = torch.cat([head(backbone(part)) for part in parts])
        return (unit(features) @ unit(last.weight).T).chunk(len(views))

    teacher = scores(views[:2], *objective.teacher.module)
    student = scores(views, objective.backbone, objective.head, objective.prototypes)
    if balance == "center":
        codes = [((each - center) / 0.1).softmax(dim=1) for each in teacher]
    else:
        codes = list(sinkhorn(torch.cat(teacher), epsilon=0.1, iterations=3).chunk(2))
    pairs = [(t, v) for t in range(2) for v in range(5) if t != v]
    expected = sum(cross_entropy(codes[t], student[v] / 0.1) for t, v in pairs) / len(pairs)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    mean = 0.9 * center + 0.1 * torch.cat(teacher).mean(dim=0)
    moved = mean if balance == "center" else center
    torch.testing.assert_close(objective.center.center.double(), moved, atol=1e-6, rtol=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


def test_dino_raises_weight_decay_and_spreads_features(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make("dino", koleo_weight=0.5, small_views=0, final_weight_decay=10.0, **SMALL)
    losses = objective.training_loss(batch())
    torch.testing.assert_close(losses["loss"].detach(), losses["dino"] + 0.5 * losses["koleo"])
    decays = [{"params": [p], "weight_decay": decay} for p, decay in zip(
        objective.head.parameters(), (0.1, 0.0), strict=False
    )]  # fmt: skip
    optimiser = torch.optim.AdamW(decays)
    for steps_done, decay in ((0, 0.1), (PLAN.total_steps - 1, 1.0)):
        monkeypatch.setattr(type(objective), "steps_done", steps_done)
        objective.on_before_optimizer_step(optimiser)
        assert [group["weight_decay"] for group in optimiser.param_groups] == [
            pytest.approx(decay), 0.0,
        ]  # fmt: skip


def test_mae_fills_in_hidden_patches_from_those_seen() -> None:
    objective = make("mae", mask_ratio=0.75).eval()
    images = torch.rand(2, 3, 32, 32)
    targets = objective.targets(images)
    assert targets.shape == (2, 16, 192)
    torch.testing.assert_close(targets.mean(dim=2), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.var(dim=2), torch.ones(2, 16), atol=1e-3, rtol=0)
    plain = make("mae", normalize_patches=False).targets(images)
    patch = objective.backbone.intensities(images)[1, :, 8:16, 24:32].reshape(-1)
    torch.testing.assert_close(plain[1, 7], patch)

    masking = Masking(torch.tensor([[0, 5, 9, 12]]), torch.tensor([[*range(1, 5)]]))
    filled = objective.fill_in(images[:1], masking)
    assert filled.shape == (1, 4, 192)
    changed = images[:1].clone()
    changed[..., 8:16] = 0.0  # patch 1 and those below, of which 5 and 9 are seen
    assert not torch.allclose(objective.fill_in(changed, masking), filled)
    changed = images[:1].clone()
    changed[..., :8, 8:16] = 0.0  # patch 1, hidden
    assert torch.equal(objective.fill_in(changed, masking), filled)


def test_the_loss_of_mae_is_that_of_hidden_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, images = make("mae"), torch.rand(2, 3, 32, 32)
    objective.augment = Fixed([images])
    seen = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 7]])
    hidden = torch.stack(
        [torch.tensor([i for i in range(16) if i not in row]) for row in seen.tolist()]
    )
    masking = Masking(seen, hidden)
    monkeypatch.setattr("pyfeat.ssl.objectives.mae.random_masking", lambda *_, **__: masking)
    loss = objective.training_loss(batch(2))["loss"]
    filled, targets = objective.fill_in(images, masking), objective.targets(images)
    wanted = torch.stack([targets[i, hidden[i]] for i in range(2)])
    torch.testing.assert_close(loss, (filled - wanted).square().mean())


def test_mae_refuses_what_has_no_patches_and_odd_widths() -> None:
    with pytest.raises(TypeError, match="MAE: backbone must be a ViT, got ResNet"):
        make("mae", backbone=ResNet(ResNetOptions(width=4)))
    with pytest.raises(
        ValueError, match="decoder_width must be a multiple of decoder_heads and of 4"
    ):
        make("mae", decoder_width=10, decoder_heads=5)


def test_clip_is_symmetric_and_equal_captions_share_or_are_left_out() -> None:
    data = batch(6)
    data["texts"] = [*TEXTS[:5], TEXTS[0]]
    for duplicates in ("positive", "ignore"):
        objective = make("clip", duplicates=duplicates, out_dim=8, logit_scale=5.0)
        objective.augment = Fixed([data["images"]])
        loss = objective.training_loss(data)["loss"]
        images = unit(objective.encode_images(data["images"]))
        texts = unit(objective.encode_texts(data["texts"]))
        logits = 5.0 * images @ texts.T
        targets = torch.eye(6, dtype=torch.float64)
        if duplicates == "positive":
            targets[0, 5] = targets[5, 0] = 1.0
            targets = targets / targets.sum(1, keepdim=True)
        else:
            logits[0, 5] = logits[5, 0] = -1e9
        expected = (cross_entropy(targets, logits) + cross_entropy(targets, logits.T)) / 2
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        loss.backward()
        assert objective.loss.logit_scale.grad != 0.0
    del data["texts"]
    with pytest.raises(
        ValueError, match="CLIP: data must have one caption for each image, got none"
    ):
        make("clip").training_loss(data)


def test_a_text_is_read_to_its_end_and_not_beyond() -> None:
    text = make("clip", text_length=12).text.eval()
    alone = text(text.tokens(["cell"]))
    padded = text(text.tokens(["cell", "a longer one"]))
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=1e-5)
    assert text.tokens(["a longer one"]).shape == (1, 12)
    assert torch.equal(text(text.tokens(["a longer one"])), text(text.tokens(["a longer or two"])))
    assert not torch.allclose(text(text.tokens(["cel"])), alone)
    assert text.tokens([]).shape == (0, 1)
    with pytest.raises(ValueError, match="tokens must have an end and at most 12 columns"):
        text(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("name", ["simclr", "swav", "mae"])
def test_volumes_are_trained_on_like_images(name: str) -> None:
    plan = Plan(Optimiser(), sample_shape=(1, 16, 16, 16))
    vit = ViTOptions(image_size=16, patch_size=8, width=24, heads=2, depth=1, in_channels=1, ndim=3)
    resnet = ResNetOptions(width=4, blocks=(1,), in_channels=1, ndim=3)
    backbone = ViT(vit) if name == "mae" else ResNet(resnet)
    objective = make(name, plan, backbone, **({"decoder_width": 24} if name == "mae" else SMALL))
    data = {"volumes": torch.rand(3, 1, 16, 16, 16), "index": torch.arange(3)}
    loss = objective.training_loss(data)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert objective.embed(data).shape == (3, backbone.feature_dim)


def test_views_need_a_size() -> None:
    with pytest.raises(ValueError, match="view_size must be given where samples have no size"):
        make("simclr", Plan(Optimiser()))
    views = make("simclr", Plan(Optimiser()), view_size=24, **SMALL).augment(
        torch.rand(2, 3, 32, 40)
    )
    assert [tuple(view.shape) for view in views] == [(2, 3, 24, 24)] * 2
