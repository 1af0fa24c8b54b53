"""The comparisons must fail when they should."""

import pytest
import torch

from pyfeat import reference
from tests.support import assert_exact_neighbours


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, memory = torch.randn(5, 8), torch.randn(40, 8)
    memory[30] = memory[7]
    queries[0] = memory[7] + 0.001
    distances, indices = reference.knn(queries, memory, 3, "euclidean")
    return queries, memory, distances, indices


def test_the_reference_passes() -> None:
    queries, memory, distances, indices = _case()
    assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")


def test_one_wrong_neighbour_is_seen() -> None:
    queries, memory, distances, indices = _case()
    indices[3, 1] = next(i for i in range(40) if i not in indices[3])
    with pytest.raises(AssertionError, match="not the nearest"):
        assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")


def test_a_tie_in_the_wrong_order_is_seen() -> None:
    queries, memory, distances, indices = _case()
    assert indices[0, :2].tolist() == [7, 30]
    indices[0, :2] = torch.tensor([30, 7])
    with pytest.raises(AssertionError, match="out of order"):
        assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")


def test_a_neighbour_given_twice_is_seen() -> None:
    queries, memory, distances, indices = _case()
    indices[0, 1] = 7
    with pytest.raises(AssertionError):
        assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")


def test_one_distance_that_is_one_unit_off_is_seen() -> None:
    queries, memory, distances, indices = _case()
    distances[4, 2] = torch.nextafter(distances[4, 2], torch.tensor(float("inf")))
    with pytest.raises(AssertionError, match="distance off"):
        assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")


def test_an_unwritten_distance_is_seen() -> None:
    queries, memory, distances, indices = _case()
    distances[2, 0] = float("nan")
    with pytest.raises(AssertionError):
        assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")
