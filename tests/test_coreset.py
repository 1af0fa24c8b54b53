"""The k-centre greedy coreset against the float64 reference."""

import math
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from pyfeat._ops import search_cpu
from pyfeat.coreset import _largest_square, _project, cover
from tests.support import ENGINES

INFINITY = float("inf")
KINDS = ("plain", "shifted", "duplicated", "ties", "clustered", "groups")


def make_rows(kind: str, num_rows: int, dim: int) -> Tensor:
    """(rows, D) float32, multiples of 1/1024 below 2^10 apart.

    Their squared distances are exact in float64, whatever the order of the sum.
    """
    rows = torch.randn(num_rows, dim)
    if kind == "ties":
        rows = (rows * 2).round() / 2
    elif kind == "duplicated":
        rows = rows[torch.arange(num_rows) // 3]
    elif kind == "clustered":
        centers = 4 * torch.randn(60, dim)
        rows = centers[torch.randint(60, (num_rows,))] + 0.2 * rows
    elif kind == "groups":  # far apart: products of low precision do not tell their rows apart
        rows += 100.0 * (torch.arange(num_rows) % 3)[:, None]
    rows = (rows * 1024).round() / 1024
    return (rows * 16).round() / 16 + 1e6 if kind == "shifted" else rows


class Found:
    """What ``_C.FarthestSearch`` finds, in batches of the given sizes."""

    def __init__(
        self,
        rows: Tensor,
        batches: Sequence[int],
        *,
        start: int = -1,
        squared_distances: Tensor | None = None,
        threads: int = 2,
        isa: str = "",
        precision: str = "",
    ) -> None:
        size = sum(batches)
        self.picks = torch.full((size,), -7)
        self.squared_radii = torch.full((size,), float("nan"), dtype=torch.float64)
        initial = 0 if squared_distances is None else squared_distances.data_ptr()
        search = _C.FarthestSearch(as_matrix(rows), start, initial, isa, precision)
        done = 0
        for batch in batches:
            picks, radii = self.picks[done:].data_ptr(), self.squared_radii[done:].data_ptr()
            assert search.advance(batch, -1.0, picks, radii, threads) == batch
            done += batch
        self.distances, self.products, self.levels = search.counts

    def assert_equal(self, picks: Tensor, radius: float, rows: Tensor) -> None:
        """The picks and the last radius are as given, and every radius is that of the next pick."""
        assert torch.equal(self.picks, picks)
        assert math.sqrt(float(self.squared_radii[-1])) == radius
        between = reference.pairwise_distances(rows[picks], rows[picks], "sqeuclidean")  # [P, P]
        later = torch.ones_like(between, dtype=torch.bool).triu()
        nearest = between.masked_fill(later, INFINITY).min(dim=1).values
        assert torch.equal(self.squared_radii[:-1], nearest[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_rows", "dim", "size"),
    [(1, 3, 1), (33, 1, 33), (257, 31, 60), (3000, 2, 400), (6000, 24, 500), (9000, 5, 90)],
)
def test_picks_and_every_radius_equal_the_reference(
    kind: str, num_rows: int, dim: int, size: int
) -> None:
    rows = make_rows(kind, num_rows, dim)
    picks, radius = reference.greedy_coreset(rows, start=num_rows // 2, size=size)
    Found(rows, [size], start=num_rows // 2).assert_equal(picks, radius, rows)
    coreset = pyfeat.greedy_coreset(rows, size=size, start=num_rows // 2)
    assert torch.equal(coreset.indices, picks)
    assert coreset.radius == radius


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
@pytest.mark.parametrize("kind", ["ties", "clustered", "groups"])
def test_no_instruction_set_and_no_precision_changes_a_pick(
    kind: str, isa: str, precision: str
) -> None:
    rows = make_rows(kind, 5000, 33)
    expected = reference.greedy_coreset(rows, start=0, size=150)
    found = Found(rows, [150], start=0, isa=isa, precision=precision)
    found.assert_equal(*expected, rows)
    assert found.products > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_all_dtypes_of_features(dtype: torch.dtype) -> None:
    rows = (make_rows("clustered", 5000, 24) * 8).round() / 8
    rows = rows.to(dtype)
    picks, radius = reference.greedy_coreset(rows, start=3, size=200)
    found = pyfeat.greedy_coreset(rows, size=200, start=3)
    assert torch.equal(found.indices, picks)
    assert found.radius == radius
    wide = torch.zeros(5000, 50, dtype=dtype)
    wide[:, 1:49:2] = rows
    strided = pyfeat.greedy_coreset(wide[:, 1:49:2], size=200, start=3)
    assert torch.equal(strided.indices, picks)
    if dtype != torch.bfloat16:
        assert torch.equal(pyfeat.greedy_coreset(rows.numpy(), size=200, start=3).indices, picks)


def test_every_row_is_picked_once_in_the_end() -> None:
    for kind in ("plain", "ties", "duplicated"):
        rows = make_rows(kind, 2500, 3)
        picks, radius = reference.greedy_coreset(rows, start=9, size=2500)
        Found(rows, [2500], start=9).assert_equal(picks, radius, rows)
        assert len(set(picks.tolist())) == 2500


def test_equal_rows_are_picked_in_order() -> None:
    for shape in [(3000, 4), (3000, 0)]:
        found = pyfeat.greedy_coreset(torch.ones(shape), size=3000, start=20)
        assert found.indices.tolist() == [20, *range(20), *range(21, 3000)]
        assert found.radius == 0.0


@pytest.mark.parametrize("kind", ["ties", "clustered"])
def test_neither_threads_nor_batches_change_the_picks(kind: str) -> None:
    rows = make_rows(kind, 7000, 20)
    whole = Found(rows, [300], start=1, threads=1)
    for batches, threads in [([300], 2), ([300], 5), ([1] * 300, 2), ([1, 17, 40, 2, 240], 3)]:
        found = Found(rows, batches, start=1, threads=threads)
        assert torch.equal(found.picks, whole.picks)
        assert torch.equal(found.squared_radii, whole.squared_radii)


def test_radii_have_the_bits_of_an_exact_search_for_the_nearest_pick() -> None:
    rows = torch.randn(20_000, 37)
    found = Found(rows, [400], start=0)
    for size in (1, 2, 10, 77, 200, 400):
        memory = rows[found.picks[:size]]
        nearest = search_cpu(rows, memory, 1, "sqeuclidean", distance_dtype=torch.float64)[0]
        assert float(nearest.max()) == float(found.squared_radii[size - 1])


def test_most_rows_miss_most_picks() -> None:
    rows = make_rows("clustered", 12_000, 16)
    size = 600
    found = Found(rows, [size], start=0)
    found.assert_equal(*reference.greedy_coreset(rows, start=0, size=size), rows)
    assert found.levels > 5
    assert found.distances < 0.2 * size * len(rows)
    assert found.products < 0.9 * size * len(rows)


def test_rows_that_have_missed_thousands_of_picks_see_them_all() -> None:
    grid = torch.arange(20_000)[:, None] / 16
    offsets = torch.tensor([0.0, 2.0**-7, 2.0**-8]).repeat(500)
    rows = torch.cat([grid[:1500] + offsets[:, None], grid])
    squared = torch.full((21_500,), INFINITY, dtype=torch.float64)
    squared[:1500] = 2.0**-12  # dormant until nearly all of the grid is picked
    found = Found(rows, [21_500], squared_distances=squared)
    assert sorted(found.picks[:20_000].tolist()) == list(range(1500, 21_500))
    assert torch.equal(found.picks[20_000:], offsets.sort(stable=True, descending=True).indices)
    tail = offsets.double().square().sort(descending=True).values
    assert torch.equal(found.squared_radii[19_999:-1], tail)


def test_products_too_coarse_for_the_features_are_given_up() -> None:
    rows = make_rows("groups", 20_000, 32)
    found = Found(rows, [300], start=0, precision="int8")
    finest = Found(rows, [300], start=0, precision="float32")
    assert torch.equal(found.picks, finest.picks)
    assert found.distances < 2 * finest.distances


def test_a_change_of_the_floating_point_mode_changes_no_pick() -> None:
    rows = 1e-40 * make_rows("clustered", 3000, 8)  # float32 below the normal numbers
    picks = reference.greedy_coreset(rows, start=0, size=50)[0]
    torch.set_flush_denormal(True)
    try:
        found = Found(rows, [50], start=0)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.picks, picks)


@pytest.mark.skipif(sys.platform == "win32", reason="has no timer signal")
def test_an_interrupted_search_is_not_continued() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    rows = torch.randn(100_000, 64)
    search = _C.FarthestSearch(as_matrix(rows), 0)
    picks = torch.empty(50_000, dtype=torch.int64)
    squared_radii = torch.empty(50_000, dtype=torch.float64)
    wanted = (50_000, -1.0, picks.data_ptr(), squared_radii.data_ptr(), 2)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            search.advance(*wanted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ValueError, match="a search that has thrown must not be continued"):
        search.advance(*wanted)


def test_coreset_radius_covers_every_row() -> None:
    features = torch.randn(2000, 8)
    found = pyfeat.greedy_coreset(features, radius=2.5, seed=3)
    distances = pyfeat.knn(features, features[found.indices]).distances
    assert found.radius <= 2.5
    assert float(distances.max()) == pytest.approx(found.radius, rel=1e-6)
    one_less = pyfeat.greedy_coreset(features, size=len(found.indices) - 1, seed=3)
    assert one_less.radius > 2.5
    assert len(pyfeat.greedy_coreset(features, radius=found.radius, seed=3).indices) == len(
        found.indices
    )
    nearly = math.nextafter(found.radius, 0.0)
    assert len(pyfeat.greedy_coreset(features, radius=nearly, seed=3).indices) > len(found.indices)


def test_a_radius_is_squared_without_loss() -> None:
    radii = [0.0, 1e-200, 1e-162, 0.1, 1 / 3, 1.0, math.pi, 1e10, 1e160]
    for radius in [*radii, *torch.rand(300, dtype=torch.float64).tolist()]:
        square = _largest_square(radius)
        assert math.sqrt(square) <= radius
        assert math.sqrt(math.nextafter(square, INFINITY)) > radius


def test_coreset_is_the_same_for_a_seed_and_any_thread_count() -> None:
    features = torch.randn(9000, 12)
    first = pyfeat.greedy_coreset(features, ratio=0.01, seed=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = pyfeat.greedy_coreset(features, ratio=0.01, seed=5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.indices, again.indices)
    assert len(first.indices) == 90
    other = pyfeat.greedy_coreset(features, ratio=0.01, seed=6)
    assert other.indices[0] != first.indices[0]


def test_a_projection_is_picked_in_and_its_radius_is_that_of_the_features() -> None:
    features = make_rows("clustered", 3000, 200) + 512.0
    found = pyfeat.greedy_coreset(features, size=100, start=5, projection=32, seed=1)
    projected = _project(features, 32, seed=1)
    assert projected.shape == (3000, 32)
    assert projected.dtype == torch.float32
    assert torch.equal(found.indices, reference.greedy_coreset(projected, start=5, size=100)[0])
    distances = reference.pairwise_distances(features, features[found.indices], "euclidean")
    assert found.radius == float(distances.min(dim=1).values.max())
    in_full = pyfeat.greedy_coreset(features, size=100, start=5)
    assert found.radius < 1.3 * in_full.radius
    assert not torch.equal(found.indices, in_full.indices)
    for wider in (200, 500):
        same = pyfeat.greedy_coreset(features, size=100, start=5, projection=wider)
        assert torch.equal(same.indices, in_full.indices)
        assert same.radius == in_full.radius


def test_a_projection_keeps_distances_far_from_zero() -> None:
    features = make_rows("shifted", 400, 300).double()  # multiples of 1/16: a shift loses nothing
    near, far = _project(features - 1e6, 128, seed=0), _project(features + 1e6, 128, seed=0)
    assert torch.equal(near, far)
    ratio = torch.pdist(far) / torch.pdist(features)
    assert 0.95 < float(ratio.mean()) < 1.05
    assert float(ratio.std()) == pytest.approx((2 * 128) ** -0.5, rel=0.3)
    assert _project(features.half(), 128, seed=0).dtype == torch.float32
    assert not torch.equal(_project(features, 128, seed=1), far)


@pytest.mark.parametrize("kind", KINDS)
def test_cover_picks_the_rows_that_are_far_from_what_was_there(kind: str) -> None:
    both = make_rows(kind, 3000, 6)
    rows, bank = both[:2600], both[2600:]
    squared = reference.pairwise_distances(rows, bank[:20], "sqeuclidean").min(dim=1).values
    for radius in (0.0, 1.0, 3.0):
        picks = cover(rows, squared, radius)
        far = bool((squared.sqrt() > radius).any())
        expected = torch.empty(0, dtype=torch.int64)
        if far:
            expected = reference.greedy_coreset(
                rows, size=2600, squared_distances=squared, radius=radius
            )[0]
        assert torch.equal(picks, expected)


def test_cover_without_anything_there_begins_with_the_first_row() -> None:
    rows = make_rows("ties", 2000, 4)
    nowhere = torch.full((2000,), INFINITY, dtype=torch.float64)
    picks = cover(rows, nowhere, 2.0)
    assert picks[0] == 0
    assert torch.equal(picks, reference.greedy_coreset(rows, start=0, size=2000, radius=2.0)[0])
    assert len(cover(rows[:0], nowhere[:0], 1.0)) == 0


def test_rows_beyond_the_reach_of_tiles_catch_up_too() -> None:
    far = torch.tensor([1e15, 0.0]) + torch.arange(300)[:, None] * torch.tensor([0.0, 2.0**-8])
    grid = torch.arange(18_000)[:, None] / torch.tensor([16.0, INFINITY])
    grid[1] = far[0]  # the second pick; what 8,192 picks are packed for is learnt from every other
    rows = torch.cat([grid, far])
    squared = torch.full((18_300,), 2.0**-9, dtype=torch.float64)  # nearer than the grid is wide
    squared[18_000:] = 2.0**-12  # dormant until most of the grid is picked
    found = Found(rows, [18_300], squared_distances=squared)
    assert found.picks[:18_000].tolist() == list(range(18_000))
    left = torch.minimum(squared[18_000:], (far - far[0]).double().square().sum(dim=1))
    tail, _ = reference.greedy_coreset(far, size=300, squared_distances=left)
    assert torch.equal(found.picks[18_000:], 18_000 + tail)


@pytest.mark.parametrize(
    ("match", "squared"),
    [
        (r"must be float64 of shape \(3,\), got float32 of \(3,\)", torch.zeros(3)),
        (r"must be float64 of shape \(3,\), got float64 of \(2,\)", torch.zeros(2).double()),
        (
            r"must be at least 0, got negative values or NaN",
            torch.tensor([0.0, -1.0, 2.0]).double(),
        ),
        (
            r"must be at least 0, got negative values or NaN",
            torch.tensor([0, 0, math.nan]).double(),
        ),
    ],
)
def test_bad_distances_to_cover_from_are_named(match: str, squared: Tensor) -> None:
    with pytest.raises(ValueError, match="cover: squared_distances " + match):
        cover(torch.randn(3, 2), squared, 1.0)


def test_a_bad_radius_to_cover_is_named() -> None:
    for radius in (-1.0, INFINITY, math.nan):
        with pytest.raises(ValueError, match="cover: radius must be finite and at least 0"):
            cover(torch.randn(3, 2), torch.ones(3).double(), radius)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        (r"exactly one of size, ratio and radius must be given", {}),
        (r"exactly one of size, ratio and radius", {"size": 3, "ratio": 0.5}),
        (r"size must be in \[1, N = 10\], got 0", {"size": 0}),
        (r"size must be in \[1, N = 10\], got 11", {"size": 11}),
        (r"ratio must be in \(0, 1\], got 0.0", {"ratio": 0.0}),
        (r"radius must be finite and at least 0, got nan", {"radius": float("nan")}),
        (r"start must be in \[0, 10\), got 10", {"size": 2, "start": 10}),
        (r"projection must be at least 1, got 0", {"size": 2, "projection": 0}),
        (r"projection must be None with radius, got 1", {"radius": 2.0, "projection": 1}),
    ],
)
def test_bad_coreset_arguments_are_named(match: str, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greedy_coreset: " + match):
        pyfeat.greedy_coreset(torch.randn(10, 2), **arguments)  # type: ignore[arg-type]


def test_a_coreset_of_nothing_or_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="features must have at least one row"):
        pyfeat.greedy_coreset(torch.empty(0, 3), size=1)
    with pytest.raises(ValueError, match=r"greedy_coreset: features must be finite.*row 1"):
        pyfeat.greedy_coreset(torch.tensor([[0.0], [float("nan")]]), size=1)
    with pytest.raises(TypeError, match=r"features must be float32 or float64 .* got int64"):
        pyfeat.greedy_coreset(torch.zeros(3, 3, dtype=torch.int64), size=1)
