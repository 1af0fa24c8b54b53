"""The ops over all pairs for rows and columns that lie on several processes.

Columns travel once in the forward and once in the backward pass, so that nothing of other ranks is held
between the passes: with the schedules of ``_ranks``, W - 1 transfers of features in each, and W of
gradients by columns.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._contrast_cpu import scale_gradient
from pyfeat._pairs import Pairs, PairSums
from pyfeat._ranks import Columns, Merge, Ranks, gathered, over_all_columns


def distributed_pair_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    columns: bool,
    ranks: Ranks,
    largest: bool = False,
    backend: Backend = "cpu",
) -> PairSums:
    """``pair_sums`` of own rows over the columns of all ranks, and of own columns over all rows.

    All ranks call it, with the same D, dtype, scale and kinds of terms, and all call backward. The
    gradients are those of what all ranks make of their sums, added up: of own rows and own columns in
    full, and of the scale a part, so that the sum of parts over ranks is in full.

    Args:
        a: (n, D) float32, float64, float16 or bfloat16, finite; n may be 0.
        b: (m, D), dtype and device of ``a``; m may be 0.
        scale: () float, positive.
        pairs: Of own rows and own columns; ids are equal where rows and columns of any ranks match.
        columns: Whether sums over columns are wanted.
        ranks: Sizes on all ranks.
        largest: Whether the largest of every row is wanted.
        backend: Which was chosen for the features, not the reference.

    Raises:
        RuntimeError: If a gradient is differentiated again.
    """
    arguments = a, b, scale, pairs, columns, largest, ranks, backend
    return PairSums(*_DistributedPairSums.apply(*arguments))  # type: ignore[no-untyped-call]


def distributed_pair_softplus(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    *,
    ranks: Ranks,
    backend: Backend = "cpu",
) -> Tensor:
    """``pair_softplus`` of own rows over the columns of all ranks; else as ``distributed_pair_sums``.

    The gradient by the bias is a part as well.
    """
    arguments = a, b, scale, bias, pairs, torch.is_grad_enabled(), ranks, backend
    sums: Tensor = _DistributedPairSoftplus.apply(*arguments)  # type: ignore[no-untyped-call]
    return sums


class _Once(torch.autograd.Function):
    """A gradient as it is, of these sources; it has no gradient itself.

    Unlike that of ``once_differentiable``, its graph leads to the sources: nobody takes zeros for second
    derivatives.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        message = "gradients over the processes of a group must be differentiated once, got twice"
        raise RuntimeError(message)


def _once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Any:
    """Backward without a graph of its own."""

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradients
        sources = (*ctx.saved_tensors[:3], *grads)
        return tuple(
            None if x is None else _Once.apply(x, *sources)  # type: ignore[no-untyped-call]
            for x in gradients
        )

    return refusing


class _DistributedPairSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        pairs: Pairs,
        columns: bool,
        largest: bool,
        ranks: Ranks,
        backend: str,
    ) -> tuple[Tensor, ...]:
        row_lse = a.new_full((a.shape[0],), -torch.inf, dtype=torch.float64)
        row_positives = torch.zeros_like(row_lse)
        row_largest = row_lse.clone() if largest else row_lse.new_empty(0)

        def step(block: Columns) -> list[Tensor]:
            nonlocal row_lse, row_positives, row_largest
            others = _with_columns(pairs, block)
            sums = _sums(a, block["b"], scale, backend, others, columns, largest)
            row_lse = torch.logaddexp(row_lse, sums.row_lse)
            row_positives = row_positives + sums.row_positives
            row_largest = torch.maximum(row_largest, sums.row_largest)
            return [sums.column_lse, sums.column_positives] if columns else []

        own = _own(b, pairs)
        merges: list[Merge] = ["log_sum_exp", "sum"] if columns else []
        none = [row_lse.new_empty(0), row_lse.new_empty(0)]
        column_lse, column_positives = over_all_columns(ranks, own, step, merges) or none
        ctx.mark_non_differentiable(row_largest)
        ctx.save_for_backward(a, b, scale, row_lse, column_lse)
        ctx.rest = pairs, columns, ranks, backend
        return row_lse, column_lse, row_positives, column_positives, row_largest

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, row_lse, column_lse = ctx.saved_tensors
        pairs, columns, ranks, backend = ctx.rest
        need_a, need_b = ctx.needs_input_grad[:2]
        need_a = need_a or not need_b  # that of the scale is had from one of both
        grad_a = _zeros_for_sum(a)
        grad_scale = scale.new_zeros((), dtype=torch.float64)
        of_rows = {"lse": row_lse, "grad_lse": grads[0], "grad_positives": grads[2]}
        of_columns = {"lse": column_lse, "grad_lse": grads[1], "grad_positives": grads[3]}

        def step(block: Columns) -> list[Tensor]:
            nonlocal grad_scale
            gradients = _gradients(
                a,
                block["b"],
                scale,
                backend,
                _with_columns(pairs, block),
                columns,
                of_rows,
                block if columns else of_columns,
                (need_a, need_b, ctx.needs_input_grad[2]),
            )
            if need_a:
                grad_a.add_(gradients[0])
            grad_scale = grad_scale + gradients[2]
            return [gradients[1].to(grad_a.dtype)] if need_b else []

        own = _own(b, pairs) | (of_columns if columns else {})
        home = over_all_columns(ranks, own, step, ["sum"] if need_b else [])
        return (
            grad_a.to(a.dtype) if need_a else None,
            home[0].to(b.dtype) if need_b else None,
            grad_scale.to(scale.dtype),
            *(None for _ in range(5)),
        )


class _DistributedPairSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor,
        pairs: Pairs,
        wanted: bool,
        ranks: Ranks,
        backend: str,
    ) -> Tensor:
        softplus = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
        sigmoids = torch.zeros_like(softplus)
        # As in the op, what the gradients are if the loss is a mean or a sum of all rows.
        need_a, need_b, need_scale = (wanted and need for need in ctx.needs_input_grad[:3])
        need_a = need_a or (need_scale and not need_b)
        dtype = torch.promote_types(a.dtype, torch.float32)
        unit_a = torch.zeros_like(a, dtype=dtype) if need_a else a.new_empty(0)

        def step(block: Columns) -> list[Tensor]:
            nonlocal softplus, sigmoids
            ids = _with_columns(pairs, block)[1:6]
            made = torch.ops.pyfeat.pair_softplus(
                a, block["b"], scale, bias, backend, *ids, need_a, need_b
            )
            softplus, sigmoids = softplus + made[0], sigmoids + made[1]
            if need_a:
                unit_a.add_(made[2])
            return [made[3].to(dtype)] if need_b else []

        home = over_all_columns(ranks, _own(b, pairs), step, ["sum"] if need_b else [])
        unit_b = home[0] if need_b else b.new_empty(0)
        ctx.save_for_backward(a, b, scale, bias, sigmoids, unit_a, unit_b)
        ctx.rest = pairs, ranks, backend, need_a, need_b
        return softplus

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, bias, sigmoids, unit_a, unit_b = ctx.saved_tensors
        _, ranks, _, need_a, need_b = ctx.rest
        factor = _common_factor(grads[0], ranks)
        if factor is not None:
            by_a, by_b = factor.to(unit_a.dtype) * unit_a, factor.to(unit_b.dtype) * unit_b
        elif need_a or need_b:
            by_a, by_b = _softplus_gradients(ctx, grads[0])
        else:
            by_a = by_b = unit_a
        grad_scale = None
        if ctx.needs_input_grad[2]:
            grad_scale = scale_gradient(*((a, by_a) if need_a else (b, by_b)), scale)
        return (
            by_a.to(a.dtype) if ctx.needs_input_grad[0] else None,
            by_b.to(b.dtype) if need_b else None,
            grad_scale,
            (grads[0] * sigmoids).sum().to(bias.dtype),
            *(None for _ in range(4)),
        )


def _softplus_gradients(ctx: Any, grad_softplus: Tensor) -> tuple[Tensor, Tensor]:
    """By a and b, for rows of any weights."""
    a, b, scale, bias, sigmoids, *_ = ctx.saved_tensors
    pairs, ranks, backend, need_a, need_b = ctx.rest
    by_a = _zeros_for_sum(a)
    no_unit = a.new_empty(0, a.shape[1], dtype=torch.float32)

    def step(block: Columns) -> list[Tensor]:
        gradients = torch.ops.pyfeat.pair_softplus_backward(
            *_widened(a, block["b"]),
            scale,
            bias,
            backend,
            *_with_columns(pairs, block)[1:6],
            sigmoids,
            grad_softplus,
            no_unit,
            no_unit,
            need_a,
            need_b,
        )
        if need_a:
            by_a.add_(gradients[0])
        return [gradients[1].to(by_a.dtype)] if need_b else []

    home = over_all_columns(ranks, _own(b, pairs), step, ["sum"] if need_b else [])
    return by_a, home[0] if need_b else no_unit


def _common_factor(grad_softplus: Tensor, ranks: Ranks) -> Tensor | None:
    """What multiplies the gradients of a sum over all rows, if it is one number on all ranks."""
    factor = grad_softplus[:1].sum()  # 0 without rows
    same = (grad_softplus == factor).all()
    some = torch.full_like(factor, float(len(grad_softplus) > 0))
    told = gathered(torch.stack([factor, same.double(), some]), ranks)
    factors = told[told[:, 2] > 0, 0]
    if bool((told[:, 1] == 1.0).all() & (factors == factors[:1]).all()):
        return factors[:1].sum()
    return None


def _zeros_for_sum(x: Tensor) -> Tensor:
    """In float32 at least: blocks are summed before anything is rounded to 16 bits."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _widened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What the backward ops take: they round to the dtype of features what is yet to be summed.

    On a GPU that is left so for the sake of its units for 16 bits; the CPU multiplies in float32 anyway.
    """
    if a.device.type != "cpu":
        return a, b
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype), b.to(dtype)


def _own(b: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """What travels: columns and what pairs say of them."""
    named = pairs._asdict().items()
    terms = {name: x for name, x in named if name.startswith("column_") and x is not None}
    return {"b": b, **terms}


def _with_columns(pairs: Pairs, block: Columns) -> Pairs:
    """Pairs of the same rows and other columns."""
    terms: dict[str, Any] = {name: block[name] for name in pairs._fields if name in block}
    return pairs._replace(**terms)


def _sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    backend: str,
    pairs: Pairs,
    columns: bool,
    largest: bool,
) -> PairSums:
    # Neither a batch with itself, nor anything kept for the gradients.
    *sums, _ = torch.ops.pyfeat.pair_sums(a, b, scale, backend, *pairs, columns, largest, False, 0)
    return PairSums(*sums)


def _gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    backend: str,
    pairs: Pairs,
    columns: bool,
    of_rows: Columns,
    of_columns: Columns,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """By a, b and scale, of the sums ``lse`` and the gradients by sums of rows and of columns."""
    names = ("lse", "grad_lse", "grad_positives")
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.pyfeat.pair_sums_backward(
        *_widened(a, b),
        scale,
        backend,
        *pairs,
        columns,
        *(of[name] for name in names for of in (of_rows, of_columns)),
        False,
        *needs,
        None,
    )
    return gradients
