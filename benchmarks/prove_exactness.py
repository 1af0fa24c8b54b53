"""The long proof: every query of every size against float64 direct differences.

``python -m benchmarks.prove_exactness`` takes about a quarter of an hour on two cores; a short
version is in the test suite.
"""

import itertools

import torch
from torch import Tensor
from tqdm import tqdm

import pyfeat
from tests.support import NEAR_TIE, make_features

SIZES = (1, 31, 33, 257, 4096)
KINDS = ("plain", "shifted", "duplicated")


def count_wrong(queries: Tensor, memory: Tensor, k: int) -> int:
    """Neighbours whose float64 distance is not that of the same rank, or ties out of order."""
    found = pyfeat.knn(queries, memory, k).indices
    wrong = 0
    for first in range(0, len(queries), 512):
        part = slice(first, first + 512)
        exact = torch.cdist(
            queries[part].double(),
            memory.double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )  # [512, N]
        ordered = exact.sort(dim=1, stable=True)
        values, best = exact.gather(1, found[part]), ordered.values[:, :k]
        scale = ordered.values[:, -1:]
        differs = (values - best).abs() > NEAR_TIE * scale
        # Rows that tie bit for bit must come in row order.
        tied = (values[:, 1:] == values[:, :-1]) & (found[part, 1:] < found[part, :-1])
        wrong += int(differs.sum()) + int(tied.sum())
    return wrong


def main() -> None:
    """Run all sizes; raise at the first wrong neighbour."""
    torch.manual_seed(0)
    shapes = list(itertools.product(SIZES, SIZES, SIZES))
    cases = [(kind, *shape) for shape in shapes for kind in KINDS]
    checked = 0
    with tqdm(cases, unit="case") as bar:
        for kind, num_queries, num_rows, dim in bar:
            bar.set_postfix_str(f"{kind} {num_queries}x{num_rows}x{dim}")
            queries, memory = make_features(kind, num_queries, num_rows, dim)
            for k in {1, min(9, num_rows), num_rows}:
                wrong = count_wrong(queries, memory, k)
                if wrong:
                    message = f"{kind} {num_queries}x{num_rows}x{dim}, k={k}: {wrong} wrong"
                    raise RuntimeError(message)
                checked += num_queries * k
    print(f"{len(cases)} cases, {checked:,} neighbours, 0 wrong")


if __name__ == "__main__":
    main()
