"""Sums over all pairs of rows and columns that lie on several processes.

Every rank has rows a (n, D) and columns b (m, D) of its own, n and m as they come. Both schedules call
the op for own rows and the columns of others, and bring home what it makes of columns:

- ring: in W steps for W ranks, columns travel from rank to rank, each transfer behind the products of
  the step before, and what is summed over rows follows one step later until it arrives where the
  columns come from. A rank holds the columns of two ranks at most: O((n + m) D) memory.
- gather: all columns are gathered, and sums reduced to their ranks: one call of the op, O(M D) memory
  for M columns on all ranks. Fewer and larger messages: of use where blocks are small.

Both send (W - 1) m D elements of features in the forward pass, the same again and as many elements of
gradients in the backward pass; columns are gathered twice so that nothing is held between the passes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyfeat._contrast import Pairs, PairSums

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


def distributed_pair_sums(
    a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, *, columns: bool, ranks: Ranks
) -> PairSums:
    """``pair_sums`` of own rows over the columns of all ranks, and of own columns over all rows.

    All ranks call it, with the same D, dtype, scale and kinds of terms, and all call backward. The
    gradients are those of what all ranks make of their sums, added up: of own rows and own columns in
    full, and of the scale the part of own rows, so that its sum over ranks is in full.

    Args:
        a: (n, D) float32, float16 or bfloat16, finite; n may be 0.
        b: (m, D), dtype and device of ``a``; m may be 0.
        scale: () float, positive.
        pairs: Of own rows and own columns; ids are equal where rows and columns of any ranks match.
        columns: Whether sums over columns are wanted.
        ranks: Sizes on all ranks.

    Raises:
        RuntimeError: If a gradient is differentiated again.
    """
    sums = _DistributedPairSums.apply(a, b, scale, pairs, columns, ranks)  # type: ignore[no-untyped-call]
    return PairSums(*sums, row_largest=sums[0].new_empty(0))


class _DistributedPairSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, columns: bool, ranks: Ranks
    ) -> tuple[Tensor, ...]:
        row_lse = a.new_full((a.shape[0],), -torch.inf, dtype=torch.float64)
        row_positives = torch.zeros_like(row_lse)

        def step(block: Columns) -> list[Tensor]:
            nonlocal row_lse, row_positives
            sums = _sums(a, block["b"], scale, _with_columns(pairs, block), columns)
            row_lse = torch.logaddexp(row_lse, sums.row_lse)
            row_positives = row_positives + sums.row_positives
            return [sums.column_lse, sums.column_positives] if columns else []

        own = {"b": b, **_columns_of(pairs)}
        merges: list[Merge] = ["log_sum_exp", "sum"] if columns else []
        none = [row_lse.new_empty(0), row_lse.new_empty(0)]
        column_lse, column_positives = _over_all_columns(ranks, own, step, merges) or none
        ctx.save_for_backward(a, b, scale, row_lse, column_lse)
        ctx.rest = pairs, columns, ranks
        return row_lse, column_lse, row_positives, column_positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, row_lse, column_lse = ctx.saved_tensors
        pairs, columns, ranks = ctx.rest
        dtype = torch.promote_types(a.dtype, torch.float32)
        grad_a = torch.zeros_like(a, dtype=dtype)
        grad_scale = scale.new_zeros((), dtype=torch.float64)
        of_rows = {"lse": row_lse, "grad_lse": grads[0], "grad_positives": grads[2]}
        of_columns = {"lse": column_lse, "grad_lse": grads[1], "grad_positives": grads[3]}
        wanted = ctx.needs_input_grad[1]

        def step(block: Columns) -> list[Tensor]:
            nonlocal grad_scale
            gradients = _gradients(
                a,
                block["b"],
                scale,
                _with_columns(pairs, block),
                columns,
                of_rows,
                block if columns else of_columns,
            )
            grad_a.add_(gradients[0])
            grad_scale = grad_scale + gradients[2]
            return [gradients[1].to(dtype)] if wanted else []

        own = {"b": b, **_columns_of(pairs), **(of_columns if columns else {})}
        home = _over_all_columns(ranks, own, step, ["sum"] if wanted else [])
        grad_b = home[0].to(b.dtype) if home else None
        return grad_a.to(a.dtype), grad_b, grad_scale.to(scale.dtype), None, None, None


def _columns_of(pairs: Pairs) -> dict[str, Tensor]:
    named = pairs._asdict().items()
    return {name: x for name, x in named if name.startswith("column_") and x is not None}


def _with_columns(pairs: Pairs, block: Columns) -> Pairs:
    """Pairs of the same rows and other columns."""
    terms: dict[str, Any] = {name: block[name] for name in _columns_of(pairs)}
    return pairs._replace(**terms)


def _sums(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, columns: bool) -> PairSums:
    # Neither the largest, nor a batch with itself, nor anything kept for the gradients.
    *sums, _ = torch.ops.pyfeat.pair_sums(a, b, scale, *pairs, columns, False, False, 0)
    return PairSums(*sums)


def _gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    columns: bool,
    of_rows: Columns,
    of_columns: Columns,
) -> tuple[Tensor, Tensor, Tensor]:
    """By a, b and scale, of the sums ``lse`` and the gradients by sums of rows and of columns."""
    if a.device.type == "cpu":
        # The op rounds to the dtype of features what is yet to be summed over blocks, and its products are
        # in float32 at any rate.
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(dtype), b.to(dtype)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.pyfeat.pair_sums_backward(
        a,
        b,
        scale,
        *pairs,
        columns,
        *(
            of[name]
            for name in ("lse", "grad_lse", "grad_positives")
            for of in (of_rows, of_columns)
        ),
        False,
        True,
        True,
        None,
    )
    return gradients


def _over_all_columns(
    ranks: Ranks, own: Columns, step: Step, merges: Sequence[Merge]
) -> list[Tensor]:
    """Take steps that see the columns of every rank once; what those of all ranks make of own columns."""
    if ranks.world_size == 1:
        return step(own)
    own = {name: x.detach().contiguous() for name, x in own.items()}
    travel = _ring if ranks.schedule == "ring" else _gather
    return travel(ranks, own, step, merges)


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
    made = step({name: _all_of(ranks, x) for name, x in own.items()})
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


def _all_of(ranks: Ranks, own: Tensor) -> Tensor:
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
