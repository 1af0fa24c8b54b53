"""EAR as a model: what it learns, that it never wavers, what is kept of it, what it refuses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("kornia")

from pyfeat.anomaly import EAR
from pyfeat.anomaly.excision import Excision
from pyfeat.anomaly.metrics import image_auroc, normal_threshold
from pyfeat.anomaly.reconstruction import NormalResiduals, RebuildOptions, residual_maps, smooth
from pyfeat.anomaly.saliency import (
    Saliency,
)
from tests.support_anomaly import plates, scratched
from tests.test_anomaly_saliency import SIZE

QUICK = RebuildOptions(steps=2, batch_size=4)


class Oddness(Saliency):
    """How far cells of 4 pixels are from the mean of their image."""

    def __call__(self, images: Tensor) -> Tensor:
        cells = functional.avg_pool2d(images.mean(1, keepdim=True), 4)[:, 0]
        return (cells - cells.mean(dim=(1, 2), keepdim=True)).abs()

    def fingerprint(self) -> str:
        return "oddness"


def model(saliency: Saliency | None = None, **options: Any) -> EAR:
    settings: dict[str, Any] = {"width": 4, "levels": 2, "window": 5, "training": QUICK}
    return EAR(saliency or Oddness(), image_size=SIZE, **{**settings, **options})


def good(count: int, seed: int) -> Any:
    return plates(count, seed, SIZE)


@pytest.fixture(scope="module")
def trained() -> EAR:
    options = RebuildOptions(steps=80, batch_size=8, lr=5e-3)
    excision = Excision(area=0.15, dilation=1, block=8)
    return model(width=8, training=options, excision=excision, holdout=0.25).fit(good(40, seed=1))


def test_defects_score_higher_than_good_images_and_where_they_are(trained: EAR) -> None:
    bad = scratched(good(20, seed=3), slice(10, 16), slice(18, 24))
    normal, found = trained.score(good(20, seed=2)), trained.score(bad)
    labels = [0] * 20 + [1] * 20
    assert image_auroc(labels, torch.cat([normal.scores, found.scores])) > 0.95
    peaks = [divmod(int(heat.argmax()), 32) for heat in found.maps]
    near = [7 <= row <= 19 and 15 <= column <= 27 for row, column in peaks]
    assert np.mean(near) >= 0.9


def test_scores_are_equal_bit_by_bit_whenever_they_are_computed(trained: EAR) -> None:
    images = good(20, seed=4)
    first = trained.score(images)
    torch.rand(7)
    again = trained.score(images)
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(first.maps, again.maps)
    masks = [[image.mask for image in trained.rebuild(images)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    double = list(trained.rebuild(np.concatenate([images[:8], images[:8]])))
    assert all(torch.equal(double[i].mask, double[i + 8].mask) for i in range(8))


def test_what_is_shown_and_judged_of_an_image_fits_together(trained: EAR) -> None:
    for image in trained.rebuild(scratched(good(3, seed=5), slice(4, 9), slice(4, 9))):
        pixels, mask = image.pixels[None], image.mask[None]
        assert torch.equal(image.shown, trained.excision.shown(pixels, mask)[0])
        assert trained.network is not None
        with torch.no_grad():
            rebuilt = trained.network(image.shown[None])
        torch.testing.assert_close(image.rebuilt, rebuilt[0])
        assert trained.normal is not None
        residual = trained.normal(residual_maps(pixels, image.rebuilt[None], "msgms"))
        torch.testing.assert_close(image.plain_map, smooth(residual, 5)[0])
        torch.testing.assert_close(image.masked_map, smooth(residual * mask, 5)[0])
        assert image.plain_score == float(image.plain_map.max())
        assert image.masked_score == float(image.masked_map.max())
        assert image.shape == SIZE


def test_residuals_are_judged_by_those_of_normal_images_at_the_same_pixel(trained: EAR) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[10:].sort().values
    pixels = torch.from_numpy(good(40, seed=1)[order]).permute(0, 3, 1, 2).float() / 255
    images = list(trained.rebuild(pixels.half().float()))
    residuals = torch.cat([residual_maps(i.pixels[None], i.rebuilt[None], "msgms") for i in images])
    assert trained.normal is not None
    torch.testing.assert_close(trained.normal.mean, residuals.mean(dim=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(trained.normal.spread, residuals.std(dim=0), rtol=1e-3, atol=1e-5)
    expected = (residuals - residuals.mean(dim=0)) / (residuals.std(dim=0) + 1e-3)
    found = torch.stack([image.plain_map for image in images])
    torch.testing.assert_close(found, smooth(expected, 5), rtol=1e-2, atol=1e-3)


def test_residuals_are_learned_again_for_another_residual() -> None:
    images = good(20, seed=1)
    fitted, again = (model(residual=kind).fit(images) for kind in ("msgms", "absolute"))
    fitted.residual = "absolute"
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[2:].sort().values
    pixels = torch.from_numpy(images[order]).permute(0, 3, 1, 2).float() / 255
    fitted.learn_residuals(pixels.half().float())
    found, expected = (each.score(good(3, seed=2)) for each in (fitted, again))
    torch.testing.assert_close(found.maps, expected.maps, rtol=1e-3, atol=1e-3)
    left = [(i.pixels - i.rebuilt).abs().mean(dim=0) for i in fitted.rebuild(pixels.half().float())]
    assert fitted.normal is not None
    torch.testing.assert_close(fitted.normal.mean, torch.stack(left).mean(dim=0))
    fitted.relative = False
    assert fitted.fit(images).normal is None
    with pytest.raises(ValueError, match=r"EAR\.score: model must be fitted first"):
        model().learn_residuals(images)


def test_residuals_of_few_images_or_when_asked_for_are_judged_as_they_are() -> None:
    few = model(residual="absolute").fit(good(17, seed=1))
    assert few.summary.num_images == 15
    plain = model(residual="absolute", relative=False).fit(good(18, seed=1))
    for each in (few, plain):
        assert each.normal is None
        for image in each.rebuild(good(2, seed=2)):
            residual = residual_maps(image.pixels[None], image.rebuilt[None], "absolute")
            torch.testing.assert_close(image.plain_map, smooth(residual, 5)[0])


def test_spreads_of_residuals_are_those_of_all_batches_together() -> None:
    residuals = torch.rand(20, 4, 3, generator=torch.Generator().manual_seed(0))
    residuals[:, 0, 0] = 0.25  # alike in all images, to the last bit
    normal = NormalResiduals.of(torch.split(residuals, 7))
    assert normal is not None
    torch.testing.assert_close(normal.mean, residuals.mean(dim=0))
    torch.testing.assert_close(normal.spread, residuals.std(dim=0))
    assert normal.spread[0, 0] == 0
    assert torch.equal(normal(residuals[:1])[0, 0, :1], torch.zeros(1))
    assert NormalResiduals.of([residuals[:16]]) is not None
    assert NormalResiduals.of([residuals[:15]]) is None
    assert NormalResiduals.of([]) is None


@pytest.mark.parametrize("weighting", ["plain", "masked"])
def test_score_and_stream_follow_the_weighting(trained: EAR, weighting: Any) -> None:
    images = good(5, seed=6)
    trained.weighting = weighting
    try:
        scores = trained.score(images)
        streamed = list(trained.stream(images))
    finally:
        trained.weighting = "plain"
    rebuilt = list(trained.rebuild(images))
    assert scores.names == [f"image {i:05d}" for i in range(5)]
    assert scores.scores.tolist() == [getattr(r, f"{weighting}_score") for r in rebuilt]
    for i, image in enumerate(rebuilt):
        assert torch.equal(scores.maps[i], getattr(image, f"{weighting}_map"))
        assert torch.equal(streamed[i].heat_map, scores.maps[i])
        assert streamed[i].score == float(scores.scores[i])


def test_the_threshold_comes_from_images_that_were_not_learned_from(trained: EAR) -> None:
    assert (trained.summary.num_images, trained.summary.num_held_out) == (30, 10)
    assert trained.threshold is not None
    assert trained.threshold.num_normal == 10
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:10].sort().values
    pixels = torch.from_numpy(good(40, seed=1)[held_out]).permute(0, 3, 1, 2).float() / 255
    scores = trained.score(pixels.half().float()).scores
    expected = normal_threshold(scores, false_alarm_rate=0.05)
    assert trained.threshold.value == pytest.approx(expected.value, rel=1e-5)


def test_the_saliency_learns_from_what_the_network_learns_from() -> None:
    class Learning(Oddness):
        seen: Tensor

        def fit(self, images: Tensor) -> None:
            self.seen = images.clone()

    saliency, images = Learning(), good(10, seed=1)
    model(saliency, holdout=0.2).fit(images)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(saliency.seen.float(), pixels[order[2:].sort().values].half().float())


def test_calibration_sets_the_threshold() -> None:
    fitted = model(false_alarm_rate=0.2).fit(good(4, seed=1))
    threshold = fitted.calibrate(good(30, seed=2))
    scores = fitted.score(good(30, seed=2)).scores
    assert fitted.threshold == threshold == normal_threshold(scores, false_alarm_rate=0.2)


def test_a_fit_follows_its_seed() -> None:
    scores = [
        model(seed=seed, training=replace(QUICK, steps=4)).fit(good(8, seed=1)).score(good(3, 2))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(scores[0].scores, scores[1].scores)
    assert not torch.equal(scores[0].scores, scores[2].scores)


def test_one_image_is_learned_from_and_leaves_no_threshold() -> None:
    fitted = model().fit(good(1, seed=1))
    assert fitted.threshold is None
    assert fitted.summary.num_images == 1
    assert len(fitted.score(good(2, seed=2)).scores) == 2
    most = model(holdout=0.9, levels=4).fit(good(2, seed=1))
    assert (most.summary.num_images, most.summary.num_held_out) == (1, 1)


def test_skips_are_switched_in_scoring_only(trained: EAR) -> None:
    images = good(2, seed=7)
    before = [image.rebuilt for image in trained.rebuild(images)]
    trained.skips = (False, True)
    try:
        after = list(trained.rebuild(images))
    finally:
        trained.skips = None
    for image, rebuilt in zip(after, before, strict=True):
        assert not torch.allclose(image.rebuilt, rebuilt)
        assert trained.network is not None
        with torch.no_grad():
            expected = trained.network(image.shown[None], [False, True])
        torch.testing.assert_close(image.rebuilt, expected[0])


def test_auto_takes_the_largest_block_that_does_not_give_the_cut_away() -> None:
    fitted = model(block="auto", training=replace(QUICK, steps=6)).fit(good(12, seed=1))
    ratios = fitted.summary.block_errors
    assert list(ratios) == [4, 8, 16]
    fine = [block for block, ratio in ratios.items() if ratio <= 1.1]
    assert fitted.excision.block == max(fine, default=4)
    held_out = torch.from_numpy(good(12, seed=1)).permute(0, 3, 1, 2) / 255
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:1]
    fitted.excision = replace(fitted.excision, block=8)
    (image,) = fitted.rebuild(held_out[chosen].half().float())
    error = (image.pixels - image.rebuilt).square().mean(0)
    ratio = float(error[image.mask].mean() / error[~image.mask].mean())
    assert ratios[8] == pytest.approx(ratio, rel=1e-3)


def test_auto_shows_all_blocks_by_turns_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int | None] = []
    original = Excision.shown

    def shown(self: Excision, images: Tensor, masks: Tensor) -> Tensor:
        blocks.append(self.block)
        return original(self, images, masks)

    monkeypatch.setattr(Excision, "shown", shown)
    model(block="auto", training=replace(QUICK, steps=20)).fit(good(6, seed=1))
    assert set(blocks[:20]) == {4, 8, 16}


def test_images_that_cannot_be_read_are_skipped_and_named() -> None:
    images = [*good(3, seed=1), np.full((4, 4), np.nan, np.float32)]
    fitted = model().fit(images)
    assert [image.name for image in fitted.skipped] == ["image 00003"]
    assert len(fitted.score(images).scores) == 3
    assert [image.name for image in fitted.skipped] == ["image 00003"]
    with pytest.raises(ValueError, match=r"EAR\.fit: images must hold at least one that can be"):
        model().fit(images[3:])
    with pytest.raises(ValueError, match=r"EAR\.calibrate: images must hold at least one"):
        fitted.calibrate(images[3:])
    with pytest.raises(ValueError, match=r"EAR\.fit: images must all be usable"):
        model().fit(images, strict=True)
    with pytest.raises(ValueError, match=r"EAR\.score: model must be fitted first"):
        model().score(images)
    assert fitted.score(good(3, seed=1)[:0]).maps.shape == (0, 32, 32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 15),
        ("image_size", (32, 32, 3)),
        ("block", 0),
        ("width", 0),
        ("levels", 0),
        ("levels", 5),
        ("block", "big"),
        ("skips", [True]),
        ("residual", "ssim"),
        ("window", 4),
        ("weighting", "both"),
        ("holdout", 1.0),
        ("false_alarm_rate", 0.0),
        ("batch_size", 0),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"EAR: {name} must "):
        EAR(Oddness(), **{"image_size": 32, "levels": 2, name: value})


def test_regions_are_cut_from_the_map_at_the_threshold_of_the_score(trained: EAR) -> None:
    assert trained.map_threshold == trained.threshold
    assert trained.threshold is not None
    bad = scratched(good(6, seed=3), slice(10, 16), slice(18, 24))
    for image in trained.stream(bad):
        found = image.regions(trained.threshold.value)
        assert bool(found) == (image.score > trained.threshold.value)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = model().fit(good(3, seed=1), progress=True)
    fitted.score(good(4, seed=2), progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "4/4" in shown
