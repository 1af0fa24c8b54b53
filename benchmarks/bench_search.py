"""Search: exact nearest neighbours of float32 features.

A case Q × N × D has Q queries in a memory of N rows of width D, standard normal (seeds 1 and 0). The
peers are faiss `IndexFlatL2`; torch `cdist` by matrix product and `topk`, over chunks of 1,024 queries;
scikit-learn `NearestNeighbors(algorithm="brute")`, which multiplies in float64; and usearch
`search(exact=True)`. What they build from the memory is built before the clock starts. A rate counts
2 Q N D operations; of peak is relative to the format that is multiplied.
"""

from collections.abc import Mapping

import pytest

from benchmarks.answers import NeighbourCheck
from benchmarks.data import normal_features
from benchmarks.harness import Harness, Shape
from benchmarks.kernels import BYTES, default_precision
from benchmarks.memory import in_fresh_process
from benchmarks.peers import (
    PEERS,
    SEARCH_PACKAGES,
    Prepare,
    extra_memory_mb,
    peer_contenders,
    prepare_bank,
    prepare_knn,
)
from benchmarks.records import Point
from benchmarks.timing import Contender, Work

PACKAGES = SEARCH_PACKAGES
WIDE = Shape(12_544, 65_536, 384)
SWEEP_PEERS = ("faiss", "torch", "sklearn")


@pytest.mark.sizes(
    "shape",
    full=[Shape(784, 16_384, 1_536, 1), Shape(784, 16_384, 1_536, 9)],
    quick=[Shape(8, 64, 16, 3)],
)
def test_packed_memory(harness: Harness, shape: Shape) -> None:
    """One image, the memory packed beforehand.

    `MemoryBank.search`, after a first search has packed the memory.
    """
    compare(harness, shape, {"pyfeat, packed": prepare_bank})


@pytest.mark.sizes("shape", full=[WIDE], quick=[Shape(8, 64, 16)])
def test_many_queries(harness: Harness, shape: Shape) -> None:
    """Many queries, nothing beforehand.

    `pyfeat.knn`, which packs the memory within the time.
    """
    compare(harness, shape, {"pyfeat": prepare_knn})


@pytest.mark.sizes("shape", full=[Shape(4_096, 262_144, 128, 10)], quick=[Shape(8, 64, 16, 10)])
def test_large_memory(harness: Harness, shape: Shape) -> None:
    """A large memory, ten neighbours, nothing beforehand.

    `pyfeat.knn`.
    """
    compare(harness, shape, {"pyfeat": prepare_knn})


@pytest.mark.sizes(
    "shape",
    full=[Shape(queries, 1_000_000, 128, 10) for queries in (1, 2, 4, 8)],
    quick=[Shape(1, 64, 16, 10)],
)
def test_few_queries(harness: Harness, shape: Shape) -> None:
    """Few queries in a million rows.

    Reading the memory bounds these, so the rate is that of the bytes of the memory: four a value, and
    of the packed memory as many as its precision has.
    """
    ours = {"pyfeat, packed": prepare_bank, "pyfeat": prepare_knn}
    compare(harness, shape, ours, reads=True)


@pytest.mark.sizes("num_rows", full=[4_096 << i for i in range(7)], quick=[64, 128])
def test_rows(harness: Harness, num_rows: int, quick: bool) -> None:
    """Time against the rows of the memory.

    784 queries, 384 wide, k 1.
    """
    shape = Shape(8, num_rows, 16) if quick else Shape(784, num_rows, 384)
    sweep(harness, shape, Point("rows", "rows of the memory, N", num_rows))


@pytest.mark.sizes("dim", full=[32 << i for i in range(7)], quick=[8, 16])
def test_width(harness: Harness, dim: int, quick: bool) -> None:
    """Time against the width of the features.

    784 queries, 16,384 rows, k 1.
    """
    shape = Shape(8, 64, dim) if quick else Shape(784, 16_384, dim)
    sweep(harness, shape, Point("width", "width of the features, D", dim))


@pytest.mark.sizes("k", full=[1 << i for i in range(9)], quick=[1, 4])
def test_neighbours(harness: Harness, k: int, quick: bool) -> None:
    """Time against the number of neighbours.

    784 queries, 16,384 rows, 384 wide.
    """
    shape = Shape(8, 64, 16, k) if quick else Shape(784, 16_384, 384, k)
    sweep(harness, shape, Point("neighbours", "neighbours of each query, k", k))


@pytest.mark.sizes("shape", full=[WIDE, Shape(200_000, 20_000, 128)], quick=[Shape(64, 128, 16)])
def test_extra_memory(harness: Harness, shape: Shape, quick: bool) -> None:
    """Extra memory.

    Growth of the peak resident memory beyond queries and memory, each in a process of its own: the
    result, what a search works in, and what is built from the memory (faiss copies it).
    """
    names = ["pyfeat"] if quick else ["pyfeat", *SWEEP_PEERS]
    values = {name: in_fresh_process(extra_memory_mb, name, shape) for name in names}
    harness.values(shape, values, unit="MB")


def compare(
    harness: Harness,
    shape: Shape,
    ours: Mapping[str, Prepare],
    peers: tuple[str, ...] = tuple(PEERS),
    *,
    reads: bool = False,
    point: Point | None = None,
) -> None:
    """Ways of pyfeat to search against the peers."""
    memory = normal_features(shape.num_rows, shape.dim, seed=0)
    queries = normal_features(shape.num_queries, shape.dim, seed=1)
    precision = default_precision(memory)
    contenders = []
    for name, prepare in ours.items():
        work = Work(shape.operations, precision)
        if reads:
            stored = BYTES[precision] if prepare is prepare_bank else BYTES["float32"]
            work = Work(float(stored) * memory.numel(), "read")
        run = prepare(queries, memory, shape.k)
        contenders.append(Contender(name, run, ours=True, work=work))
    others, skipped = peer_contenders(queries, memory, shape.k, peers, reads=reads)
    check = NeighbourCheck(queries, memory, shape.k, exact=ours)
    harness.race(shape, contenders + others, check=check, skipped=skipped, point=point)


def sweep(harness: Harness, shape: Shape, point: Point) -> None:
    """One point of a plot."""
    ours = {"pyfeat, packed": prepare_bank, "pyfeat": prepare_knn}
    compare(harness, shape, ours, SWEEP_PEERS, point=point)
