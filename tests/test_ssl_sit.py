"""SiT: groups of lost pixels, the two losses, the teacher, and what it hands over."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat.ssl.networks import ResNet, ResNetOptions, ViT, ViTOptions
from pyfeat.ssl.objectives.sit import masked_error
from pyfeat.ssl.parts import MLP, BatchNorm, Corruption, StochasticDepth, Teacher, group_corruption
from tests.test_ssl_objectives import PLAN, Fixed, batch, make, unit

VIT = ViTOptions(image_size=32, patch_size=8, width=24, heads=2, depth=2)
SMALL: dict[str, Any] = {"hidden_dim": 16, "out_dim": 8}


def sit(backbone: nn.Module | None = None, **options: Any) -> Any:
    return make("sit", PLAN, ViT(VIT) if backbone is None else backbone, **{**SMALL, **options})


@pytest.mark.parametrize("fill", ["zeros", "noise", "copy", "alien"])
@pytest.mark.parametrize(("ratio", "align"), [(0.5, 1), (0.3, 4), (0.8, 1)])
def test_enough_is_lost_and_not_more_than_a_block_too_much(
    fill: Any, ratio: float, align: int
) -> None:
    images = torch.rand(40, 3, 32, 48)
    found = group_corruption(images, ratio, fill=fill, align=align)
    shares = found.mask.flatten(1).double().mean(dim=1)
    assert (shares >= min(ratio, 0.5)).all()
    assert (shares < ratio + 0.3 * 0.3).all()
    if ratio > 0.5:  # drawn between a half and the ratio
        assert shares.min() < 0.6
        assert shares.max() > 0.7
    kept = ~found.mask[:, None].expand_as(images)
    assert torch.equal(found.images[kept], images[kept])
    assert len({tuple(mask.flatten().tolist()) for mask in found.mask}) == 40
    if align > 1:
        cells = found.mask.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
        assert torch.equal(cells.any(dim=3), cells.all(dim=3))
    # Connected: most lost pixels have a lost neighbour to the right.
    right = (found.mask[:, :, 1:] & found.mask[:, :, :-1]).sum() / found.mask[:, :, :-1].sum()
    assert right > 0.75


def test_lost_pixels_become_what_is_asked_for() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1) + torch.rand(4, 2, 24, 24) / 2
    mean, std = torch.tensor([7.0, 9.0]), torch.tensor([0.5, 2.0])
    lost = {
        fill: group_corruption(images, 0.5, fill=fill, mean=mean, std=std)
        for fill in ("zeros", "noise", "copy", "alien")
    }
    for channel in range(2):
        zeros, noise = (
            lost[fill].images[:, channel][lost[fill].mask] for fill in ("zeros", "noise")
        )
        assert (zeros == mean[channel]).all()
        torch.testing.assert_close(noise.mean(), mean[channel], atol=0.2, rtol=0)
        torch.testing.assert_close(noise.std(), std[channel], atol=0.2, rtol=0)
    for fill, same in (("copy", True), ("alien", False)):
        images_of = lost[fill].images.floor()[:, 0]  # the whole part names the image
        for i in range(4):
            owners = images_of[i][lost[fill].mask[i]]
            assert bool((owners == i).all()) == same
            assert len(torch.unique(owners)) == 1  # another image, one for all blocks
        changed = (lost[fill].images != images)[:, 0][lost[fill].mask]
        assert changed.double().mean() > 0.9


def test_a_copied_block_lies_elsewhere_as_a_whole() -> None:
    images = torch.arange(400.0).view(1, 1, 20, 20).expand(8, -1, -1, -1)
    found = group_corruption(images, 0.01, fill="copy", largest=0.5)  # one block or a few
    steps = (found.images - images)[:, 0]
    for i in range(8):
        assert len(torch.unique(steps[i][found.mask[i]])) <= 4  # a shift for each block
    assert found.images.min() >= 0
    assert found.images.max() < 400


def test_an_alien_stays_where_it_stood() -> None:
    images = torch.rand(3, 1, 16, 16)
    found = group_corruption(images, 0.4, fill="alien")
    for i in range(3):
        mask = found.mask[i]
        others = [j for j in range(3) if torch.equal(found.images[i, 0][mask], images[j, 0][mask])]
        assert len(others) == 1
        assert others != [i]


@pytest.mark.parametrize(
    ("shape", "options", "error"),
    [
        ((2, 3, 8), {}, r"images must have shape \(B, C, H, W\), got \(2, 3, 8\)"),
        ((2, 3, 8, 8), {"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0"),
        ((2, 3, 8, 8), {"largest": 0.0}, r"largest must be in \(0, 1\], got 0.0"),
        ((2, 3, 8, 8), {"align": 0}, "align must be at least 1, got 0"),
        ((2, 3, 8, 8), {"fill": "ones"}, "fill must be one of"),
        ((1, 3, 8, 8), {"fill": "alien"}, "images must be at least two for fill 'alien', got 1"),
    ],
)
def test_corruption_refuses(shape: tuple[int, ...], options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"group_corruption: {error}"):
        group_corruption(torch.ones(shape), **options)


def test_the_student_sees_lost_pixels_and_the_teacher_whole_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = sit(temperature=0.3, contrast_weight=2.0, reconstruction_weight=3.0)
    with torch.no_grad():  # a teacher that differs
        for parameter in objective.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    views = torch.rand(2, 6, 3, 32, 32)
    masks = torch.rand(2, 6, 32, 32) < torch.rand(2, 6, 1, 1)
    lost = [Corruption(v * ~m[:, None], m) for v, m in zip(views, masks, strict=True)]
    objective.augment = Fixed(views)
    given = iter(lost)
    monkeypatch.setattr(objective, "corrupt", lambda _: next(given))
    losses = objective.training_loss(batch(6))

    tokens = objective.backbone.tokens(torch.cat([each.images for each in lost]))
    queries = unit(objective.head(tokens[:, 0])).chunk(2)
    backbone, head = objective.teacher.module
    keys = unit(head(backbone.tokens(views.flatten(0, 1))[:, 0])).chunk(2)
    contrast = sum(
        2 * 0.3 * functional.cross_entropy(queries[i] @ keys[1 - i].T / 0.3, torch.arange(6))
        for i in range(2)
    )
    torch.testing.assert_close(losses["contrast"].double(), contrast)
    filled = objective.reconstruction(tokens[:, 1:], (4, 4))
    assert filled.shape == (12, 3, 32, 32)
    wanted = objective.backbone.intensities(views.flatten(0, 1))
    errors = (filled - wanted).abs()[masks.flatten(0, 1)[:, None].expand_as(filled)]
    torch.testing.assert_close(losses["reconstruction"], errors.mean())
    torch.testing.assert_close(
        losses["loss"], 2 * losses["contrast"] + 3 * losses["reconstruction"]
    )
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    for part in (objective.backbone, objective.head, objective.reconstruction):
        assert all(parameter.grad is not None for parameter in part.parameters())


def test_views_are_those_of_the_code() -> None:
    first, second = (
        {type(step).__name__: float(step.p) for step in (*view.shape, *view.colour, *view.last)}
        for view in sit(flip=0.25).augment.augmentations
    )
    assert first["RandomHorizontalFlip"] == second["RandomHorizontalFlip"] == 0.25
    assert (first["RandomGaussianBlur"], second["RandomGaussianBlur"]) == (1.0, 0.1)
    assert (first.get("RandomSolarize", 0.0), second["RandomSolarize"]) == (0.0, 0.2)
    assert (first["ColorJitter"], first["RandomGrayscale"]) == (0.8, 0.2)


def test_each_loss_may_be_left_out() -> None:
    for weight, other in (("contrast", "reconstruction"), ("reconstruction", "contrast")):
        objective = sit(None, **{f"{other}_weight": 0.0})
        losses = objective.training_loss(batch(4))
        assert set(losses) == {"loss", weight}
        assert torch.equal(losses["loss"], losses[weight])
        losses["loss"].backward()
        learned = {n for n, p in objective.named_parameters() if p.requires_grad}
        assert {n for n, p in objective.named_parameters() if p.grad is not None} == learned
    with pytest.raises(ValueError, match="contrast_weight or reconstruction_weight must be above"):
        sit(contrast_weight=0.0, reconstruction_weight=0.0)


def test_some_images_have_pixels_of_others() -> None:
    objective = sit(drop_ratio=0.6, alien_ratio=0.2)
    images = torch.rand(60, 3, 32, 32)
    found = objective.corrupt(images)
    mean = objective.backbone.intensities.mean.view(3, 1, 1)
    dropped = torch.stack(
        [(found.images[i] == mean).all(dim=0)[found.mask[i]].all() for i in range(60)]
    )
    assert 15 < int(dropped.sum()) < 45
    shares = found.mask.flatten(1).double().mean(dim=1)
    assert (shares[dropped] >= 0.5).all()
    assert (shares[~dropped] < 0.3).all()
    assert objective.corrupt(images[:1]).mask.any()
    assert sit(alien_probability=0.0).corrupt(images).images.shape == images.shape


def test_heads_have_the_layers_of_the_code() -> None:
    objective = make("sit", PLAN, ViT(VIT))
    kinds = [type(layer).__name__ for layer in objective.head]
    assert kinds == [
        *("Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "GELU", "Linear", "BatchNorm")
    ]
    shapes = [tuple(x.weight.shape) for x in objective.head if isinstance(x, nn.Linear)]
    assert shapes == [(4096, 24), (4096, 4096), (256, 4096)]
    last = objective.head[-1]
    assert isinstance(last, BatchNorm)
    assert last.weight is None
    with pytest.raises(ValueError, match="activation must be one, or 2, got 1"):
        MLP((4, 4, 4, 4), activation=("relu",))


def test_the_pixels_of_a_token_lie_where_its_patch_does() -> None:
    objective = sit()
    tokens = torch.randn(1, 16, 24)
    changed = tokens.clone()
    changed[0, 6] += 1.0
    moved = objective.reconstruction(tokens, (4, 4)) != objective.reconstruction(changed, (4, 4))
    assert moved[0, :, 8:16, 16:24].all()
    moved[0, :, 8:16, 16:24] = False
    assert not moved.any()
    filled = objective.fill_in(torch.rand(2, 3, 32, 32))
    assert filled.shape == (2, 3, 32, 32)


def test_features_are_class_token_and_mean_of_patches() -> None:
    objective, data = sit().eval(), batch(3)
    tokens = objective.backbone.tokens(data["images"])
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(objective.embed(data), expected)
    both = ViT(ViTOptions(**{**VIT.__dict__, "pool": "both"})).eval()
    both.load_state_dict(objective.backbone.state_dict())
    torch.testing.assert_close(both(data["images"]), expected)
    assert both.feature_dim == expected.shape[1] == 48
    assert make("mae", PLAN, both).training_loss(data)["loss"].isfinite()
    with pytest.raises(ValueError, match="features must be as wide as patches, 24, got 48"):
        make("dreamlip", PLAN, both)


def test_a_step_moves_the_teacher_by_its_schedule_and_the_decay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = sit(momentum=0.5, final_weight_decay=3.0, clip_each=0.01)
    before = objective.teacher.module[1][0].weight.clone()
    with torch.no_grad():
        objective.head[0].weight.add_(1.0)
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.1, weight_decay=0.1)
    objective.training_loss(batch())["loss"].backward()
    for steps_done, decay, share in ((1, None, 0.5), (PLAN.total_steps - 1, 0.3, None),
                                     (PLAN.total_steps, 0.3, 0.0)):  # fmt: skip
        monkeypatch.setattr(type(objective), "steps_done", steps_done)
        objective.on_before_optimizer_step(optimiser)
        if decay is not None:
            assert optimiser.param_groups[0]["weight_decay"] == pytest.approx(decay)
        if share is not None:
            with torch.no_grad():
                objective.teacher.module[1][0].weight.copy_(before)
            objective.after_step()
            moved = objective.teacher.module[1][0].weight - before
            torch.testing.assert_close(moved, torch.full_like(moved, share))
    norms = [float(p.grad.norm()) for p in objective.parameters() if p.grad is not None]
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    assert sum(norm > 0.009 for norm in norms) > 5  # each by itself


def test_the_loss_falls_on_one_batch() -> None:
    objective, data = sit(momentum=1.0, alien_probability=0.0), batch()
    objective.augment = Fixed(objective.augment(data["images"]))
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = objective.training_loss(data)["loss"]
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_the_error_is_that_of_lost_pixels_alone() -> None:
    filled, wanted = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1] = mask[1, 2, 3] = True
    expected = (filled - wanted).abs().permute(0, 2, 3, 1)[mask].mean()
    torch.testing.assert_close(masked_error(filled, wanted, mask), expected)


def test_the_error_is_that_of_the_pixels_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(count: torch.Tensor, group: object) -> None:
        count += 30.0  # of another process

    monkeypatch.setattr("torch.distributed.all_reduce", reduced)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda _: 2)
    filled, wanted = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1] = True  # 12 values
    found = masked_error(filled, wanted, mask, group="two")  # type: ignore[arg-type]
    expected = 2 * (filled - wanted).abs()[0, :, 1].sum() / 42
    torch.testing.assert_close(found, expected)


def test_only_a_student_in_training_skips_blocks() -> None:
    vit = ViT(ViTOptions(**{**VIT.__dict__, "depth": 3, "drop_path": 0.4}))
    rates = [m.rate for m in vit.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.0, 0.2, 0.4])
    images = torch.rand(4, 3, 32, 32)
    assert not torch.equal(vit(images), vit(images))
    teacher = Teacher(vit).train()
    assert torch.equal(teacher(images), teacher(images))
    assert torch.equal(vit.eval()(images), vit(images))
    torch.testing.assert_close(vit(images), teacher(images))


def test_a_skipped_branch_leaves_the_mean_as_it_is() -> None:
    x = torch.ones(4000, 2, 3)
    y = StochasticDepth(0.25)(x)
    values = torch.unique(y)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert (y == y[:, :1, :1]).all()  # whole samples
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1.0"):
        StochasticDepth(1.0)


def test_sit_refuses_what_has_no_patches_of_images() -> None:
    volumes = ViT(ViTOptions(image_size=16, width=24, heads=2, depth=1, in_channels=1, ndim=3))
    for backbone in (ResNet(ResNetOptions(width=4)), volumes):
        with pytest.raises(TypeError, match="SiT: backbone must be a ViT of images, got"):
            sit(backbone)
