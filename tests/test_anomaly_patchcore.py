"""PatchCore from images to scores, on small plates with planted defects."""

import math
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from pyfeat.anomaly.images import ImageInput
from pyfeat.anomaly.metrics import normal_threshold
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.results import AnomalyScores
from pyfeat.anomaly.scoring import ScoringName
from tests.support_anomaly import CELL, Images, Means, Poisoned, model, network, plates, scratched

SCORINGS: tuple[ScoringName, ...] = ("paper", "official", "anomalib", "m3dm", "anomalydino")


def assert_same(actual: AnomalyScores, expected: AnomalyScores) -> None:
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.maps, expected.maps)


def assert_finds_the_defect(fitted: PatchCore, size: tuple[int, int]) -> None:
    rows, columns = slice(14, 28), slice(size[1] - 28, size[1] - 14)
    good = plates(6, seed=2, size=size)
    found = fitted.score(np.concatenate([good, scratched(good[:2], rows, columns)]))
    assert (found.scores.shape, found.maps.shape) == ((8,), (8, *size))
    assert found.scores[6:].min() > 1.05 * found.scores[:6].max()
    for heat in found.maps[6:]:
        row, column = divmod(int(heat.argmax()), size[1])
        assert rows.start <= row < rows.stop
        assert columns.start <= column < columns.stop


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_planted_defect_scores_highest_and_is_where_the_map_peaks(scoring: ScoringName) -> None:
    size = (48, 96)
    fitted = model(scoring=scoring, image_size=size).fit(plates(12, seed=1, size=size))
    assert fitted.grid == (12, 24)
    assert_finds_the_defect(fitted, size)
    lengths = fitted.bank.features.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(()), atol=1e-6) == (scoring == "anomalydino")


def test_efficientnet_lite0_finds_the_defect() -> None:
    fitted = PatchCore(image_size=(64, 128)).fit(plates(6, seed=1, size=(64, 128)))
    assert fitted.backbone.name == "efficientnet_lite0"
    assert fitted.grid == (8, 16)
    assert fitted.bank.features.shape == (6 * 8 * 16 // 10, 40 + 112)
    assert_finds_the_defect(fitted, (64, 128))


def test_a_transformers_model_from_a_folder_finds_the_defect(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.3,  # wide enough that untrained weights tell patches apart
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    size = (56, 112)
    options: dict[str, Any] = {"coreset_ratio": 1.0, "neighbourhood": 1, "scoring": "anomalydino"}
    fitted = PatchCore(f"hf:{tmp_path / 'dino'}", image_size=size, **options)
    fitted.fit(plates(30, seed=1, size=size))
    assert fitted.grid == (4, 8)
    assert_finds_the_defect(fitted, size)
    fitted.save(tmp_path / "model")
    good = plates(2, seed=5, size=size)
    assert_same(PatchCore.load(tmp_path / "model").score(good), fitted.score(good))


def sources(images: Images, folder: Path) -> dict[str, ImageInput]:
    folder.mkdir()
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    return {
        "folder": folder,
        "paths": paths,
        "numpy": images,
        "torch": tensor,
        "float": tensor / 255,
        "generator": (image for image in images),
        "PIL": [Image.fromarray(image) for image in images],
    }


def test_the_same_pixels_score_the_same_from_any_source(tmp_path: Path) -> None:
    train, test = plates(12, seed=1), plates(11, seed=2)
    expected = model(batch_size=4).fit(train)
    tests = sources(test, tmp_path / "test")
    for kind, images in sources(train, tmp_path / "train").items():
        fitted = model(batch_size=4).fit(images)
        assert torch.equal(fitted.bank.features, expected.bank.features), kind
        found = fitted.score(tests[kind])
        assert_same(found, expected.score(test))
        named = kind in ("folder", "paths")
        assert found.names[10] == (str(tmp_path / "test" / "10.png") if named else "image 00010")


def test_images_are_resized_to_the_model() -> None:
    train = plates(4, seed=1, size=(64, 128))
    fitted = model(Means(), image_size=(32, 40)).fit(train)
    found = next(fitted.stream(train[:1]))
    assert fitted.grid == (4, 5)
    assert found.pixels.shape == (3, 32, 40)
    assert found.heat_map.shape == (32, 40)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    train, test = plates(12, seed=1), plates(7, seed=2)
    options: dict[str, Any] = {"candidates": 300, "seed": 3}
    one = model(Means(), batch_size=5, **options).fit(train)
    other = model(Means(), batch_size=batch_size, **options).fit(train)
    assert torch.equal(other.bank.features, one.bank.features)
    assert torch.equal(other.bank.ids, one.bank.ids)
    assert other.threshold == one.threshold
    assert_same(other.score(test), one.score(test))


def test_equal_seeds_give_equal_models_and_other_seeds_others() -> None:
    train, test = plates(12, seed=1), plates(3, seed=2)
    one, same, other = (model(candidates=500, seed=s).fit(train) for s in (4, 4, 5))
    assert torch.equal(one.bank.ids, same.bank.ids)
    assert torch.equal(one.bank.features, same.bank.features)
    assert one.threshold == same.threshold
    assert_same(one.score(test), same.score(test))
    assert not torch.equal(one.bank.ids, other.bank.ids)
    assert not torch.equal(one.score(test).maps, other.score(test).maps)


@pytest.mark.parametrize(
    ("candidates", "ratio", "rows"),
    [(None, 1.0, 768), (None, 0.25, 192), (768, 1.0, 768), (767, 1.0, 767), (100, 0.5, 50)],
)
def test_the_bank_holds_the_stated_share_of_the_candidates(
    candidates: int | None, ratio: float, rows: int
) -> None:
    fitted = model(Means(), candidates=candidates, coreset_ratio=ratio).fit(plates(12, seed=1))
    assert len(fitted.bank) == rows == len(set(map(tuple, fitted.bank.ids.tolist())))
    summary = fitted.summary
    assert (summary.num_images, summary.num_patches, summary.num_rows) == (12, 768, rows)
    assert (summary.radius == 0) == (ratio == 1)
    assert set(summary.seconds) == {"features", "coreset", "threshold"}


def test_the_seed_decides_both_the_candidates_and_the_coreset() -> None:
    train = plates(12, seed=1)
    for options in ({"candidates": 50, "coreset_ratio": 1.0}, {"candidates": None}):
        one, other = (model(Means(), seed=s, **options).fit(train).bank.ids for s in (1, 2))
        assert sorted(one.tolist()) != sorted(other.tolist())


def patch(maps: list[Tensor], row: int, column: int) -> Tensor:
    """Features of one patch: means over 3 x 3 cells, the second map brought to the first."""
    means = []
    for layer in maps:  # [C, h, w]
        padded = functional.pad(layer, (1, 1, 1, 1))
        mean = torch.zeros_like(layer)
        for y in range(3):
            for x in range(3):
                mean += padded[:, y : y + layer.shape[1], x : x + layer.shape[2]] / 9
        means.append(mean)
    second = functional.interpolate(
        means[1][None], means[0].shape[1:], mode="bilinear", align_corners=False
    )
    return torch.cat([means[0][:, row, column], second[0, :, row, column]])


def test_ids_name_the_patch_that_a_row_was_made_from() -> None:
    size, train = (32, 64), plates(9, seed=1, size=(32, 64))
    fitted = model(image_size=size, batch_size=4).fit(train)
    pixels = torch.from_numpy(train).permute(0, 3, 1, 2) / 255
    stages = [list(maps) for maps in zip(*fitted.backbone(pixels), strict=True)]
    assert fitted.bank.ids.max(dim=0).values.tolist() == [8, 7, 15]
    for features, (image, row, column) in zip(
        fitted.bank.features, fitted.bank.ids.tolist(), strict=True
    ):
        torch.testing.assert_close(features, patch(stages[image], row, column))


def test_images_and_batches_are_let_go_one_by_one() -> None:
    raw: list[weakref.ref[Images]] = []
    batches: list[Any] = []

    def generate() -> Iterator[Images]:
        for index in range(40):
            image = plates(1, seed=index)[0]
            raw.append(weakref.ref(image))
            assert sum(ref() is not None for ref in raw) <= 2
            yield image

    class Watching(Means):
        def __call__(self, images: Tensor) -> list[Tensor]:
            batches.append(StorageWeakRef(images.untyped_storage()))  # type: ignore[no-untyped-call]
            assert sum(not ref.expired() for ref in batches) <= 2
            return super().__call__(images)

    fitted = model(Watching(), batch_size=4).fit(generate())
    found = fitted.score(generate())
    assert len(found.names) == 40
    assert (len(raw), len(batches)) == (80, 20)


def test_the_threshold_comes_from_images_scored_without_their_own_rows() -> None:
    train = plates(15, seed=1)
    fitted = model(Means(), scoring="official", neighbourhood=1, false_alarm_rate=0.3).fit(train)
    cells = functional.avg_pool2d(torch.from_numpy(train).permute(0, 3, 1, 2) / 255, CELL)
    scores = []
    for image, cell in enumerate(cells.flatten(2).mT):
        rest = fitted.bank.features[fitted.bank.ids[:, 0] != image]
        to_rows = (cell[:, None].double() - rest.double()).norm(dim=2)
        scores.append(float(to_rows.amin(dim=1).max() ** 2))
    assert fitted.threshold is not None
    assert fitted.threshold.value == pytest.approx(sorted(scores)[11], rel=1e-6)  # k = 16 - 4
    assert fitted.threshold.num_normal == 15
    assert fitted.threshold.false_alarm_rate == 4 / 16


@pytest.mark.parametrize("scoring", ["paper", "official"])
def test_unseen_normal_images_exceed_the_threshold_about_as_often_as_stated(
    scoring: ScoringName,
) -> None:
    fitted = model(scoring=scoring, false_alarm_rate=0.2).fit(plates(60, seed=1))
    assert fitted.threshold is not None
    alarms = (fitted.score(plates(200, seed=2)).scores > fitted.threshold.value).float().mean()
    assert 0.05 < alarms < 0.35


def test_no_more_than_100_images_make_the_threshold() -> None:
    fitted = model(Means()).fit(plates(103, seed=1))
    assert fitted.threshold is not None
    assert fitted.threshold.num_normal == 100


def test_a_single_image_gives_no_threshold() -> None:
    fitted = model(Means()).fit(plates(1, seed=1))
    assert fitted.threshold is None
    assert fitted.score(plates(1, seed=1)).scores.isfinite().all()


def test_calibrate_sets_the_threshold_from_unseen_images() -> None:
    fitted, unseen = model().fit(plates(12, seed=1)), plates(19, seed=2)
    threshold = fitted.calibrate(unseen)
    scores = fitted.score(unseen).scores
    assert threshold == normal_threshold(scores, false_alarm_rate=0.05) == fitted.threshold
    assert (threshold.value, threshold.false_alarm_rate) == (float(scores.max()), 0.05)


def test_images_that_cannot_be_read_are_skipped_and_named(tmp_path: Path) -> None:
    train = plates(5, seed=1)
    sources(train, tmp_path / "images")
    broken = tmp_path / "images" / "2b.png"
    broken.write_bytes(b"no image")
    fitted = model(Means()).fit(tmp_path / "images")
    assert [image.name for image in fitted.skipped] == [str(broken)]
    assert torch.equal(fitted.bank.ids, model(Means()).fit(train).bank.ids)
    assert len(fitted.score(train).names) == 5
    assert fitted.skipped == []
    assert len(fitted.score(tmp_path / "images").names) == 5
    assert [image.name for image in fitted.skipped] == [str(broken)]
    for action in (fitted.fit, fitted.score, fitted.calibrate):
        with pytest.raises(ValueError, match=r"images must all be usable, got .*2b\.png"):
            action(tmp_path / "images", strict=True)


def test_nothing_to_read_is_an_error_that_lists_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PatchCore\.fit: images must be a folder with image fil"):
        model(Means()).fit(tmp_path)
    with pytest.raises(ValueError, match=r"fit: images must hold at least one .* \(0 skipped\)"):
        model(Means()).fit([])
    for name in ("a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    fitted = model(Means()).fit(plates(2, seed=1))
    for verb in ("fit", "calibrate"):
        message = rf"{verb}: images must .* \(2 skipped\)\n  .*a\.png: it is .*\n  .*b\.jpg: it is"
        with pytest.raises(ValueError, match=message):
            getattr(fitted, verb)(tmp_path)
    found = fitted.score(tmp_path)
    assert (found.scores.shape, found.maps.shape, found.names) == ((0,), (0, 64, 64), [])


@pytest.mark.parametrize("verb", ["score", "calibrate"])
def test_a_model_must_be_fitted_first(verb: str) -> None:
    message = rf"PatchCore\.{verb}: model must be fitted first, got an empty memory bank"
    with pytest.raises(ValueError, match=message):
        getattr(model(Means()), verb)(plates(1, seed=1))


def test_features_that_are_not_finite_are_refused_by_the_name_of_the_image() -> None:
    train = plates(7, seed=1)
    fitted = model(Poisoned(), batch_size=3).fit(train)
    before = (fitted.bank, fitted.grid, fitted.threshold, fitted.summary)
    train[4, 0, 0] = 0
    for verb in ("fit", "score"):
        message = rf"{verb}: backbone must give finite features, got NaN .* for image 00004"
        with pytest.raises(ValueError, match=message):
            getattr(fitted, verb)(train)
    assert (fitted.bank, fitted.grid, fitted.threshold, fitted.summary) == before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"image_size": 0}, "image_size must hold positive pixels, got 0"),
    "sides": ({"image_size": (64, 64, 3)}, r"image_size must .*, got \(64, 64, 3\)"),
    "even": ({"neighbourhood": 2}, "neighbourhood must be odd and positive, got 2"),
    "no ratio": ({"coreset_ratio": 0.0}, r"coreset_ratio must be in \(0, 1\], got 0.0"),
    "nan": ({"coreset_ratio": math.nan}, r"coreset_ratio must be in \(0, 1\], got nan"),
    "candidates": ({"candidates": 0}, "candidates must be at least 1, got 0"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "rate": ({"false_alarm_rate": 1.0}, r"false_alarm_rate must be in \(0, 1\), got 1.0"),
    "scoring": ({"scoring": "best"}, "scoring must be one of 'paper', .*, got 'best'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=f"PatchCore: {message}"):
        model(Means(), **options)


def test_a_bad_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="load_backbone: spec must be"):
        PatchCore("efficientnet_lite9")
    with pytest.raises(ValueError, match="layers must be layers of module:Sequential, got '9'"):
        PatchCore(network(), layers=["9"])


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    fitted = model(Means()).fit(plates(3, seed=1), progress=True)
    fitted.score(plates(2, seed=2), progress=True)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("fit", "coreset", "score", "3/3", "2/2"))
    fitted.fit(plates(3, seed=1))
    assert capsys.readouterr() == ("", "")


INTERRUPTED = """
import signal
import numpy as np
from tests.support_anomaly import model
from torch import nn

def images():
    for index in range(60):
        yield np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    print("read", flush=True)

# A parent in the background may have left the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A quarter of a million rows, all of them to be picked: minutes.
slow = model(nn.Sequential(nn.Identity()), layers=["0"], candidates=None, coreset_ratio=1.0)
slow.fit(images())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_ctrl_c_ends_a_long_fit_soon() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "read\n"
    time.sleep(2)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    began = time.perf_counter()
    _, errors = child.communicate(timeout=60)
    assert time.perf_counter() - began < 5  # a second, but for whatever else the machine does
    assert child.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
