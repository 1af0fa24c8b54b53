"""Columns that lie on several processes, seen by the rows of all: in a ring, or gathered.

Every rank has rows (n, D) and columns (m, D) of its own, n and m as they come. Both schedules take steps
that see own rows and the columns of others, and bring home what the steps make of columns:

- ring: in W steps for W ranks, columns travel from rank to rank, each transfer behind the products of
  the step before, and what is summed over rows follows one step later until it arrives where the
  columns come from. A rank holds the columns of two ranks at most: O((n + m) D) memory.
- gather: all columns are gathered, and sums reduced to their ranks: one step, O(M D) memory for M
  columns on all ranks. Fewer and larger messages: of use where blocks are small.

Small blocks are gathered, where what a ring waits for W times is not the bytes; large ones go round, so
that memory does not grow with the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Schedule = Literal["ring", "gather"]
SCHEDULES: tuple[Schedule, ...] = ("ring", "gather")
Merge = Literal["sum", "log_sum_exp"]
# What is known of columns, each (m, ...), under the name of the argument.
Columns = Mapping[str, Tensor]
# From columns to sums over the rows at hand, each (m, ...), one for each merge.
Step = Callable[[Columns], list[Tensor]]

_MERGES: dict[Merge, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "log_sum_exp": torch.logaddexp,
}


class Ranks(NamedTuple):
    """What every rank of a group knows of all of them."""

    group: "dist.ProcessGroup"
    rank: int
    num_rows: tuple[int, ...]
    num_columns: tuple[int, ...]
    schedule: Schedule = "ring"

    @property
    def world_size(self) -> int:
        return len(self.num_columns)

    @property
    def first_row(self) -> int:
        """How many rows the ranks before this one have."""
        return sum(self.num_rows[: self.rank])

    @property
    def first_column(self) -> int:
        """How many columns the ranks before this one have."""
        return sum(self.num_columns[: self.rank])


def over_all_columns(
    ranks: Ranks, own: Columns, step: Step, merges: Sequence[Merge]
) -> list[Tensor]:
    """Take steps that see the columns of every rank once; what those of all ranks make of own columns."""
    if ranks.world_size == 1:
        return step(own)
    own = {name: x.detach().contiguous() for name, x in own.items()}
    travel = _ring if ranks.schedule == "ring" else _gather
    return travel(ranks, own, step, merges)


def gathered(values: Tensor, ranks: Ranks) -> Tensor:
    """(W, ...), values of the same shape on all ranks, in their order."""
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(ranks.world_size)]
    dist.all_gather(parts, values, ranks.group)
    return torch.stack(parts)


# Ring


class _Transfer:
    """Tensors on their way to the next rank, and those that the previous one sends."""

    def __init__(self, ranks: Ranks, sent: Sequence[Tensor], num_coming: int) -> None:
        self._sent = sent  # must live until they have left
        self._coming = [x.new_empty((num_coming, *x.shape[1:])) for x in sent]
        following, previous = (
            dist.get_global_rank(ranks.group, (ranks.rank + step) % ranks.world_size)
            for step in (1, -1)
        )
        # Both ends know the sizes, so that neither waits for an empty message.
        transfers = [
            dist.P2POp(transfer, x, peer, ranks.group)
            for transfer, tensors, peer in (
                (dist.isend, self._sent, following),
                (dist.irecv, self._coming, previous),
            )
            for x in tensors
            if x.numel()
        ]
        self._works = dist.batch_isend_irecv(transfers) if transfers else []

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._coming


def _ring(ranks: Ranks, own: Columns, step: Step, merges: Sequence[Merge]) -> list[Tensor]:
    block = own
    made: _Transfer | None = None
    for i in range(ranks.world_size):
        num_coming = ranks.num_columns[(ranks.rank - i - 1) % ranks.world_size]
        is_last = i == ranks.world_size - 1
        columns = None if is_last else _Transfer(ranks, list(block.values()), num_coming)
        partial = step(block)
        if made is not None:
            earlier = made.wait()
            partial = [
                _MERGES[merge](x, y) for merge, x, y in zip(merges, earlier, partial, strict=True)
            ]
        if columns is not None:
            block = dict(zip(own, columns.wait(), strict=True))
        # After the last step it goes to the next rank as well, which is where the block comes from.
        made = _Transfer(ranks, partial, num_coming)
    return made.wait() if made is not None else []


# Gather


def _gather(ranks: Ranks, own: Columns, step: Step, merges: Sequence[Merge]) -> list[Tensor]:
    made = step({name: all_columns(x, ranks) for name, x in own.items()})
    return [
        _reduced(ranks, x) if merge == "sum" else _log_sum_exp(ranks, x)
        for merge, x in zip(merges, made, strict=True)
    ]


def _parts(ranks: Ranks, whole: Tensor) -> list[tuple[int, Tensor]]:
    """Of every rank that has columns, its global rank and its part (m, ...) of (M, ...)."""
    parts = torch.split(whole, list(ranks.num_columns))
    return [
        (dist.get_global_rank(ranks.group, rank), part)
        for rank, part in enumerate(parts)
        if part.numel()
    ]


def _own_part(ranks: Ranks, whole: Tensor) -> Tensor:
    return torch.split(whole, list(ranks.num_columns))[ranks.rank]


def all_columns(own: Tensor, ranks: Ranks) -> Tensor:
    """(M, ...), what all ranks have of their columns (m, ...)."""
    # Broadcasts, as many bytes as one gather, take parts of different sizes without padding.
    whole = own.new_empty((sum(ranks.num_columns), *own.shape[1:]))
    _own_part(ranks, whole).copy_(own)
    works = [
        dist.broadcast(part, rank, ranks.group, async_op=True)
        for rank, part in _parts(ranks, whole)
    ]
    for work in works:
        work.wait()
    return whole


def _reduced(ranks: Ranks, whole: Tensor) -> Tensor:
    whole = whole.contiguous()
    works = [
        dist.reduce(part, rank, group=ranks.group, async_op=True)
        for rank, part in _parts(ranks, whole)
    ]
    for work in works:
        work.wait()
    return _own_part(ranks, whole).clone()


def _log_sum_exp(ranks: Ranks, whole: Tensor) -> Tensor:
    largest = whole.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, ranks.group)
    shift = largest.where(largest.isfinite(), 0.0)
    return _reduced(ranks, (whole - shift).exp()).log() + _own_part(ranks, shift)
