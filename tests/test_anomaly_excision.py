"""Masks, mosaics, the U-Net and the losses of EAR, each against its definition."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from pyfeat.anomaly.excision import Excision, coverage, dilate, mosaic, quantile_masks
from pyfeat.anomaly.reconstruction import (
    RESIDUALS,
    RebuildOptions,
    augment,
    gradient_scales,
    gradient_similarity,
    rebuild_loss,
    residual_maps,
    smooth,
    train_to_rebuild,
)
from pyfeat.anomaly.unet import UNet


@pytest.mark.parametrize("area", [0.001, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant"])
def test_a_mask_has_the_area_asked_for_and_the_most_salient_pixels(area: float, kind: str) -> None:
    saliency = torch.rand(3, 9, 13)
    if kind == "ties":
        saliency = (saliency * 4).floor()
    if kind == "constant":
        saliency = torch.ones(3, 9, 13)
    masks = quantile_masks(saliency, area)
    count = max(1, round(area * 9 * 13))
    for values, mask in zip(saliency, masks, strict=True):
        order = sorted(range(9 * 13), key=lambda i: (-float(values.flatten()[i]), i))
        assert mask.flatten().nonzero().squeeze(1).tolist() == sorted(order[:count])


def test_masks_grow_by_whole_pixels_on_all_sides() -> None:
    masks = torch.rand(2, 12, 15) > 0.95
    expected = [ndimage.binary_dilation(m.numpy(), np.ones((5, 3))) for m in masks]
    assert np.array_equal(dilate(masks, [2, 1]).numpy(), np.stack(expected))
    assert torch.equal(dilate(masks, [0, 0]), masks)


def test_a_cut_grows_by_cells_of_the_grid_of_the_saliency() -> None:
    saliency = torch.zeros(1, 4, 5)
    saliency[0, 2, 2] = 1.0
    size = (32, 40)  # cells of 8 pixels
    small = Excision(area=0.01).masks(saliency, size)
    grown = Excision(area=0.01, dilation=1).masks(saliency, size)
    assert int(small.sum()) == 13
    assert torch.equal(grown, dilate(small, [8, 8]))
    assert bool(small[0, 18:22, 18:22].any())
    # Where cells do not divide an image, it grows by what covers them: 38 / 4 and 47 / 5, rounded up.
    small, grown = (
        Excision(area=0.01, dilation=steps).masks(saliency, (38, 47)) for steps in (0, 1)
    )
    assert torch.equal(grown, dilate(small, [10, 10]))


@pytest.mark.parametrize("block", [1, 2, 3, 5, 40])
def test_a_mosaic_is_the_means_of_blocks_cut_off_at_the_border(block: int) -> None:
    images = torch.rand(2, 3, 11, 16)
    found = mosaic(images, block)
    assert found.shape == images.shape
    for top, left in itertools.product(range(0, 11, block), range(0, 16, block)):
        part = images[:, :, top : top + block, left : left + block]
        mean = part.mean(dim=(2, 3), keepdim=True).expand_as(part)
        torch.testing.assert_close(found[:, :, top : top + block, left : left + block], mean)


def test_what_is_shown_is_the_image_outside_and_the_hint_inside() -> None:
    images = torch.rand(2, 3, 32, 48)
    masks = torch.rand(2, 32, 48) > 0.5
    inside = masks[:, None].expand_as(images)
    hints: dict[Any, Tensor] = {
        "mosaic": mosaic(images, 4),
        "empty": torch.zeros_like(images),
        "none": images,
    }
    for hint, expected in hints.items():
        shown = Excision(hint=hint, block=4).shown(images, masks)
        assert torch.equal(shown[~inside], images[~inside])
        assert torch.equal(shown[inside], expected[inside])
    default = Excision().shown(images, masks)
    assert torch.equal(default[inside], mosaic(images, 2)[inside])


def test_the_mosaic_of_a_pixel_does_not_depend_on_the_mask() -> None:
    images = torch.rand(1, 3, 32, 32)
    one, other = torch.rand(2, 1, 32, 32) > 0.5
    both = (one & other)[:, None].expand_as(images)
    first, second = (Excision(block=8).shown(images, mask) for mask in (one, other))
    assert torch.equal(first[both], second[both])


def test_coverage_is_the_share_of_defective_pixels_inside() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    defects = torch.zeros_like(masks)
    defects[0, 1:3, 0] = True
    defects[1, 0, :2] = True
    assert coverage(masks, defects) == 0.25
    with pytest.raises(ValueError, match=r"defects must have shape .* and hold a defective pixel"):
        coverage(masks, torch.zeros_like(masks))
    with pytest.raises(ValueError, match=r"coverage: defects must have shape \(2, 4, 4\)"):
        coverage(masks, defects[:1])


@pytest.mark.parametrize(
    ("field", "value"),
    [("area", 0.0), ("area", 1.0), ("dilation", -1), ("block", 0), ("hint", "blur")],
)
def test_cuts_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"EAR: {field} must"):
        Excision(**{field: value})


# The network.


@pytest.mark.parametrize("off", [0, 1, 2])
def test_a_skip_that_is_off_passes_zeros(off: int) -> None:
    network = UNet(width=4, levels=3)  # statistics of the batch, so that signals keep their size
    images = torch.rand(2, 3, 40, 24)
    skips = [i != off for i in range(3)]
    found = network(images, skips)
    assert not torch.allclose(found, network(images))
    deaf = UNet(width=4, levels=3)
    deaf.load_state_dict(network.state_dict())
    first: Any = deaf.up[off]
    with torch.no_grad():
        first[0].weight[:, -4 * 2**off :] = 0  # the skip's channels come last
    torch.testing.assert_close(found, deaf(images))


def test_the_network_follows_its_formula() -> None:
    network = UNet(width=4, levels=2).eval()
    images = torch.rand(2, 3, 6, 9)
    padded = torch.cat([images, images[:, :, -1:].expand(-1, -1, 2, -1)], dim=2)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, 3)], dim=3)  # 8 x 12
    with torch.no_grad():
        fine = network.down[0](padded)
        coarse = network.down[1](fine.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax(dim=(3, 5)))
        bottom = network.bottom(coarse.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax(dim=(3, 5)))
        for skip, stage in ((coarse, network.up[1]), (fine, network.up[0])):
            wide = bottom.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            bottom = stage(torch.cat([wide, skip], dim=1))
        expected = 1 / (1 + (-network.last(bottom)).exp())
        torch.testing.assert_close(network(images), expected[:, :, :6, :9])


def test_the_network_takes_images_of_any_size_and_refuses_other_switches() -> None:
    network = UNet(width=4, levels=3).eval()
    for size in ((8, 8), (17, 30), (1, 5)):
        out = network(torch.rand(1, 3, *size))
        assert out.shape == (1, 3, *size)
        assert bool(((out > 0) & (out < 1)).all())
    with pytest.raises(ValueError, match="UNet: skips must be 3 switches, got 2"):
        network(torch.rand(1, 3, 8, 8), [True, False])
    with pytest.raises(ValueError, match="UNet: width, levels and channels must be at least 1"):
        UNet(width=0)


# Residuals and losses.


def test_the_gradient_similarity_is_its_formula() -> None:
    a, b = torch.rand(2, 2, 3, 10, 12, dtype=torch.float64)

    def magnitude(x: Tensor) -> Any:
        grey = x.mean(0).numpy()
        # SciPy's Prewitt sums three differences; the definition has their mean.
        parts = [ndimage.prewitt(grey, axis=i, mode="nearest") / 3 for i in (0, 1)]
        return np.hypot(*parts)

    for i in range(2):
        first, second = magnitude(a[i]), magnitude(b[i])
        expected = (2 * first * second + 0.0026) / (first**2 + second**2 + 0.0026)
        np.testing.assert_allclose(gradient_similarity(a, b)[i], expected, rtol=1e-4)


def test_residuals_are_zero_for_equal_images_and_as_defined_for_others() -> None:
    a, b = torch.rand(2, 2, 3, 32, 24)
    for kind in RESIDUALS:
        assert float(residual_maps(a, a, kind).abs().max()) < 1e-6
    torch.testing.assert_close(residual_maps(a, b, "absolute"), (a - b).abs().mean(1))
    scales = gradient_scales(a, b)
    assert [tuple(s.shape[1:]) for s in scales] == [(32, 24), (16, 12), (8, 6)]
    torch.testing.assert_close(
        scales[1], gradient_similarity(*(nn.AvgPool2d(2)(x) for x in (a, b)))
    )
    found = residual_maps(a, b, "msgms")
    expected = sum(
        nn.functional.interpolate(1 - s[:, None], (32, 24), mode="bilinear")[:, 0] for s in scales
    )
    torch.testing.assert_close(found, torch.as_tensor(expected) / 3, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="EAR: residual must be one of 'msgms', 'absolute'"):
        residual_maps(a, b, "ssim")  # type: ignore[arg-type]


def test_smoothing_takes_means_cut_off_at_the_border() -> None:
    maps = torch.rand(1, 6, 7)
    found = smooth(maps, 3)
    for i, j in itertools.product(range(6), range(7)):
        part = maps[0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        torch.testing.assert_close(found[0, i, j], part.mean())


def test_the_loss_is_the_weighted_sum_of_three() -> None:
    pytest.importorskip("kornia")
    from kornia.metrics import ssim

    a, b = torch.rand(2, 2, 3, 24, 24)
    parts = [
        (a - b).square().mean(),
        1 - ssim(a, b, 11).mean(),
        torch.stack([1 - s.mean() for s in gradient_scales(a, b)]).mean(),
    ]
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 3.0)):
        options = RebuildOptions(l2=weights[0], ssim=weights[1], msgms=weights[2])
        expected = sum(w * p for w, p in zip(weights, parts, strict=True))
        torch.testing.assert_close(rebuild_loss(a, b, options), torch.as_tensor(expected))
    equal = rebuild_loss(a, a, RebuildOptions())
    assert abs(float(equal)) < 1e-5


def test_the_loss_has_a_gradient_where_images_are_flat() -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    rebuilt = flat.clone().requires_grad_()
    torch.autograd.backward(rebuild_loss(flat + 0.1, rebuilt, RebuildOptions(ssim=0)))
    assert rebuilt.grad is not None
    assert bool(rebuilt.grad.isfinite().all())
    assert float(rebuilt.grad.abs().max()) > 0


def test_augmented_images_stay_in_range_and_differ_between_draws() -> None:
    images = torch.rand(2, 3, 20, 28)
    generator = torch.Generator().manual_seed(0)
    views = [augment(images, RebuildOptions(), generator) for _ in range(6)]
    assert all(view.shape == images.shape for view in views)
    assert all(float(view.min()) >= 0 and float(view.max()) <= 1 for view in views)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2))
    still = RebuildOptions(flip=False, zoom=0, brightness=0)
    assert torch.equal(augment(images, still, generator), images)
    mirrored = [augment(images, RebuildOptions(zoom=0, brightness=0), generator) for _ in range(40)]
    for axes in ([], [2], [3], [2, 3]):
        assert any(torch.equal(view, images.flip(axes)) for view in mirrored)
    lit = RebuildOptions(flip=False, zoom=0, brightness=0.4)
    grey = torch.full((1, 3, 4, 4), 0.5)
    factors = torch.stack([augment(grey, lit, generator).mean() / 0.5 for _ in range(80)])
    assert 0.6 <= float(factors.min()) < 0.65
    assert 1.35 < float(factors.max()) <= 1.4


def test_training_follows_the_seed_and_lowers_the_loss() -> None:
    images = torch.rand(4, 3, 1, 1).expand(-1, -1, 16, 16).half()

    def run(seed: int) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        network = UNet(width=4, levels=1)
        options = RebuildOptions(steps=60, batch_size=4, lr=2e-2, ssim=0, msgms=0)
        steps: list[int] = []
        losses = train_to_rebuild(
            network, images, lambda x, _: x, options, seed=seed, after_step=lambda: steps.append(1)
        )
        assert len(losses) == len(steps) == 60
        assert not network.training
        return losses, network.last.weight.detach()

    first, again, other = run(0), run(0), run(1)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]
    assert np.mean(first[0][-5:]) < 0.5 * np.mean(first[0][:5])


def test_the_rate_falls_to_nothing_along_a_cosine() -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            return self.level.expand_as(images)

    network = Constant()
    levels = [0.0]
    # Far from the images gradients hardly change, and a step of Adam is as long as its rate.
    options = RebuildOptions(steps=20, lr=1e-4, ssim=0, msgms=0, brightness=0)
    train_to_rebuild(
        network,
        torch.ones(2, 3, 8, 8),
        lambda x, _: x,
        options,
        seed=0,
        after_step=lambda: levels.append(float(network.level.detach())),
    )
    rates = (1 + np.cos(np.pi * np.arange(20) / 20)) / 2
    np.testing.assert_allclose(np.diff(levels), 1e-4 * rates, rtol=0.02)


def test_a_loss_that_is_nan_ends_training() -> None:
    with pytest.raises(ValueError, match=r"EAR\.fit: loss must be finite, got nan in step 1"):
        train_to_rebuild(
            UNet(width=4, levels=1),
            torch.rand(2, 3, 16, 16),
            lambda x, _: x * torch.nan,
            RebuildOptions(steps=2, ssim=0, msgms=0),
            seed=0,
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("zoom", 1.0),
        ("brightness", -0.1),
        ("l2", -1.0),
    ],
)
def test_training_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"EAR: {field} must be"):
        RebuildOptions(**{field: value})
