"""Connected regions of heat maps, in pixels of the image before it was resized."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from pyfeat.anomaly.regions import cell_box, find_regions
from pyfeat.anomaly.results import ScoredImage


def two_spots() -> Tensor:
    heat = torch.zeros(6, 8)
    heat[0:2, 1:4] = 2.0
    heat[2, 4] = 3.0  # touches the first by a corner
    heat[5, 7] = 5.0
    return heat


def test_regions_are_what_a_person_would_count() -> None:
    hot, wide = find_regions(two_spots(), 1.0)
    assert (hot.box, hot.area, hot.peak, hot.centroid) == ((5, 7, 6, 8), 1.0, 5.0, (5.0, 7.0))
    assert (wide.box, wide.area, wide.peak) == ((0, 1, 3, 5), 7.0, 3.0)
    assert wide.centroid == pytest.approx(((3 * 0 + 3 * 1 + 2) / 7, (2 * 6 + 4) / 7))


def test_a_value_equal_to_the_threshold_is_below_it() -> None:
    assert [region.area for region in find_regions(two_spots(), 2.0)] == [1.0, 1.0]
    assert find_regions(two_spots(), 5.0) == []
    assert find_regions(two_spots(), math.inf) == []
    (everything,) = find_regions(two_spots(), -math.inf)
    assert (everything.box, everything.area) == ((0, 0, 6, 8), 48.0)


def test_places_are_in_pixels_of_the_image_before_it_was_resized() -> None:
    hot, wide = find_regions(two_spots(), 1.0, shape=(15, 16))
    assert (hot.box, hot.area) == ((12, 14, 15, 16), 5.0)
    assert hot.centroid == (5.5 * 2.5 - 0.5, 7.5 * 2 - 0.5)
    assert (wide.box, wide.area) == ((0, 2, 8, 10), 35.0)
    (kept,) = find_regions(two_spots(), 1.0, shape=(15, 16), min_area=5.1)
    assert kept == wide
    scored = ScoredImage("a", torch.zeros(3, 6, 8), 5.0, two_spots(), (15, 16))
    assert scored.regions(1.0) == [hot, wide]
    assert scored.regions(1.0, min_area=5.1) == [wide]


def test_random_maps_give_the_regions_of_scipy() -> None:
    heat = torch.rand(40, 30, generator=torch.Generator().manual_seed(3))
    found = find_regions(heat, 0.7)
    numbers, count = ndimage.label(heat.numpy() > 0.7, np.ones((3, 3)))
    assert len(found) == count > 10
    peaks = ndimage.maximum(heat.numpy(), numbers, range(1, count + 1))
    assert [region.peak for region in found] == sorted(peaks.tolist(), reverse=True)
    assert sum(region.area for region in found) == int((heat > 0.7).sum())


@pytest.mark.parametrize(
    ("heat", "threshold", "message"),
    [
        (torch.zeros(3), 0.0, r"heat_map must have shape \(h, w\), got \(3,\)"),
        (torch.tensor([[0.0, math.nan]]), 0.0, "heat_map must be finite"),
        (torch.zeros(2, 2), math.nan, "threshold must be a number"),
    ],
)
def test_bad_arguments_are_refused(heat: Tensor, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"find_regions: {message}"):
        find_regions(heat, threshold)


def test_the_cells_of_a_grid_cover_the_image() -> None:
    covered = np.zeros((10, 7), int)
    for row in range(4):
        for column in range(3):
            top, left, bottom, right = cell_box((row, column), (4, 3), (10, 7))
            covered[top:bottom, left:right] += 1
    assert covered.min() == 1
    for row in range(10):  # the cell that a pixel is asked about holds it
        top, _, bottom, _ = cell_box((row * 4 // 10, 0), (4, 3), (10, 7))
        assert top <= row < bottom
