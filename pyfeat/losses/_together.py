"""Losses of rows that lie on several processes and meet in assignments and in a mean alone.

With the contract of ``group`` and ``reduce`` in ``pyfeat.losses._group``; without a group nothing
is sent.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from pyfeat._checks import check_choice, distance_dtype_of
from pyfeat._ranks import Ranks
from pyfeat.losses._group import REDUCES, Meeting, Reduce, global_sum
from pyfeat.losses._reduction import Reduction, check_reduction, reduced


class Alone:
    """A meeting of one, who need not be told."""

    ranks: Ranks | None = None

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def tell(self, a: Tensor, b: Tensor, scale: Tensor, **same: Any) -> None:
        """As of ``Meeting``."""


def meeting(op: str, group: "dist.ProcessGroup | None") -> Meeting | Alone:
    """What arguments are checked in, so that what is wrong on one rank is raised on all."""
    return Alone() if group is None else Meeting(op, group)


def sum_over(ranks: Ranks | None, sums: Tensor) -> Tensor:
    """Of all ranks together; may be written over."""
    if ranks is not None:
        dist.all_reduce(sums, group=ranks.group)
    return sums


def log_sum_exp_over(ranks: Ranks | None, lse: Tensor) -> Tensor:
    """Of all ranks together, from the float64 log-sum-exp of each; NaN if all are -inf."""
    if ranks is None:
        return lse
    largest = lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, ranks.group)
    return sum_over(ranks, (lse - largest).exp()).log() + largest


def check_reductions(op: str, reduction: str, reduce: str) -> None:
    """Raise unless both are among the choices."""
    check_reduction(op, reduction)
    check_choice(op, "reduce", reduce, REDUCES)


def reduced_over(
    ranks: Ranks | None,
    op: str,
    losses: Tensor,
    reduction: Reduction,
    reduce: Reduce,
    features: Tensor,
) -> Tensor:
    """``reduced`` over the rows of all ranks; with reduction "none" those of this one."""
    if ranks is None or reduction == "none":
        return reduced(op, losses, None, reduction, features)
    total = global_sum(losses.sum(), ranks, reduce)
    if reduction == "mean":
        total = total / max(1, sum(ranks.num_rows))
    return total.to(distance_dtype_of(features))
