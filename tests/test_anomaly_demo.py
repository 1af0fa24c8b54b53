"""The solar cells as a data set, and the defects that are pasted into good ones."""

from pathlib import Path

import pytest
import torch

from benchmarks.methods.pasted_defects import KINDS, pasted
from pyfeat.anomaly.demo import elpv_split, solar_cells, unsure_cells


def test_the_cells_are_a_data_set_of_two_categories() -> None:
    cells, split = solar_cells(), elpv_split("all")
    assert cells.categories == ["mono", "poly"]
    train, test = cells.select(split="train"), cells.select(split="test")
    assert (len(train), len(test)) == (len(split.train), len(split.test)) == (1055, 1168)
    assert len(test.select(defective=True)) == sum(split.defective) == 715
    assert len(train.select(defective=True)) == 0
    assert len(cells.without_mask) == 715
    names = {path.stem for path in unsure_cells()}
    assert len(names) == 401
    assert not names & {Path(record.name).name for record in cells}
    assert cells[0].load().rgb.shape == (3, 300, 300)


def test_another_seed_learns_from_other_cells() -> None:
    one, same, other = (set(elpv_split("all", seed=s).train) for s in (0, 0, 1))
    assert one == same
    assert len(one & other) < 0.8 * len(one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pasted_defect_changes_what_its_mask_says_and_nothing_else(kind: str) -> None:
    image = 0.2 + 0.6 * torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(1))
    kept = image.clone()
    changed, mask = pasted(image, kind, torch.Generator().manual_seed(5))
    again, _ = pasted(image, kind, torch.Generator().manual_seed(5))
    assert torch.equal(image, kept)
    assert torch.equal(changed, again)
    assert 0.001 < mask.float().mean() < 0.4
    assert (changed - image).abs()[:, ~mask].max() <= 1 / 255
    assert changed.min() >= 0
    assert changed.max() <= 1
    if kind != "foreign patch":
        assert (changed <= image).all()
        assert (changed[:, mask] < image[:, mask]).all()
