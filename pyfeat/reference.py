"""What each op means, in plain PyTorch and float64. Slow on purpose: nothing here is clever."""

import math

import torch
from torch import Tensor

# Bytes of the (queries, N, D) differences held at a time.
_CHUNK_BYTES = 64 << 20


def pairwise_distances(queries: Tensor, memory: Tensor, metric: str) -> Tensor:
    """Distances (Q, N) in float64, by direct differences.

    euclidean ``||q - x||``; sqeuclidean its square; cosine ``1 - cos(q, x)``, taken as
    ``||q/|q| - x/|x|||^2 / 2`` so that near-parallel vectors keep their digits, and 1 for a zero
    vector; inner_product ``q . x``.

    Args:
        queries: (Q, D), any floating dtype.
        memory: (N, D).
        metric: One of the four names above.
    """
    q, x = queries.double(), memory.double()  # [Q, D], [N, D]
    zero = torch.zeros((len(q), len(x)), dtype=torch.bool, device=q.device)
    if metric == "cosine":
        q_norm, x_norm = _norm(q), _norm(x)  # [Q, 1], [N, 1]
        zero = (q_norm == 0) | (x_norm == 0).T  # [Q, N]
        q, x = q / q_norm.where(q_norm > 0, 1.0), x / x_norm.where(x_norm > 0, 1.0)
    rows = max(1, _CHUNK_BYTES // max(8 * x.numel(), 1))
    parts = []
    for first in range(0, len(q), rows):
        chunk = q[first : first + rows]
        if metric == "inner_product":
            parts.append((chunk[:, None] * x).sum(-1))
        else:
            parts.append((chunk[:, None] - x).square().sum(-1))
    distances = torch.cat(parts) if parts else q.new_empty((0, len(x)))
    if metric == "euclidean":
        return _sqrt(distances)
    if metric == "cosine":
        return (0.5 * distances).where(~zero, 1.0)
    return distances


def knn(queries: Tensor, memory: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k nearest rows of ``memory``: distances (Q, k) float32, indices (Q, k) int64.

    Ascending distances (descending for inner_product), rows at equal distance in row order.
    """
    distances = pairwise_distances(queries, memory, metric)
    order = distances.sort(dim=1, stable=True, descending=metric == "inner_product")
    return order.values[:, :k].to(queries.dtype), order.indices[:, :k]


def greedy_coreset(
    features: Tensor, *, start: int, size: int, radius: float = -1.0
) -> tuple[Tensor, float]:
    """k-centre greedy: start anywhere, then always the row farthest from all picks.

    Returns:
        Picks (at most ``size``,) int64, and the covering radius: the largest distance of any row to
        its nearest pick. Ends early once that radius is at or below ``radius``.
    """
    x = features.double()  # [N, D]
    squared = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    picks = [start]
    while True:
        squared = torch.minimum(squared, (x - x[picks[-1]]).square().sum(-1))
        squared[picks] = -1.0  # never again, not even among equals at distance 0
        covering = max(float(squared.max()), 0.0)
        if len(picks) == size or math.sqrt(covering) <= radius:
            return torch.tensor(picks), math.sqrt(covering)
        picks.append(int(squared.argmax()))


def _norm(x: Tensor) -> Tensor:
    return _sqrt(x.square().sum(-1, keepdim=True))


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = x > 0
    return x.where(positive, 1.0).sqrt().where(positive, 0.0)
