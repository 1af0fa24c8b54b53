"""Nearest neighbours, coresets and matches."""

import math

import torch
from torch import Tensor

from pyfeat._checks import distance_dtype_of

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


def knn(
    queries: Tensor, memory: Tensor, k: int, metric: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of ``memory``: distances (Q, k), indices (Q, k) int64.

    Ascending distances (descending for inner_product), rows at equal distance in row order. ``mask``
    (N,) or (Q, N) says which rows may be returned; where they run out, the index is -1 and the
    distance infinite. Distances are float32, float64 for float64 features.
    """
    distances = pairwise_distances(queries, memory, metric)
    largest_first = metric == "inner_product"
    none = -math.inf if largest_first else math.inf
    if mask is not None:
        distances = distances.masked_fill(~mask, none)
    order = distances.sort(dim=1, stable=True, descending=largest_first)
    nearest, indices = order.values[:, :k], order.indices[:, :k]
    indices = indices.masked_fill(nearest.isinf(), -1)
    return nearest.to(distance_dtype_of(queries)), indices


def range_search(
    queries: Tensor, memory: Tensor, radius: float, metric: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows within a radius: offsets (Q + 1,), distances (R,), indices (R,) int64.

    Those of query q lie from ``offsets[q]`` to ``offsets[q + 1]``, nearest first, rows at equal
    distance in row order. Within is at most the radius, at least it for inner_product.
    """
    distances = pairwise_distances(queries, memory, metric)
    largest_first = metric == "inner_product"
    within = distances >= radius if largest_first else distances <= radius
    if mask is not None:
        within = within & mask
    order = distances.sort(dim=1, stable=True, descending=largest_first)
    kept = within.gather(1, order.indices)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(dim=1).cumsum(dim=0)])
    return offsets, order.values[kept].to(distance_dtype_of(queries)), order.indices[kept]


def greedy_coreset(
    features: Tensor,
    *,
    size: int,
    start: int | None = None,
    squared_distances: Tensor | None = None,
    radius: float = -1.0,
) -> tuple[Tensor, float]:
    """k-centre greedy: start anywhere, then always the row farthest from all picks.

    Args:
        features: (N, D), any floating dtype.
        size: Picks at most.
        start: First pick; None takes the row with the largest of ``squared_distances``.
        squared_distances: (N,) to what counts as picked before; None: infinite.
        radius: End once the covering radius is at or below this.

    Returns:
        Picks (at most ``size``,) int64, and the covering radius: the largest distance of any row to
        its nearest pick.
    """
    x = features.double()  # [N, D]
    squared = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    if squared_distances is not None:
        squared = squared_distances.clone()
    picks = [int(squared.argmax()) if start is None else start]
    while True:
        squared = torch.minimum(squared, (x - x[picks[-1]]).square().sum(-1))
        squared[picks[-1]] = -1.0  # never again, not even among equals at distance 0
        covering = math.sqrt(max(float(squared.max()), 0.0))
        if len(picks) == size or covering <= radius:
            return torch.tensor(picks), covering
        picks.append(int(squared.argmax()))


def match(
    a: Tensor,
    b: Tensor,
    method: str,
    *,
    metric: str = "euclidean",
    ratio: float = 0.8,
    mutual: bool = False,
    temperature: float = 0.1,
    threshold: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of rows: indices in ``a`` (M,), ascending, in ``b`` (M,), and float64 scores (M,).

    - mutual: each other's nearest; the score is their distance.
    - ratio: ``d1 < ratio * d2`` for the two nearest of a row of ``a``, d2 infinite if there is only
      one; with ``mutual``, also of a row of ``b``, for pairs that are each other's nearest. The score
      is the (larger) ratio.
    - dual_softmax: ``P = softmax(s, 1) * softmax(s, 0)``, ``s = a @ b.T / temperature``; the largest of
      their row and of their column, of at least ``threshold``. The score is P.

    Equals go to the lower index on both sides.
    """
    if method == "dual_softmax":
        s = a.double() @ b.double().T / temperature
        log_p = s.log_softmax(dim=1) + s.log_softmax(dim=0)
        scores, far = log_p.exp(), -log_p  # [L, S]
    else:
        scores = pairwise_distances(a, b, metric)  # [L, S]
        far = -scores if metric == "inner_product" else scores
    nearest, back = first_smallest(far), first_smallest(far.T)  # [L], [S]
    rows = torch.arange(len(far), device=far.device)
    passed = back[nearest] == rows
    scores = scores[rows, nearest]
    if method == "ratio":
        scores = _ratios(far, ratio)
        if mutual:
            scores = torch.maximum(scores, _ratios(far.T, ratio)[nearest])
        passed = scores.isfinite() & (passed | (not mutual))
    elif method == "dual_softmax":
        passed &= scores >= threshold
    return rows[passed], nearest[passed], scores[passed]


def first_smallest(x: Tensor) -> Tensor:
    """Index of the smallest entry of every row, the first among equals."""
    return x.sort(dim=1, stable=True).indices[:, 0]


def _ratios(distances: Tensor, ratio: float) -> Tensor:
    """d1 / d2 of the two smallest of every row (0 without a second); infinite unless d1 < ratio d2."""
    two = torch.nn.functional.pad(distances, (0, 1), value=math.inf).sort(dim=1).values[:, :2]
    return (two[:, 0] / two[:, 1]).where(two[:, 0] < ratio * two[:, 1], math.inf)


def _norm(x: Tensor) -> Tensor:
    return _sqrt(x.square().sum(-1, keepdim=True))


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    positive = x > 0
    return x.where(positive, 1.0).sqrt().where(positive, 0.0)
