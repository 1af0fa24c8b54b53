"""PatchCore that goes on learning, and says which normal patch a pixel is closest to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pyfeat.anomaly.metrics import normal_threshold
from pyfeat.anomaly.patchcore import PatchCore
from tests.support_anomaly import CELL, Images, Means, Poisoned, model, plates, scratched


def means(**options: object) -> PatchCore:
    return model(Means(), neighbourhood=1, scoring="official", **options)


def cells(images: Images) -> torch.Tensor:
    """(B, P, 3) float64: what ``Means`` gives for images."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return functional.avg_pool2d(pixels, CELL).flatten(2).mT.double()


def test_one_call_and_one_call_an_image_give_the_same_model() -> None:
    first, later = plates(6, seed=1), plates(5, seed=2)
    together, in_turn = means().fit(first), means().fit(first)
    together.partial_fit(later)
    for image in later:
        in_turn.partial_fit([image])
    assert torch.equal(together.bank.features, in_turn.bank.features)
    assert torch.equal(together.bank.ids, in_turn.bank.ids)
    assert together.threshold == in_turn.threshold
    assert together.map_threshold == in_turn.map_threshold
    assert together.summary.num_images == in_turn.summary.num_images == 11
    assert together.summary.num_patches == 11 * 64
    assert together.summary.num_rows == len(together.bank)


def test_the_bank_grows_by_the_documented_rule() -> None:
    first, later = plates(6, seed=1), scratched(plates(3, seed=2), slice(0, 24), slice(8, 40))
    fitted = means().fit(first)
    radius, before = fitted.summary.radius, fitted.bank.features.clone()
    fitted.partial_fit(later)
    rows, ids = list(before.double()), []
    for image, patches in enumerate(cells(later), start=len(first)):
        while True:
            to_bank = torch.cdist(patches, torch.stack(rows)).amin(dim=1)
            farthest = int(to_bank.argmax())
            if to_bank[farthest] <= radius:
                break
            rows.append(patches[farthest])
            ids.append([image, *divmod(farthest, 8)])
    assert len(ids) > 0
    assert fitted.bank.ids[len(before) :].tolist() == ids
    assert torch.equal(fitted.bank.features[: len(before)], before)
    assert fitted.bank.radius == fitted.summary.radius == radius
    assert fitted.bank.search(cells(later).flatten(0, 1).float()).distances.max() <= radius * 1.0001


def test_the_threshold_counts_new_images_as_they_scored_before_they_were_learned() -> None:
    first, later = plates(9, seed=1), plates(3, seed=2)
    fitted = means(false_alarm_rate=0.3).fit(first)
    scores = list(fitted.normal_scores.images)
    for image in later:
        found = fitted.score([image])
        scores.append(float(found.scores))
        fitted.partial_fit([image])
        assert fitted.normal_scores.peaks[-1] == float(found.maps.max())
    assert fitted.normal_scores.images == scores
    assert fitted.threshold == normal_threshold(scores, false_alarm_rate=0.3)


def test_what_was_learned_later_is_normal_from_then_on(tmp_path: Path) -> None:
    fitted = model().fit(plates(8, seed=1))
    other = scratched(plates(6, seed=3), slice(16, 40), slice(16, 40))
    before = fitted.score(other[4:])
    assert fitted.threshold is not None
    assert before.scores.min() > fitted.threshold.value
    fitted.save(tmp_path / "model")
    loaded = PatchCore.load(tmp_path / "model", backbone=fitted.backbone)
    for learner in (fitted, loaded):
        learner.partial_fit(other[:4])
        assert learner.score(other[4:]).scores.max() < 0.7 * before.scores.min()
    assert torch.equal(loaded.bank.ids, fitted.bank.ids)
    assert loaded.threshold == fitted.threshold
    assert [image.name for image in loaded.learned[7:9]] == ["image 00007", "image 00000"]


def test_partial_fit_after_calibrate_adds_to_its_scores() -> None:
    fitted = means().fit(plates(6, seed=1))
    fitted.calibrate(plates(19, seed=2))
    fitted.partial_fit(plates(1, seed=3))
    assert fitted.threshold is not None
    assert fitted.threshold.num_normal == 20


def test_a_failed_call_changes_nothing() -> None:
    fitted = model(Poisoned(), batch_size=1).fit(plates(4, seed=1))
    rows, learned, threshold = len(fitted.bank), list(fitted.learned), fitted.threshold
    normal = fitted.normal_scores.copy()
    poisoned = plates(3, seed=2)
    poisoned[2, 0, 0] = 0
    with pytest.raises(ValueError, match=r"PatchCore\.partial_fit: backbone must give finite"):
        fitted.partial_fit(poisoned)
    with pytest.raises(ValueError, match=r"partial_fit: images must hold at least one"):
        fitted.partial_fit([])
    assert (len(fitted.bank), fitted.learned, fitted.threshold) == (rows, learned, threshold)
    assert fitted.normal_scores == normal
    assert fitted.summary.num_images == 4


def test_a_model_that_is_not_fitted_is_fitted() -> None:
    assert torch.equal(
        means().partial_fit(plates(4, seed=1)).bank.ids, means().fit(plates(4, seed=1)).bank.ids
    )


def test_pixels_of_normal_images_exceed_the_map_threshold_as_seldom_as_stated() -> None:
    fitted = model(false_alarm_rate=0.2).fit(plates(40, seed=1))
    assert fitted.map_threshold is not None
    assert fitted.map_threshold.false_alarm_rate == pytest.approx(8 / 41)
    threshold = fitted.map_threshold.value
    found = [len(image.regions(threshold)) > 0 for image in fitted.stream(plates(60, seed=2))]
    assert 0.02 < sum(found) / 60 < 0.4
    defective = scratched(plates(4, seed=3), slice(16, 40), slice(16, 40))
    for image in fitted.stream(defective):
        box = image.regions(threshold)[0].box
        assert box.top < 40
        assert box.bottom > 16
        assert 10 < box.left + (box.right - box.left) / 2 < 46


def test_the_nearest_patch_is_named_with_its_place(tmp_path: Path) -> None:
    train = plates(3, seed=1, size=(128, 192))
    for index, image in enumerate(train):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    fitted = means(image_size=(64, 64), coreset_ratio=1.0).fit(tmp_path)
    # Of an image that was learned, every patch is nearest to itself.
    for row, column, box in ((0, 0, (0, 0, 16, 24)), (127, 191, (112, 168, 128, 192))):
        found = fitted.nearest_patch(tmp_path / "1.png", row, column)
        assert (found.image, found.distance) == (str(tmp_path / "1.png"), 0.0)
        assert found.box == found.asked == box
    # An image of another size has a patch of its own from there, brightened a little.
    small = np.array(Image.fromarray(train[2]).resize((64, 64), Image.Resampling.BOX))
    found = fitted.nearest_patch(small, 30, 9)
    assert found.asked == (24, 8, 32, 16)
    flat = fitted.bank.features.double()
    own = cells(small[None])[0, 3 * 8 + 1]
    nearest = (flat - own).norm(dim=1)
    image, cell_row, cell_column = fitted.bank.ids[int(nearest.argmin())].tolist()
    assert found.image == str(tmp_path / f"{image}.png")
    assert found.box[:2] == (cell_row * 16, cell_column * 24)
    assert found.distance == pytest.approx(float(nearest.min()), rel=1e-4)


@pytest.mark.parametrize(("row", "column"), [(-1, 0), (0, -1), (64, 0), (0, 64)])
def test_a_pixel_outside_the_image_is_refused(row: int, column: int) -> None:
    fitted = means().fit(plates(2, seed=1))
    with pytest.raises(ValueError, match="row and column must be a pixel of 64 x 64, got"):
        fitted.nearest_patch(plates(1, seed=2)[0], row, column)


def test_the_nearest_patch_needs_a_fitted_model() -> None:
    with pytest.raises(ValueError, match=r"PatchCore\.nearest_patch: model must be fitted first"):
        means().nearest_patch(plates(1, seed=2)[0], 0, 0)
