"""The k-centre greedy coreset against the float64 reference."""

import pytest
import torch

import pyfeat
from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from tests.support import make_features


@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated"])
def test_coreset_picks_equal_the_reference(kind: str) -> None:
    for num_rows, dim in [(1, 3), (33, 1), (257, 31), (3000, 40)]:
        features = make_features(kind, 1, num_rows, dim)[1]
        size = min(num_rows, 60)
        found = pyfeat.greedy_coreset(features, size=size, start=num_rows // 2)
        picks, radius = reference.greedy_coreset(features, start=num_rows // 2, size=size)
        assert torch.equal(found.indices, picks)
        assert found.radius == radius


@pytest.mark.parametrize("spread", [1e-3, 0.2, 1.0])
@pytest.mark.parametrize("dim", [1, 2, 24])
def test_rows_near_their_own_pick_are_passed_over_without_harm(spread: float, dim: int) -> None:
    centers = torch.randn(30, dim).repeat(100, 1)
    features = ((centers + spread * torch.randn(3000, dim)) * 64).round() / 64  # many exact ties
    size = 200
    squared = torch.full((3000,), float("inf"), dtype=torch.float64)
    owners = torch.zeros(3000, dtype=torch.int32)
    picks, radii = torch.full((size,), 7), torch.zeros(size, dtype=torch.float64)
    done, _, num_distances = _C.farthest_cpu(
        as_matrix(features),
        squared.data_ptr(),
        owners.data_ptr(),
        picks.data_ptr(),
        radii.data_ptr(),
        0,
        size,
        -1.0,
        2,
    )
    assert done == size
    expected, radius = reference.greedy_coreset(features, start=7, size=size)
    assert torch.equal(picks, expected)
    assert float(radii[-1]) ** 0.5 == radius
    nearest = reference.knn(features, features[picks], 1, "sqeuclidean")[0][:, 0]
    assert torch.equal(squared.clamp_min(0).float(), nearest)
    if spread < 1.0:
        assert num_distances < 0.4 * size * 3000


def test_coreset_radius_covers_every_row() -> None:
    features = torch.randn(2000, 8)
    found = pyfeat.greedy_coreset(features, radius=2.5, seed=3)
    distances = pyfeat.knn(features, features[found.indices]).distances
    assert found.radius <= 2.5
    assert float(distances.max()) == pytest.approx(found.radius, rel=1e-6)
    one_less = pyfeat.greedy_coreset(features, size=len(found.indices) - 1, seed=3)
    assert one_less.radius > 2.5


def test_coreset_of_equal_rows_picks_each_once() -> None:
    found = pyfeat.greedy_coreset(torch.ones(50, 4), size=50, start=20)
    assert sorted(found.indices.tolist()) == list(range(50))
    assert found.radius == 0.0


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
