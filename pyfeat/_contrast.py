"""The ops behind every loss over all pairs: sums over rows and columns of similarities.

A loss is arithmetic on these sums, and its gradient by the similarities needs no more than the
gradients by the sums: for L(row_lse, column_lse, row_positives, column_positives),

    dL/dS_ij = g_row_i exp(S_ij - row_lse_i) + g_column_j exp(S_ij - column_lse_j)
               + (g_row_positives_i + g_column_positives_j where ij is positive),

so the kernels compute tiles of S a second time, but for those that were kept, and use each for both
gradients.
"""

from typing import Any

import torch
from torch import Tensor

from pyfeat import _C, _contrast_cpu, _contrast_cuda, _contrast_second
from pyfeat._backends import Backend
from pyfeat._contrast_cpu import kept_panels, sides_by_dim
from pyfeat._derivatives import differentiable
from pyfeat._pairs import Pairs, PairSums, WeightedSide

__all__ = [
    "PairSums",
    "Pairs",
    "WeightedSide",
    "memory_budget",
    "pair_sums",
    "set_memory_budget",
    "weighted_features",
]

PAIRS_SCHEMA = (
    "Tensor? column_bias, Tensor? row_ids, Tensor? column_ids, Tensor? row_groups,"
    " Tensor? column_groups, bool keep_positives, bool separate_positives, bool only_positives"
)
_GRADS_SCHEMA = (
    "Tensor row_lse, Tensor column_lse, Tensor grad_row_lse, Tensor grad_column_lse,"
    " Tensor grad_row_positives, Tensor grad_column_positives"
)
torch.library.define(
    "pyfeat::pair_sums",
    f"(Tensor a, Tensor b, Tensor scale, str backend, {PAIRS_SCHEMA}, bool columns, bool largest,"
    " bool itself, int kept_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_sums_backward",
    f"(Tensor a, Tensor b, Tensor scale, str backend, {PAIRS_SCHEMA}, bool columns,"
    f" {_GRADS_SCHEMA}, bool itself, bool need_a, bool need_b, bool need_scale, Tensor? kept)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_sums_second",
    f"(Tensor a, Tensor b, Tensor scale, {PAIRS_SCHEMA}, bool columns, {_GRADS_SCHEMA},"
    " Tensor by_grad_a, Tensor by_grad_b, Tensor by_grad_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::weighted_features",
    f"(Tensor a, Tensor b, Tensor scale, str backend, {PAIRS_SCHEMA}, bool columns,"
    f" {_GRADS_SCHEMA}, Tensor a_values, Tensor b_values, bool need_a, bool need_b)"
    " -> (Tensor, Tensor)",
)

_memory_budget = 1 << 30


def memory_budget() -> int:
    """Bytes of similarities that the forward pass of a loss may keep for its backward pass."""
    return _memory_budget


def set_memory_budget(num_bytes: int) -> None:
    """Let the losses keep so many bytes of similarities from the forward to the backward pass.

    What is kept is not computed again: all 4 N M bytes save one product of matrices in four. If less
    than half of these fit, a quarter of the budget is used, for a small part saves little. 1 GiB to begin
    with; on the CPU only, and not of float64 features. The memory stays for the next call, Linux takes it
    back when it runs short; to set the budget gives it up.

    Args:
        num_bytes: At least 0.

    Raises:
        ValueError: If it is negative.

    Examples:
        >>> set_memory_budget(1 << 30)
    """
    global _memory_budget
    if num_bytes < 0:
        message = f"set_memory_budget: num_bytes must be at least 0, got {num_bytes}"
        raise ValueError(message)
    _memory_budget = int(num_bytes)
    _C.ReusedFloats.forget()


def pair_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    columns: bool = True,
    largest: bool = False,
    backend: Backend = "cpu",
) -> PairSums:
    """Sums over the rows and columns of ``S = scale * a @ b.T + column_bias``; differentiable twice.

    Where ``b`` is ``a``, and so are ids and groups of columns those of rows, rows take half of the
    products.

    Args:
        a: (L, D) float32, float64, float16 or bfloat16, finite.
        b: (S, D), dtype and device of ``a``.
        scale: () float, positive.
        pairs: Constants.
        columns: Whether sums over columns are wanted.
        largest: Whether the largest of every row is wanted.
        backend: Which was chosen for the features, not the reference.
    """
    wanted = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or scale.requires_grad)
    itself = (
        b is a
        and not columns
        and pairs.column_bias is None
        and pairs.column_ids is pairs.row_ids
        and pairs.column_groups is pairs.row_groups
    )
    keeps = wanted and a.device.type == "cpu" and a.dtype != torch.float64
    kept_bytes = memory_budget() if keeps else 0
    *sums, _ = _pair_sums(a, b, scale, backend, *pairs, columns, largest, itself, kept_bytes)
    return PairSums(*sums)


def weighted_features(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    rows: WeightedSide,
    columns: WeightedSide | None,
    a_values: Tensor,
    b_values: Tensor,
    *,
    need_a: bool = True,
    need_b: bool = True,
    backend: Backend = "cpu",
) -> tuple[Tensor, Tensor]:
    """``G @ b_values`` (L, F) and ``G.T @ a_values`` (S, E), without G (L, S); not differentiable.

    With S as in ``pair_sums``, ``G_ij = rows.weights_i exp(S_ij - rows.lse_i)`` plus the same of the
    columns, plus ``rows.positives_i + columns.positives_j`` where ij is positive. With all weights 1 the
    first product is attention without its matrix.

    Args:
        a: (L, D).
        b: (S, D).
        scale: () float, positive.
        pairs: Constants.
        rows: (L,) each.
        columns: (S,) each; None: they have no part.
        a_values: (L, E), dtype and device of ``a``.
        b_values: (S, F), dtype and device of ``a``.
        need_a: Whether the first product is wanted; (0, F) otherwise.
        need_b: Whether the second is; (0, E) otherwise.
        backend: Which was chosen for the features; the reference is plain torch.
    """
    sides = columns or WeightedSide(*(rows.lse.new_empty(0) for _ in range(3)))
    products: tuple[Tensor, Tensor] = torch.ops.pyfeat.weighted_features(
        a,
        b,
        scale,
        backend,
        *pairs,
        columns is not None,
        rows.lse,
        sides.lse,
        rows.weights,
        sides.weights,
        rows.positives,
        sides.positives,
        a_values,
        b_values,
        need_a,
        need_b,
    )
    return products


def _forward_fake(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, columns, largest, itself, kept_bytes = arguments
    num_rows, num_columns = a.shape[0], b.shape[0] if columns and not itself else 0
    sizes = (num_rows, num_columns, num_rows, num_columns, num_rows if largest else 0)
    size = kept_panels(num_rows, b.shape[0], a.dtype, kept_bytes)[1]
    sums = [a.new_empty(size, dtype=torch.float64) for size in sizes]
    return (*sums, a.new_empty(size, dtype=torch.float32))


def _backward_fake(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    itself, need_a, need_b, _, _ = arguments[-5:]
    num_rows = a.shape[0] if need_a or not need_b else 0
    num_columns = b.shape[0] if need_b and not itself else 0
    dim = a.shape[1]
    return a.new_empty(num_rows, dim), b.new_empty(num_columns, dim), scale.new_empty(())


def _weighted_fake(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    a_values, b_values, need_a, need_b = arguments[-4:]
    return (
        b_values.new_empty(a.shape[0] if need_a else 0, b_values.shape[1]),
        a_values.new_empty(b.shape[0] if need_b else 0, a_values.shape[1]),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, scale, *ctx.rest = inputs
    row_lse, column_lse, _, _, row_largest, kept = output
    ctx.mark_non_differentiable(row_largest, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, scale, row_lse, column_lse, kept)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, scale, row_lse, column_lse, kept = ctx.saved_tensors
    backend, *pairs, columns, _, itself, _ = ctx.rest
    sides = (row_lse, column_lse, row_lse, column_lse)
    given = [
        torch.zeros_like(side) if grad is None else grad
        for side, grad in zip(sides, grads[:4], strict=True)
    ]
    need_a, need_b, need_scale = ctx.needs_input_grad[:3]
    need_b = need_b and not itself
    needs = need_a, need_b, need_scale
    grad_a, grad_b, grad_scale = _pair_sums_backward(
        *(a, b, scale, backend, *pairs, columns),
        *(row_lse, column_lse, *given, itself, *needs, kept),
    )
    return (
        grad_a if need_a else None,
        grad_b if need_b else None,
        grad_scale if need_scale else None,
        *(None for _ in ctx.rest),
    )


def _second(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *pairs, columns = arguments[:-9]
    sides = sides_by_dim(columns, *(x.double() for x in arguments[-9:-3]))
    return _contrast_second.second_gradients(a, b, scale, Pairs(*pairs), sides, arguments[-3:])


def _second_fake(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    vectors = [x.new_empty(x.shape, dtype=torch.float64) for x in arguments[-7:-3]]
    return (a.new_empty(a.shape), b.new_empty(b.shape), scale.new_empty(()), *vectors)


torch.library.impl("pyfeat::weighted_features", "CPU", _contrast_cpu.weighted)
torch.library.impl("pyfeat::weighted_features", "CUDA", _contrast_cuda.weighted)
torch.library.register_fake("pyfeat::pair_sums", _forward_fake)
torch.library.register_fake("pyfeat::pair_sums_backward", _backward_fake)
torch.library.register_fake("pyfeat::weighted_features", _weighted_fake)
_pair_sums = differentiable(
    "pair_sums",
    {"cpu": _contrast_cpu.forward, "cuda": _contrast_cuda.forward},
    _backward,
    _keep_for_backward,
)
_pair_sums_backward = differentiable(
    "pair_sums_backward",
    {"cpu": _contrast_cpu.backward, "cuda": _contrast_cuda.backward},
    _contrast_second.second,
    _contrast_second.keep_for_second,
)
torch.library.impl("pyfeat::pair_sums_second", "default", _second)
torch.library.register_fake("pyfeat::pair_sums_second", _second_fake)
torch.library.register_autograd("pyfeat::pair_sums_second", _contrast_second.refuse_third)
