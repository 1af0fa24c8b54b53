"""How far features are from a memory that they are to be pulled towards."""

import math
from typing import Literal

from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._checks import check_choice, check_mask
from pyfeat.search import knn


def bank_min_distance(
    queries: Tensor,
    bank: Tensor,
    *,
    mask: Tensor | None = None,
    bank_mask: Tensor | None = None,
    max_distance: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Euclidean distance of every query to its nearest row of a memory, exactly.

    ``min(min_j ||q_i - bank_j||, max_distance)``. The gradient goes to the queries alone: the unit
    vector from the nearest row to the query, and 0 for a query that lies on a row or beyond
    ``max_distance``.

    Args:
        queries: (Q, D) float32, float64, float16 or bfloat16, finite.
        bank: (N, D), dtype and device of ``queries``, N >= 1; such as ``FeatureQueue.features``, whose
            rows stay as they are until the backward pass is over.
        mask: (Q,) bool: which queries count; None: all.
        bank_mask: (N,) bool: which rows may be nearest, at least one; None: all.
        max_distance: > 0, in feature units; None: no bound.
        reduction: "mean" and "sum" are over the queries that count, 0 if there are none.
        backend: As in ``knn``.

    Returns:
        () float32 (float64 for float64 features), or with reduction "none" (Q,), 0 for queries that do
        not count.

    Raises:
        TypeError: If features are not float, or the mask is not bool.
        ValueError: If shapes disagree, no row may be nearest, ``max_distance`` is out of range, or a feature
            that counts is NaN or infinite.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: as ``knn``.
    Memory: the queries that count, if there is a mask, and as ``knn``: no (Q, N) tensor, forward or
    backward.
    Source: Tu et al., Self-supervised Feature Adaptation for 3D Industrial Anomaly Detection, ECCV 2024,
    arXiv:2401.03145.

    Examples:
        >>> import torch
        >>> queries = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
        >>> distance = bank_min_distance(queries, torch.zeros(1, 2))
        >>> distance.backward()
        >>> distance, queries.grad
        (tensor(3., grad_fn=<MeanBackward0>), tensor([[0.3000, 0.4000],
                [0.0000, 0.5000]]))
    """
    op = "bank_min_distance"
    check_choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if max_distance is not None and not 0.0 < max_distance < math.inf:
        message = f"{op}: max_distance must be positive and finite, got {max_distance}"
        raise ValueError(message)
    if bank.ndim == 2 and not len(bank):
        message = f"{op}: bank must hold at least one row, got shape {tuple(bank.shape)}"
        raise ValueError(message)
    if bank_mask is not None:
        check_mask(op, bank_mask, 0, len(bank))
        if not bank_mask.any():
            message = f"{op}: bank_mask must allow at least one row, got none of {len(bank)}"
            raise ValueError(message)
    counted = queries
    if mask is not None:
        check_mask(op, mask, 0, len(queries))
        counted = queries[mask]
    distances = knn(counted, bank.detach(), mask=bank_mask, backend=backend).distances[:, 0]
    if max_distance is not None:
        distances = distances.clamp(max=max_distance)
    if reduction == "sum":
        return distances.sum()
    if reduction == "mean":
        return distances.mean() if len(distances) else distances.sum()
    if mask is None:
        return distances
    return distances.new_zeros(len(queries)).masked_scatter(mask, distances)
