"""Each definition of the scores against its published formula, in plain loops and float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from pyfeat.anomaly.scoring import SCORINGS, ScoringName
from pyfeat.memory import MemoryBank

NAMES: tuple[ScoringName, ...] = ("paper", "official", "anomalib", "m3dm", "anomalydino")
REWEIGHTED: tuple[ScoringName, ...] = ("paper", "anomalib", "m3dm")
Rows = list[list[float]]


# The definitions, for the patches of one image and the rows of the memory.


def farthest_patch(patches: Rows, rows: Rows) -> tuple[list[float], int, float]:
    """The patch farthest from its nearest row, that row, and their distance."""
    found = []
    for patch in patches:
        to_rows = [math.dist(patch, row) for row in rows]
        nearest = min(range(len(rows)), key=to_rows.__getitem__)
        found.append((patch, nearest, to_rows[nearest]))
    return max(found, key=lambda entry: entry[2])


def nearest_rows(row: int, rows: Rows, count: int) -> Rows:
    """The ``count`` rows nearest to a row, itself included."""
    order = sorted(range(len(rows)), key=lambda other: math.dist(rows[row], rows[other]))
    return [rows[other] for other in order[:count]]


def paper(patches: Rows, rows: Rows) -> float:
    """s = (1 - exp ||m_test - m*|| / sum over m in N_9(m*) of exp ||m_test - m||) ||m_test - m*||."""
    patch, row, distance = farthest_patch(patches, rows)
    total = sum(math.exp(math.dist(patch, m)) for m in nearest_rows(row, rows, 9))
    return (1 - math.exp(distance) / total) * distance


def official(patches: Rows, rows: Rows) -> float:
    """Largest squared distance, as faiss gives it."""
    return max(min(math.dist(patch, row) ** 2 for row in rows) for patch in patches)


def anomalib(patches: Rows, rows: Rows) -> float:
    """(1 - softmax(distances to 9 neighbours))[0] times the largest distance."""
    patch, row, distance = farthest_patch(patches, rows)
    to_support = torch.tensor(
        [math.dist(patch, m) for m in nearest_rows(row, rows, 9)], dtype=torch.float64
    )
    return float((1 - to_support.softmax(0))[0] * distance)


def m3dm(patches: Rows, rows: Rows) -> float:
    """Of the 3 nearest rows of m* the first, itself, is left out; exponents over sqrt(D)."""
    patch, row, distance = farthest_patch(patches, rows)
    scale = math.sqrt(len(patch))
    near = nearest_rows(row, rows, 3)[1:]
    total = sum(math.exp(math.dist(patch, m) / scale) for m in near)
    return (1 - math.exp(distance / scale) / total) * distance


def cosine_distance(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - product / (math.hypot(*a) * math.hypot(*b))


def anomalydino(patches: Rows, rows: Rows) -> float:
    """Mean of the top 1 % of the cosine distances."""
    distances = [min(cosine_distance(patch, row) for row in rows) for patch in patches]
    top = sorted(distances, reverse=True)[: max(1, int(len(distances) * 0.01))]
    return sum(top) / len(top)


FORMULAS: dict[ScoringName, Callable[[Rows, Rows], float]] = {
    "paper": paper,
    "official": official,
    "anomalib": anomalib,
    "m3dm": m3dm,
    "anomalydino": anomalydino,
}


def image_scores(name: ScoringName, patches: Tensor, rows: Tensor) -> Tensor:
    """Scores of images (B, P, D), by the module under test."""
    if SCORINGS[name].unit_length:
        patches, rows = functional.normalize(patches, dim=-1), functional.normalize(rows, dim=-1)
    bank = MemoryBank(rows)
    found = bank.search(patches.flatten(0, 1))
    shape = patches.shape[:2]
    return SCORINGS[name].image_scores(
        found.distances.view(shape), found.indices.view(shape), patches, bank
    )


def assert_formula(
    name: ScoringName, patches: Tensor, rows: Tensor, tolerance: float = 2e-6
) -> None:
    scores = image_scores(name, patches, rows)
    assert scores.dtype == torch.float32
    expected = [FORMULAS[name](image, rows.tolist()) for image in patches.tolist()]
    assert scores.tolist() == pytest.approx(expected, rel=tolerance)


def test_every_definition_is_tested() -> None:
    assert set(SCORINGS) == set(NAMES) == set(FORMULAS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 1, 20, 4), (2, 64, 150, 7), (1, 333, 31, 16)], ids=str)
def test_the_image_score_is_the_published_one(
    name: ScoringName, shape: tuple[int, int, int, int]
) -> None:
    num_images, num_patches, num_rows, dim = shape
    for scale in (0.1, 1.0, 3.0):
        patches, rows = torch.randn(num_images, num_patches, dim), torch.randn(num_rows, dim)
        assert_formula(name, scale * patches, scale * rows)


# Three rows at the corners of a triangle with sides 3, 4 and 5. Of the patches, (6, -4) is the
# farthest from its nearest row: 5 from (3, 0), sqrt(52) from (0, 0) and 10 from (0, 4).
TRIANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
PATCHES = torch.tensor([[0.0, -1.0], [6.0, -4.0], [3.0, 2.0]])
GOLDEN: dict[ScoringName, float] = {
    "paper": 4.968462,  # 5 (1 - 1 / (1 + e^(sqrt 52 - 5) + e^5))
    "official": 25.0,
    "anomalib": 4.968462,
    "m3dm": 4.872086,  # 5 (1 - 1 / (e^((sqrt 52 - 5) / sqrt 2) + e^(5 / sqrt 2)))
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_triangle_gives_the_scores_worked_out_on_paper(name: ScoringName) -> None:
    score = image_scores(name, PATCHES[None], TRIANGLE)
    assert score.tolist() == pytest.approx([GOLDEN[name]], abs=1e-6)
    assert FORMULAS[name](PATCHES.tolist(), TRIANGLE.tolist()) == pytest.approx(GOLDEN[name], 1e-6)


def test_anomalydino_averages_the_highest_hundredth_of_the_cosine_distances() -> None:
    rows = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    patches = torch.tensor([[3.0, 0.0]]).repeat(250, 1)
    patches[17] = torch.tensor([-4.0, 0.0])  # 1 from (0, 5), and 2 from (2, 0)
    patches[200] = torch.tensor([0.6, 0.8])  # 0.2 from (0, 5)
    patches[249] = torch.tensor([0.8, 0.6])  # 0.2 from (2, 0)
    assert image_scores("anomalydino", patches[None], rows).tolist() == pytest.approx([0.6])
    few = patches[None, 150:249]
    assert image_scores("anomalydino", few, rows).tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("paper", 3.0), ("official", 9.0), ("anomalib", 3.0), ("m3dm", 3.0), ("anomalydino", 4.5)],
)
def test_patch_scores_are_in_the_unit_of_the_definition(name: ScoringName, expected: float) -> None:
    scores = SCORINGS[name].patch_scores(torch.tensor([[0.0, 3.0]]))
    assert scores.tolist() == [[0.0, expected]]


@pytest.mark.parametrize("name", REWEIGHTED)
@pytest.mark.parametrize("distance", [100.0, 400.0, 600.0])
def test_large_distances_do_not_overflow(name: ScoringName, distance: float) -> None:
    # Beyond exp(88) float32 overflows, beyond exp(709) the formula in float64 does too.
    rows, patches = torch.randn(40, 8), torch.randn(2, 5, 8) + distance / math.sqrt(8)
    assert_formula(name, patches, rows, 1e-5)
    spread = 20 * torch.randn(40, 8)
    assert_formula(name, patches, spread, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_huge_distances_give_finite_scores(name: ScoringName) -> None:
    scores = image_scores(name, 1e6 * torch.randn(3, 50, 8), 1e6 * torch.randn(40, 8))
    assert scores.isfinite().all()
    assert (scores > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 10])
def test_there_may_be_fewer_rows_than_neighbours(name: ScoringName, num_rows: int) -> None:
    patches, rows = torch.randn(4, 30, 5), torch.randn(num_rows, 5)
    if name == "m3dm" and num_rows == 1:  # no other row: the formula divides by an empty sum
        assert image_scores(name, patches, rows).tolist() == [0.0] * 4
    else:
        assert_formula(name, patches, rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_there_twice_count_twice(name: ScoringName) -> None:
    rows = torch.randn(20, 5).repeat(2, 1)
    assert_formula(name, torch.randn(3, 30, 5), rows)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_nothing_but_stored_patches_scores_zero(name: ScoringName) -> None:
    rows = torch.randn(50, 5)
    assert image_scores(name, rows[None, 10:40], rows).tolist() == [0.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_other_images_of_a_batch_do_not_matter(name: ScoringName) -> None:
    patches, rows = torch.randn(7, 120, 9), torch.randn(60, 9)
    together = image_scores(name, patches, rows)
    alone = torch.cat([image_scores(name, image[None], rows) for image in patches])
    assert torch.equal(together, alone)


# Patches and pixels; the Gaussian reaches 16 pixels to either side, wider than some of the maps.
MAPS = (
    ((28, 28), (224, 224)),
    ((6, 11), (50, 90)),
    ((3, 5), (24, 7)),
    ((2, 9), (3, 64)),
    ((1, 1), (7, 5)),
    ((1, 4), (1, 40)),
    ((5, 4), (5, 4)),
    ((16, 20), (8, 10)),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("grid", "size"), MAPS, ids=str)
def test_pixel_maps_are_interpolated_and_then_smoothed(
    name: ScoringName, grid: tuple[int, int], size: tuple[int, int]
) -> None:
    scores = torch.rand(3, *grid) * 100
    found = SCORINGS[name].pixel_maps(scores, size)
    assert found.shape == (3, *size)
    assert found.dtype == torch.float32
    mode = {"mode": "nearest"} if name == "anomalib" else {"mode": "bilinear"}
    options = mode if name == "anomalib" else {**mode, "align_corners": False}
    expected = []
    for image in scores.double():
        pixels = functional.interpolate(image[None, None], size, **options)[0, 0]
        expected.append(ndimage.gaussian_filter(pixels.numpy(), sigma=4))
    # A sum of positive terms, of at most 33 for each axis: an error of a few units in float32.
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equal_patch_scores_give_an_equal_map(name: ScoringName) -> None:
    for grid, size in MAPS:
        found = SCORINGS[name].pixel_maps(torch.full((2, *grid), 7.25), size)
        np.testing.assert_allclose(found.numpy(), np.full((2, *size), 7.25), rtol=1e-6)


def test_maps_keep_rows_and_columns_apart() -> None:
    scores = torch.zeros(1, 4, 9)
    scores[0, 3, 1] = 1.0
    peak = int(SCORINGS["paper"].pixel_maps(scores, (48, 180))[0].argmax())
    row, column = divmod(peak, 180)
    assert row >= 36
    assert 20 <= column < 40
