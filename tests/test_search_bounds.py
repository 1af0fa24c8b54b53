"""The proven error bound is what keeps the answers right: with half of it they go wrong."""

import pytest
import torch
from torch import Tensor

from pyfeat.search import METRICS
from tests.support import ENGINES, assert_exact_neighbours, kernel_knn

COARSE = [engine for engine in ENGINES if engine[1] != "float32"]
DIM = 256
NUM_QUERIES = 8  # fewer are not worth a tile


def rounded_all_one_way(precision: str, largest: float) -> Tensor:
    """(D,) that loses half a step of ``precision`` in nearly every feature, always downwards."""
    if precision == "bf16":
        return torch.full((DIM,), 1.0 + 2.0**-8)  # halfway; ties go to the even 1.0
    q = torch.full((DIM,), largest // 2 + 0.499)
    q[0] = largest  # the unit is 1
    return q


def adversarial(precision: str, largest: float) -> tuple[Tensor, Tensor]:
    """Queries q, all alike, and a memory in which a row just short of 2 q is nearer than the origin.

    2 q loses as much as q does, in the same direction, so its score is off by all of the bound.
    That the memory is its own mirror image keeps the mean at 0 and the scale a power of two.
    """
    q = rounded_all_one_way(precision, largest)
    near = 2 * q * (1 - 2.0**-12)
    memory = torch.cat([torch.zeros(40, DIM), near[None], -near[None]])
    return q.repeat(NUM_QUERIES, 1), memory


@pytest.mark.parametrize(("isa", "precision"), COARSE)
def test_half_of_the_bound_gives_wrong_neighbours(isa: str, precision: str) -> None:
    wrong = 0
    for largest in (127.0, 63.0):  # how far whole numbers go in queries of this instruction set
        queries, memory = adversarial(precision, largest)
        whole = kernel_knn(queries, memory, 1, "euclidean", isa=isa, precision=precision)
        assert whole[1].tolist() == [[40]] * NUM_QUERIES
        half = kernel_knn(
            queries, memory, 1, "euclidean", isa=isa, precision=precision, bound_scale=0.5
        )
        wrong += int(half[1].tolist() != [[40]] * NUM_QUERIES)
    assert wrong > 0


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
def test_rounding_of_the_tile_products_is_allowed_for(isa: str, precision: str) -> None:
    # Whole numbers with mean 0 are packed into float32 without loss; their products are around
    # 2^31, where float32 counts in steps of 256, and the rows' distances differ by less.
    row = torch.randint(-4000, 4000, (384,)).float()
    rows = row.repeat(300, 1) + torch.randint(-1, 2, (300, 384))
    memory = torch.cat([rows, -rows])
    queries = row + torch.randint(-9, 10, (100, 384))
    for metric in METRICS:
        found = kernel_knn(queries, memory, 1, metric, isa=isa, precision=precision)
        assert_exact_neighbours(found[0], found[1], queries, memory, 1, metric)
    found = kernel_knn(
        queries, memory, 1, "euclidean", isa=isa, precision=precision, bound_scale=0.0
    )
    with pytest.raises(AssertionError, match="not the nearest"):
        assert_exact_neighbours(found[0], found[1], queries, memory, 1, "euclidean")


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
def test_tight_clusters_far_apart_are_exact(isa: str, precision: str) -> None:
    # Within a cluster rows differ by less than int8 and bfloat16 resolve: whole clusters stay in.
    centres = torch.randn(8, 64) * 100
    memory = centres.repeat(200, 1) + 1e-3 * torch.randn(1600, 64)
    queries = centres.repeat(4, 1) + 1e-3 * torch.randn(32, 64)
    distances, indices, counters = kernel_knn(
        queries, memory, 3, "euclidean", isa=isa, precision=precision
    )
    assert_exact_neighbours(distances, indices, queries, memory, 3, "euclidean")
    assert counters[0] > 3 * 32


def test_a_query_that_the_bounds_do_not_help_is_searched_in_finer_tiles() -> None:
    # One cluster of 30,000 rows, narrower than int8 resolves and wider than float32 does.
    centre = torch.randn(64) * 10
    memory = torch.cat([centre + 0.1 * torch.randn(30_000, 64), torch.randn(20_000, 64) * 10])
    queries = centre + 0.1 * torch.randn(20, 64)
    distances, indices, (_, retried, exhaustive) = kernel_knn(
        queries, memory, 2, "euclidean", precision="int8"
    )
    assert_exact_neighbours(distances, indices, queries, memory, 2, "euclidean")
    assert retried == 20
    assert exhaustive == 0
