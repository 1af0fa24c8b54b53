"""Comparisons shared by the tests."""

import numpy as np
import torch
from torch import Tensor

from pyfeat import _C, reference
from pyfeat._checks import as_mask, as_matrix, dtype_name
from pyfeat.search import Metric

# Every instruction set of this machine with every precision of its tiles.
ENGINES = [(isa, precision) for isa in _C.isas() for precision in _C.precisions(isa)]

# float64 sums of the same terms in another order differ by a few units in the last place.
NEAR_TIE = 1e-13


def assert_exact_neighbours(
    distances: Tensor, indices: Tensor, queries: Tensor, memory: Tensor, k: int, metric: str
) -> None:
    """Fail unless the neighbours are those of float64 brute force, for every query.

    Only rows whose float64 distances differ by rounding (NEAR_TIE, relative) may stand in for each
    other; equal distances must come in row order.
    """
    assert distances.shape == indices.shape == (len(queries), k)
    assert distances.dtype == (torch.float64 if queries.dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    if len(queries) == 0:
        return
    exact = reference.pairwise_distances(queries, memory, metric)  # [Q, N]
    descending = metric == "inner_product"
    expected = exact.sort(dim=1, stable=True, descending=descending)
    found = exact.gather(1, indices)  # [Q, k]; an index out of range raises
    best = expected.values[:, :k]
    scale = _scale(exact, queries, memory, metric)
    wrong = (found - best).abs() > NEAR_TIE * scale
    assert not wrong.any(), f"{int(wrong.sum())} neighbours are not the nearest"

    _assert_equal_rows_in_order(indices, memory)
    if metric != "cosine":  # dividing by the norm rounds: there, only equal rows surely tie
        swapped = indices != expected.indices[:, :k]
        tied = (found == best) & _is_exact_tie(expected.values, k)
        assert not (swapped & tied).any(), "a tie is out of order"
    for row in indices.tolist():
        assert len(set(row)) == k, "a neighbour appears twice"

    rounded = best.to(distances.dtype)
    spacing = torch.from_numpy(np.spacing(rounded.abs().numpy())).double()
    error = (distances.double() - best).abs()
    assert (error <= 0.5001 * spacing + NEAR_TIE * scale).all(), f"distance off by {error.max()}"


def assert_allowed_neighbours(
    distances: Tensor,
    indices: Tensor,
    queries: Tensor,
    memory: Tensor,
    metric: str,
    allowed: Tensor,
) -> None:
    """Compare (Q, k) neighbours with the reference on the rows that ``allowed`` gives each query."""
    for q, mask in enumerate(allowed.expand(len(queries), -1)):
        rows = mask.nonzero()[:, 0]
        count = min(indices.shape[1], len(rows))
        if count:
            expected = reference.knn(queries[q : q + 1], memory[rows], count, metric)
            assert torch.equal(indices[q, :count], rows[expected[1][0]])
            assert torch.allclose(distances[q, :count], expected[0][0], rtol=1e-6, atol=1e-7)
        assert (indices[q, count:] == -1).all()
        assert distances[q, count:].isinf().all()


def _assert_equal_rows_in_order(indices: Tensor, memory: Tensor) -> None:
    """Of equal rows, the first must be found first, and none before those that precede it."""
    if memory.shape[1] == 0:
        memory = memory.new_zeros(len(memory), 1)
    groups = torch.unique(memory, dim=0, return_inverse=True)[1].tolist()  # [N]
    seen: dict[int, int] = {}
    rank = []  # of each row among its equals
    for group in groups:
        rank.append(seen.get(group, 0))
        seen[group] = rank[-1] + 1
    for neighbours in indices.tolist():
        expected: dict[int, int] = {}
        for row in neighbours:
            group = groups[row]
            assert rank[row] == expected.get(group, 0), "a tie is out of order"
            expected[group] = rank[row] + 1


def _is_exact_tie(ordered: Tensor, k: int) -> Tensor:
    """(Q, k): whether a position ties bit for bit with a neighbour, and with nothing else nearly."""
    gaps = ordered.diff(dim=1)  # [Q, N - 1]
    pad = torch.full((len(ordered), 1), float("nan"), dtype=ordered.dtype)
    before, after = torch.cat([pad, gaps], 1), torch.cat([gaps, pad], 1)
    return ((before == 0) | (after == 0))[:, :k]


def _scale(exact: Tensor, queries: Tensor, memory: Tensor, metric: str) -> Tensor:
    """What rounding in a float64 sum is relative to: the sum of the absolute terms."""
    if metric == "inner_product":
        scale: Tensor = (
            queries.double().norm(dim=1, keepdim=True) * memory.double().norm(dim=1).max()
        )
        return scale
    if metric == "cosine":
        return torch.ones(len(exact), 1, dtype=torch.float64)
    return exact.max(dim=1, keepdim=True).values


def make_features(kind: str, num_queries: int, num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) and memory (N, D): plain, shifted, duplicated or strided."""
    queries, memory = torch.randn(num_queries, dim), torch.randn(num_rows, dim)
    if kind == "shifted":
        return queries + 1e6, memory + 1e6
    if kind == "duplicated":
        memory = memory[torch.arange(num_rows) // 2]
        return memory[torch.arange(num_queries) % num_rows], memory
    if kind == "strided":
        wide = torch.randn(num_rows, 2 * dim + 3)
        return torch.randn(dim, num_queries).T, wide[:, 1 : 2 * dim + 1 : 2]
    return queries, memory


def kernel_knn(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: Metric,
    *,
    isa: str = "",
    precision: str = "",
    threads: int = 2,
    mask: Tensor | None = None,
    packed: _C.PackedMemory | None = None,
    bound_scale: float = 1.0,
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """The kernel with a chosen instruction set, precision and thread count; its counters too."""
    queries, memory = queries.contiguous(), memory.contiguous()
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    distances = torch.full((len(queries), k), float("nan"), dtype=dtype)
    indices = torch.full((len(queries), k), -7)
    counters = _C.knn_cpu(
        as_matrix(queries),
        as_matrix(memory),
        k,
        getattr(_C.Metric, metric),
        distances.data_ptr(),
        getattr(_C.Dtype, dtype_name(dtype)),
        indices.data_ptr(),
        as_mask(mask),
        _C.NonFinite.refuse,
        threads,
        isa,
        precision,
        packed,
        bound_scale,
    )
    return distances, indices, counters
