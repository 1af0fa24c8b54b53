"""Precision: the search by instruction set and number format of its tiles.

Data, peers and rates as in the family Search; the answers are the same in every format.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.answers import NeighbourCheck, check_product
from benchmarks.data import normal_features
from benchmarks.harness import Harness, Shape
from benchmarks.kernels import forced_search, pack, variants
from benchmarks.peers import SEARCH_PACKAGES, peer_contenders
from benchmarks.timing import Contender, Work

PACKAGES = SEARCH_PACKAGES
WIDE = Shape(12_544, 65_536, 384)
PRODUCT_BYTES = 1e9  # of the product that a peer writes at a time


@pytest.mark.sizes("shape", full=[Shape(784, 16_384, 1_536), WIDE], quick=[Shape(8, 64, 16)])
def test_float32(harness: Harness, shape: Shape) -> None:
    """Tiles in float32.

    What machines run that multiply no shorter format.
    """
    queries, memory = _features(shape)
    packed = pack(memory, precision="float32")
    ours = {
        "pyfeat float32, packed": partial(
            forced_search, queries, memory, shape.k, precision="float32", packed=packed
        ),
        "pyfeat float32": partial(forced_search, queries, memory, shape.k, precision="float32"),
    }
    work = Work(shape.operations, "float32")
    contenders = [Contender(name, run, ours=True, work=work) for name, run in ours.items()]
    peers, skipped = peer_contenders(queries, memory, shape.k, reads=False)
    check = NeighbourCheck(queries, memory, shape.k, exact=ours)
    harness.race(shape, contenders + peers, check=check, skipped=skipped)


@pytest.mark.sizes("shape", full=[WIDE], quick=[Shape(8, 64, 16)])
def test_every_precision(harness: Harness, shape: Shape) -> None:
    """Every instruction set and precision.

    Nothing beforehand. The last is what `pyfeat.knn` runs on this machine.
    """
    queries, memory = _features(shape)
    contenders = [
        Contender(
            f"{isa} {precision}",
            partial(forced_search, queries, memory, shape.k, isa, precision),
            ours=True,
            work=Work(shape.operations, precision),
        )
        for isa, precision in variants()
    ]
    check = NeighbourCheck(queries, memory, shape.k, exact=[each.name for each in contenders])
    peers, _ = peer_contenders(queries, memory, shape.k, ["faiss"], reads=False)
    harness.race(shape, contenders + peers, check=check)


@pytest.mark.sizes("shape", full=[WIDE], quick=[Shape(8, 64, 16)])
def test_tile_rate(harness: Harness, shape: Shape) -> None:
    """The whole search against the bare product.

    pyfeat: the search with its selection and its ranking in float64, the memory packed beforehand.
    torch: only the products, `torch.mm` of bfloat16 and `torch._int_mm` of int8 (oneDNN), written to
    memory in parts of up to 1 GB; the operands are converted beforehand.
    """
    queries, memory = _features(shape)
    ours = []
    for precision in ("bf16", "int8"):
        isas = [isa for isa, found in variants() if found == precision]
        if isas:
            packed = pack(memory, isas[-1], precision)
            run = partial(forced_search, queries, memory, shape.k, isas[-1], precision, packed)
            work = Work(shape.operations, precision)
            ours.append(Contender(f"pyfeat {precision}, packed", run, ours=True, work=work))
    neighbours = NeighbourCheck(queries, memory, shape.k, exact=[each.name for each in ours])

    left, right = queries.bfloat16(), memory.bfloat16()
    small_left, small_right = _as_int8(queries), _as_int8(memory)
    operands = {
        "torch.mm bfloat16": (left, right, 2.0**-8),  # of 8 bits
        "torch._int_mm int8": (small_left, small_right, 0.0),
    }

    def check(name: str, answer: object) -> None:
        if name not in operands:
            neighbours(name, answer)
            return
        a, b, slack = operands[name]
        product = torch.as_tensor(answer)
        check_product(name, product, a[len(a) - len(product) :], b, slack)

    peers = [
        Contender(
            "torch.mm bfloat16",
            _products(torch.mm, left, right, torch.bfloat16),
            work=Work(shape.operations, "bf16"),
        ),
        Contender(
            "torch._int_mm int8",
            _products(torch._int_mm, small_left, small_right, torch.int32),
            work=Work(shape.operations, "int8"),
        ),
    ]
    harness.race(shape, ours + peers, check=check)


def _features(shape: Shape) -> tuple[Tensor, Tensor]:
    """Queries and memory, as those of the other searches."""
    queries = normal_features(shape.num_queries, shape.dim, seed=1)
    return queries, normal_features(shape.num_rows, shape.dim, seed=0)


def _as_int8(features: Tensor) -> Tensor:
    return (features * (127 / features.abs().max())).round().to(torch.int8)


def _products(
    multiply: Callable[..., Tensor], left: Tensor, right: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """All of left (Q, D) by right (N, D), part by part; the last part is returned."""
    rows = max(1, int(PRODUCT_BYTES / dtype.itemsize / len(right)))
    parts = torch.split(left, rows)
    product = torch.empty(len(parts[0]), len(right), dtype=dtype)

    def multiply_all() -> Tensor:
        for part in parts:
            multiply(part, right.T, out=product[: len(part)])
        return product[: len(parts[-1])]

    return multiply_all
