"""Cross-entropy with targets that are spread over keys."""

import math

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._capture import is_capturing, zero_if
from pyfeat._checks import dtype_name
from pyfeat._contrast import Pairs
from pyfeat._ranks import Ranks
from pyfeat.losses._arguments import check_shape
from pyfeat.losses._reduction import Losses, sums_over
from pyfeat.losses._traced import confirmed, opaque, zero


def is_soft(targets: object) -> bool:
    """Whether they are weights of keys, not indices."""
    return isinstance(targets, Tensor) and targets.is_floating_point()


def soft_losses(
    op: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    weights: Tensor,
    column_bias: Tensor | None,
    *,
    columns: bool,
    backend: Backend | None,
    ranks: Ranks | None = None,
) -> list[Losses]:
    """``t_i logsumexp_j S_ij - sum_j T_ij S_ij`` of rows with sums t_i and, if wanted, of columns.

    The second sum is ``scale <a_i, (T b)_i>``, so that of (N, M) there is T alone.
    """
    # Gradients by both sums nearly cancel where a model is right; in 16 bits little would be left.
    a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
    pairs = Pairs(column_bias)
    sums = sums_over(op, a, b, scale, pairs, columns=columns, backend=backend, ranks=ranks)
    losses = []
    for side, (own, other, lse) in enumerate(((a, b, sums.row_lse), (b, a, sums.column_lse))):
        if side == 1 and not columns:
            break
        spread = weights if side == 0 else weights.t()
        totals = _row_sums(spread)  # [N]
        cross = scale * (own * _product(spread, other)).sum(dim=1, dtype=torch.float64)
        if column_bias is not None:
            bias = column_bias[:, None]
            cross = cross + (_product(spread, bias)[:, 0] if side == 0 else totals * bias[:, 0])
        counted = totals != 0  # NaN counts
        each = totals * lse.masked_fill(~counted, 0.0) - cross
        losses.append(Losses(each.where(counted, 0.0), counted))
    return losses


def _product(weights: Tensor, features: Tensor) -> Tensor:
    """In the dtype of the larger operand, the weights: no copy of them is made."""
    return (weights @ features.to(weights.dtype)).to(features.dtype)


def _row_sums(weights: Tensor) -> Tensor:
    if weights.layout == torch.strided:
        return weights.sum(dim=1, dtype=torch.float64)
    return torch.sparse.sum(weights, dim=1, dtype=torch.float64).to_dense()


def checked_weights(
    op: str, targets: Tensor, num_rows: int, num_columns: int, features: Tensor
) -> Tensor:
    """Constant, dense or COO, at least 0 and finite."""
    if targets.dtype not in (torch.float32, torch.float64):
        message = (
            f"{op}: targets must be int64, float32 or float64, got {dtype_name(targets.dtype)}"
        )
        raise TypeError(message)
    check_shape(op, "targets", targets, (num_rows, num_columns), features)
    weights = targets.detach()
    if weights.layout != torch.strided:
        weights = _coalesced(op, weights)
    if weights.layout == torch.strided:
        return confirmed(weights, _check_weights(weights, op))
    _check_weights(weights.values(), op)
    return weights


@opaque(zero)
def _check_weights(weights: Tensor, op: str) -> Tensor:
    if is_capturing(weights):
        return zero_if(((weights >= 0.0) & weights.isfinite()).all(), weights)
    if weights.numel():
        least, largest = (float(x) for x in weights.aminmax())
        if not (least >= 0.0 and largest < math.inf):
            message = f"{op}: targets must be at least 0 and finite, got {least} to {largest}"
            raise ValueError(message)
    return zero(weights)


def _coalesced(op: str, weights: Tensor) -> Tensor:
    """As COO; torch does not check the indices of sparse tensors unless it is told to."""
    if weights.layout == torch.sparse_csr:
        ends, columns, values = weights.crow_indices(), weights.col_indices(), weights.values()
        lengths = ends.diff()
        if int(ends[0]) != 0 or int(ends[-1]) != len(values) or bool((lengths < 0).any()):
            message = f"{op}: targets must have row offsets from 0 to {len(values)}, got others"
            raise ValueError(message)
        rows = torch.arange(len(lengths), device=ends.device).repeat_interleave(lengths)
        indices = torch.stack([rows, columns.long()])
    elif weights.layout == torch.sparse_coo and weights.sparse_dim() == 2:
        indices, values = weights._indices(), weights._values()
    else:
        message = (
            f"{op}: targets must be dense, or sparse COO or CSR of numbers, got {weights.layout}"
        )
        raise ValueError(message)
    try:
        checked = torch.sparse_coo_tensor(indices, values, weights.shape, check_invariants=True)
    except RuntimeError as error:
        message = f"{op}: targets must have indices inside {tuple(weights.shape)}, got {error}"
        raise ValueError(message) from error
    return checked.coalesce()
