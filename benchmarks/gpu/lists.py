"""How many rows a search has to rank, by the number format that it multiplies.

``python -m benchmarks.gpu.lists`` prints, on a CPU, for 128 queries among 65,536 rows: how many rows
the bounds on rounded products let into the list of a query (``csrc/cuda/similarity/shortlist.cuh``), how
many of them the least upper bound leaves to be ranked, and for how many queries the list is too short,
so that all rows are ranked. Rounding loses about as much of every feature; beside the spread of
products, which cancel, that grows like the square root of their number.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.search import search_features
from benchmarks.harness import Shape
from pyfeat._frame import choose_frame

CAPACITY = 2048  # of a list (search_state.hpp)
SAMPLING = 32  # one of so many rows gives the threshold
_UNIT = 2.0**-24


class Format(NamedTuple):
    """How rows (N, D) are rounded, and what products of D features lose, in units of float32."""

    rounded: Callable[[Tensor], Tensor]
    losses: Callable[[int], int]


def _whole(rows: Tensor) -> Tensor:
    """Whole numbers up to 127 times a unit of the row."""
    units = rows.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-126) / 127
    return (rows / units).round() * units


# Sums of bfloat16 products round with every term or two (bounds.hpp); those of whole numbers are exact up
# to 2^17 terms, and round once each for the conversion and two units.
FORMATS = {
    "bfloat16": Format(lambda rows: rows.bfloat16().to(rows.dtype), lambda dim: 4 * dim),
    "int8": Format(_whole, lambda dim: 4),
}


class Bounds(NamedTuple):
    """Of scores ``|x|^2 / 2 - q x``, the less the nearer; all [Q, N]."""

    lower: Tensor
    upper: Tensor


def bounds(queries: Tensor, memory: Tensor, name: str) -> Bounds:
    """By products of rounded features, about the mean of ``memory``.

    Args:
        queries: (Q, D) float32 or float64.
        memory: (N, D), the same dtype.
        name: Of one of FORMATS.
    """
    frame = choose_frame(memory, "euclidean")
    q, x = (((rows - frame.mean) * frame.scale).to(rows.dtype) for rows in (queries, memory))
    rounded, losses = FORMATS[name]
    q_rounded, x_rounded = rounded(q), rounded(x)
    lost = losses(q.shape[1]) * _UNIT
    norms = x.norm(dim=1)  # [N]
    reach = (x - x_rounded).norm(dim=1) + lost * norms  # [N]
    errors = torch.outer(q.norm(dim=1), reach)  # [Q, N]
    errors += torch.outer((q - q_rounded).norm(dim=1), norms)
    scores = norms.square() / 2 - q_rounded @ x_rounded.T
    return Bounds(scores - errors, scores + errors)


class Counts(NamedTuple):
    """Of the rows of each query, (Q,): those in its list, and those that are ranked."""

    listed: Tensor
    ranked: Tensor


def counts(queries: Tensor, memory: Tensor, name: str) -> Counts:
    """For the nearest row. The arguments are those of ``bounds``."""
    lower, upper = bounds(queries, memory, name)
    sampled = upper[:, ::SAMPLING].amin(dim=1, keepdim=True)
    least = upper.amin(dim=1, keepdim=True)
    return Counts((lower <= sampled).sum(dim=1), (lower <= least).sum(dim=1))


def main() -> None:
    """Prints a line for each kind of rows, number of features and format."""
    print(f"{'rows':>10} {'D':>6} {'format':>9} {'listed':>7} {'ranked':>7} {'too short':>10}")
    for kind, dim in [("normal", d) for d in (128, 256, 384, 768, 1_536)] + [("patch-like", 1_536)]:
        shape = Shape(128, 65_536, dim)
        features = search_features(shape, patch_like=kind == "patch-like")
        for name in FORMATS:
            listed, ranked = counts(*features, name)
            short = (listed > CAPACITY).double().mean()
            print(
                f"{kind:>10} {dim:>6,} {name:>9} {listed.double().mean():>7.0f} "
                f"{ranked.double().mean():>7.1f} {float(short):>10.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
