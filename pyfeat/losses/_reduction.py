"""From sums over pairs to losses, and from losses to what is returned."""

from typing import Literal

import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import BACKENDS, Backend, select_backend
from pyfeat._checks import check_choice, distance_dtype_of
from pyfeat._contrast import Pairs, PairSums, pair_sums

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def sums_over(
    op: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    columns: bool,
    backend: Backend | None,
) -> PairSums:
    check_choice(op, "backend", backend, (None, *BACKENDS))
    if select_backend(op, backend, a) == "reference":
        return PairSums(*reference.pair_sums(a, b, scale, *pairs))
    return pair_sums(a, b, scale, pairs, columns=columns)


def softmax_loss(
    lse: Tensor, positives: Tensor, counts: Tensor, *, separate: bool
) -> tuple[Tensor, Tensor]:
    """Losses and which of them count: those with a positive.

    ``lse`` is over all keys, or ``separate``: over all but the only positive one.
    """
    counted = counts > 0
    # Where nothing counts the log-sum-exp is -inf, which must not meet a gradient.
    lse = lse.masked_fill(~counted, 0.0)
    mean = positives / counts.clamp_min(1.0).double()
    losses = torch.nn.functional.softplus(lse - mean) if separate else lse - mean
    return losses.where(counted, 0.0), counted


def reduced(
    op: str, losses: Tensor, counted: Tensor, reduction: Reduction, features: Tensor
) -> Tensor:
    dtype = distance_dtype_of(features)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / counted.sum().clamp_min(1)
    return total.to(dtype)
