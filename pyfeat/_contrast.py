"""The op behind every loss over all pairs: sums over rows and columns of similarities.

A loss is arithmetic on these sums, and its gradient by the similarities needs no more than the
gradients by the sums: for L(row_lse, column_lse, row_positives, column_positives),

    dL/dS_ij = g_row_i exp(S_ij - row_lse_i) + g_column_j exp(S_ij - column_lse_j)
               + (g_row_positives_i + g_column_positives_j where ij is positive),

so the kernels compute tiles of S a second time and use each for both gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat import _C, _contrast_blocks, _contrast_second
from pyfeat._checks import as_matrix, with_contiguous_rows


class Pairs(NamedTuple):
    """What is said of the pairs: a bias (S,) float32, and ids (L,) or (S,) int32, at least 0.

    Pairs of equal ids are positive; pairs of equal groups are left out, positive ones only if they are
    not kept. With ``separate_positives`` log-sum-exps are over what is not positive: where one
    similarity outweighs all others, its distance to them keeps its digits.
    """

    column_bias: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    keep_positives: bool = False
    separate_positives: bool = False


class PairSums(NamedTuple):
    """Of S, float64: log-sum-exps and sums over positives; of columns (0,) if they are not wanted."""

    row_lse: Tensor  # (L,)
    column_lse: Tensor  # (S,)
    row_positives: Tensor  # (L,)
    column_positives: Tensor  # (S,)


_PAIRS = (
    "Tensor? column_bias, Tensor? row_ids, Tensor? column_ids, Tensor? row_groups,"
    " Tensor? column_groups, bool keep_positives, bool separate_positives"
)
torch.library.define(
    "pyfeat::pair_sums",
    f"(Tensor a, Tensor b, Tensor scale, {_PAIRS}, bool columns)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_sums_backward",
    f"(Tensor a, Tensor b, Tensor scale, {_PAIRS}, bool columns, Tensor row_lse, Tensor column_lse,"
    " Tensor grad_row_lse, Tensor grad_column_lse, Tensor grad_row_positives,"
    " Tensor grad_column_positives) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_sums_second",
    f"(Tensor a, Tensor b, Tensor scale, {_PAIRS}, bool columns, Tensor row_lse, Tensor column_lse,"
    " Tensor grad_row_lse, Tensor grad_column_lse, Tensor grad_row_positives,"
    " Tensor grad_column_positives, Tensor by_grad_a, Tensor by_grad_b, Tensor by_grad_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def pair_sums(
    a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, *, columns: bool = True
) -> PairSums:
    """Sums over the rows and columns of ``S = scale * a @ b.T + column_bias``; differentiable.

    Args:
        a: (L, D) float32, float64, float16 or bfloat16, finite.
        b: (S, D), dtype and device of ``a``.
        scale: () float, positive.
        pairs: Constants.
        columns: Whether sums over columns are wanted.
    """
    return PairSums(*torch.ops.pyfeat.pair_sums(a, b, scale, *pairs, columns))


class KeptPairs:
    """Pairs as the kernels take them, and the tensors that hold them."""

    def __init__(self, pairs: Pairs) -> None:
        self._held = [None if x is None else x.contiguous() for x in pairs[:5]]
        bias, *ids = (0 if x is None else x.data_ptr() for x in self._held)
        self.terms = _C.PairTerms(
            bias,
            ids[0],
            ids[1],
            ids[2],
            ids[3],
            pairs.keep_positives,
            pairs.separate_positives,
        )


def _forward_cpu(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *pairs, columns = arguments
    if a.dtype == torch.float64:
        return _contrast_blocks.sums(a, b, scale, Pairs(*pairs), columns=columns)
    kept = KeptPairs(Pairs(*pairs))
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    num_rows, num_columns = a.shape[0], b.shape[0]
    row_lse = torch.empty(num_rows, dtype=torch.float64)
    column_lse = torch.empty(num_columns, dtype=torch.float64)
    row_positives, column_positives = torch.empty_like(row_lse), torch.empty_like(column_lse)
    _C.log_sum_exp_cpu(
        as_matrix(a),
        as_matrix(b),
        float(scale),
        _C.Dtype.float32,
        row_lse.data_ptr(),
        column_lse.data_ptr(),
        torch.get_num_threads(),
        pairs=kept.terms,
        row_positives=row_positives.data_ptr(),
        column_positives=column_positives.data_ptr() if columns else 0,
    )
    if not columns:
        return row_lse, column_lse.new_empty(0), row_positives, column_lse.new_empty(0)
    return row_lse, column_lse, row_positives, column_positives


def _backward_cpu(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *pairs, columns, row_lse, column_lse = arguments[:-4]
    grads = [grad.double().contiguous() for grad in arguments[-4:]]
    grad_rows, grad_columns, grad_row_positives, grad_column_positives = grads
    if a.dtype == torch.float64:
        sides = _sides(columns, row_lse, column_lse, *grads)
        return _contrast_blocks.gradients(a, b, scale, Pairs(*pairs), sides)
    kept = KeptPairs(Pairs(*pairs))
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    grad_a = torch.empty(a.shape, dtype=torch.float32)
    grad_b = torch.empty(b.shape, dtype=torch.float32)
    _C.contrast_gradient_cpu(
        as_matrix(a),
        as_matrix(b),
        float(scale),
        kept.terms,
        (row_lse.data_ptr(), grad_rows.data_ptr(), grad_row_positives.data_ptr()),
        (
            (column_lse.data_ptr(), grad_columns.data_ptr(), grad_column_positives.data_ptr())
            if columns
            else (0, 0, 0)
        ),
        grad_a.data_ptr(),
        grad_b.data_ptr(),
        torch.get_num_threads(),
    )
    # dL/dlog(scale) = sum of dL/dS S = <a, dL/da>, at the price of one product of (L, D).
    products = torch.einsum("ld,ld->l", a.float(), grad_a)
    grad_scale = products.sum(dtype=torch.float64) / scale.double()
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale.to(scale.dtype)


def _forward_fake(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_columns = b.shape[0] if arguments[-1] else 0
    rows = [a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(2)]
    columns = [a.new_empty(num_columns, dtype=torch.float64) for _ in range(2)]
    return rows[0], columns[0], rows[1], columns[1]


def _backward_fake(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape), scale.new_empty(())


def _sides(columns: bool, *vectors: Tensor) -> _contrast_blocks.Sides:
    """From log-sum-exps, gradients by them and by positive sums, each of rows and of columns."""
    by_dim = (vectors[1::2], vectors[::2])
    return {dim: _contrast_blocks.Side(*by_dim[dim]) for dim in ((0, 1) if columns else (1,))}


def _second(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *pairs, columns = arguments[:-9]
    sides = _sides(columns, *(x.double() for x in arguments[-9:-3]))
    return _contrast_second.second_gradients(a, b, scale, Pairs(*pairs), sides, arguments[-3:])


def _second_fake(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    vectors = [x.new_empty(x.shape, dtype=torch.float64) for x in arguments[-7:-3]]
    return (*_backward_fake(a, b, scale), *vectors)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, scale, *ctx.rest = inputs
    ctx.save_for_backward(a, b, scale, output[0], output[1])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    a, b, scale, row_lse, column_lse = ctx.saved_tensors
    grad_rows, grad_columns, grad_row_positives, grad_column_positives = grads
    gradients = torch.ops.pyfeat.pair_sums_backward(
        a,
        b,
        scale,
        *ctx.rest,
        row_lse,
        column_lse,
        grad_rows,
        grad_columns,
        grad_row_positives,
        grad_column_positives,
    )
    return (*gradients, *(None for _ in ctx.rest))


torch.library.impl("pyfeat::pair_sums", "CPU", _forward_cpu)
torch.library.impl("pyfeat::pair_sums_backward", "CPU", _backward_cpu)
torch.library.register_fake("pyfeat::pair_sums", _forward_fake)
torch.library.register_fake("pyfeat::pair_sums_backward", _backward_fake)
torch.library.register_autograd("pyfeat::pair_sums", _backward, setup_context=_keep_for_backward)
torch.library.impl("pyfeat::pair_sums_second", "default", _second)
torch.library.register_fake("pyfeat::pair_sums_second", _second_fake)
torch.library.register_autograd(
    "pyfeat::pair_sums_backward",
    _contrast_second.second,
    setup_context=_contrast_second.keep_for_second,
)
torch.library.register_autograd("pyfeat::pair_sums_second", _contrast_second.refuse_third)
