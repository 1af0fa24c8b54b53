"""Sums over all pairs of the rows of two matrices."""

import math

import torch
from torch import Tensor


def log_sum_exp(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row (L,) and column (S,) of ``scale * a @ b.T``, in float64."""
    s = scale * (a.double() @ b.double().T)  # [L, S]
    return s.logsumexp(dim=1), s.logsumexp(dim=0)


def pair_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    column_bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
    keep_positives: bool = False,
    separate_positives: bool = False,
    only_positives: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over the rows and columns of ``S = scale * a @ b.T + column_bias``, in float64.

    Pairs of equal ids are positive. Pairs of equal groups are left out, unless they are positive and
    positives are kept; what is left out is not positive. Log-sum-exps are over what counts and, if
    positives are separate, is not positive; or over positives only.

    Returns:
        Log-sum-exp of every row (L,) and column (S,), ``-inf`` where nothing counts, the sums of S
        over the positive pairs of every row (L,) and column (S,), and of every row the largest S that
        counts and is not positive (L,), without a gradient.
    """
    s = scale.double() * (a.double() @ b.double().T)  # [L, S]
    if column_bias is not None:
        s = s + column_bias.double()
    positive = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
    left_out = positive
    if row_ids is not None and column_ids is not None:
        positive = row_ids[:, None] == column_ids
    if row_groups is not None and column_groups is not None:
        left_out = row_groups[:, None] == column_groups
        left_out = left_out & ~positive if keep_positives else left_out
    positive = positive & ~left_out
    powerless = left_out | positive if separate_positives else left_out
    powerless = powerless | ~positive if only_positives else powerless
    counted = s.masked_fill(powerless, -math.inf)
    positives = s.where(positive, 0.0)
    return (
        _logsumexp(counted, dim=1),
        _logsumexp(counted, dim=0),
        positives.sum(dim=1),
        positives.sum(dim=0),
        _largest(s.detach().masked_fill(left_out | positive, -math.inf)),
    )


def pair_softplus(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
    keep_positives: bool = False,
) -> Tensor:
    """Row sums (L,) of ``softplus(S + bias)`` over what counts, in float64.

    ``S = scale * a @ b.T``; positive pairs have ``softplus(-S - bias)``. Ids and groups as in ``pair_sums``.
    """
    s = scale.double() * (a.double() @ b.double().T)  # [L, S]
    positive = left_out = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
    if row_ids is not None and column_ids is not None:
        positive = row_ids[:, None] == column_ids
    if row_groups is not None and column_groups is not None:
        left_out = row_groups[:, None] == column_groups
        left_out = left_out & ~positive if keep_positives else left_out
    logits = s + bias.double()
    softplus = torch.logaddexp(torch.where(positive, -logits, logits), s.new_zeros(()))
    return softplus.where(~left_out, 0.0).sum(dim=1)


def _logsumexp(s: Tensor, dim: int) -> Tensor:
    """``logsumexp`` whose gradient is 0, not NaN, where all is -inf."""
    if s.shape[dim] == 0:
        return s.new_full((s.shape[1 - dim],), -math.inf)
    empty = (s == -math.inf).all(dim=dim, keepdim=True)
    total = s.masked_fill(empty, 0.0).logsumexp(dim=dim)
    return total.masked_fill(empty.squeeze(dim), -math.inf)


def _largest(s: Tensor) -> Tensor:
    """Of every row; -inf where there is no column."""
    return torch.nn.functional.pad(s, (0, 1), value=-math.inf).amax(dim=1)
