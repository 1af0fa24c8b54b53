"""The ops behind every loss over all pairs: sums over rows and columns of similarities.

A loss is arithmetic on these sums, and its gradient by the similarities needs no more than the
gradients by the sums: for L(row_lse, column_lse, row_positives, column_positives),

    dL/dS_ij = g_row_i exp(S_ij - row_lse_i) + g_column_j exp(S_ij - column_lse_j)
               + (g_row_positives_i + g_column_positives_j where ij is positive),

so the kernels compute tiles of S a second time, but for those that were kept, and use each for both
gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import as_matrix, with_contiguous_rows


class Pairs(NamedTuple):
    """What is said of the pairs: a bias (S,) float32, and ids (L,) or (S,) int32, at least 0.

    Pairs of equal ids are positive; pairs of equal groups are left out, positive ones only if they are
    not kept. With ``separate_positives`` log-sum-exps are over what is not positive: where one
    similarity outweighs all others, its distance to them keeps its digits. With ``only_positives``
    they are over what is positive.
    """

    column_bias: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    keep_positives: bool = False
    separate_positives: bool = False
    only_positives: bool = False


class PairSums(NamedTuple):
    """Of S, float64: log-sum-exps and sums over positives; (0,) where they are not wanted.

    ``row_largest`` is over what counts and is not positive, and has no gradient. Where nothing counts,
    log-sum-exps and largest are -inf.
    """

    row_lse: Tensor  # (L,)
    column_lse: Tensor  # (S,)
    row_positives: Tensor  # (L,)
    column_positives: Tensor  # (S,)
    row_largest: Tensor  # (L,)


class WeightedSide(NamedTuple):
    """Of the rows or of the columns, float64: what ``weighted_features`` makes of their pairs."""

    lse: Tensor
    weights: Tensor
    positives: Tensor


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
    f"(Tensor a, Tensor b, Tensor scale, {PAIRS_SCHEMA}, bool columns, bool largest,"
    " bool itself, int kept_bytes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_sums_backward",
    f"(Tensor a, Tensor b, Tensor scale, {PAIRS_SCHEMA}, bool columns, {_GRADS_SCHEMA},"
    " bool itself, bool need_a, bool need_b, Tensor? kept)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::weighted_features",
    f"(Tensor a, Tensor b, Tensor scale, {PAIRS_SCHEMA}, bool columns, {_GRADS_SCHEMA},"
    " Tensor a_values, Tensor b_values, bool need_a, bool need_b) -> (Tensor, Tensor)",
)

_memory_budget = 256 << 20


def memory_budget() -> int:
    """Bytes of similarities that the forward pass of a loss may keep for its backward pass."""
    return _memory_budget


def set_memory_budget(num_bytes: int) -> None:
    """Let the losses keep so many bytes of similarities from the forward to the backward pass.

    What is kept is not computed again: with all 4 N M bytes a third product of matrices in four is
    saved. 256 MiB to begin with; on the CPU only.

    Args:
        num_bytes: At least 0.

    Raises:
        ValueError: If it is negative.

    Examples:
        >>> set_memory_budget(256 << 20)
    """
    global _memory_budget
    if num_bytes < 0:
        message = f"set_memory_budget: num_bytes must be at least 0, got {num_bytes}"
        raise ValueError(message)
    _memory_budget = int(num_bytes)


def pair_sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    columns: bool = True,
    largest: bool = False,
    itself: bool = False,
) -> PairSums:
    """Sums over the rows and columns of ``S = scale * a @ b.T + column_bias``; differentiable.

    Args:
        a: (L, D) float32, float16 or bfloat16, finite.
        b: (S, D), dtype and device of ``a``.
        scale: () float, positive.
        pairs: Constants.
        columns: Whether sums over columns are wanted.
        largest: Whether the largest of every row is wanted.
        itself: ``b`` is ``a``, and pairs say the same of ij and ji: takes half of the products. Not with
            ``columns``, which would be the same as rows, or a bias.
    """
    wanted = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or scale.requires_grad)
    kept_bytes = memory_budget() if wanted and a.device.type == "cpu" else 0
    *sums, _ = torch.ops.pyfeat.pair_sums(a, b, scale, *pairs, columns, largest, itself, kept_bytes)
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
    """
    sides = columns or WeightedSide(*(rows.lse.new_empty(0) for _ in range(3)))
    products: tuple[Tensor, Tensor] = torch.ops.pyfeat.weighted_features(
        a,
        b,
        scale,
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


class KeptPairs:
    """Pairs as the kernels take them, and the tensors that hold them."""

    def __init__(self, pairs: Pairs) -> None:
        self._held = [None if x is None else x.contiguous() for x in pairs[:5]]
        bias, *ids = (0 if x is None else x.data_ptr() for x in self._held)
        self.terms = _C.PairTerms(bias, *ids, *pairs[5:])


def kept_panels(num_rows: int, num_columns: int, num_bytes: int) -> tuple[int, int]:
    """How many row panels of tiles fit, and the floats they have."""
    height, width = _C.tile_shape()
    panel = height * width * -(-num_columns // width)
    panels = min(-(-num_rows // height), num_bytes // (4 * panel)) if panel else 0
    return panels, panels * panel


def _forward_cpu(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *pairs, columns, largest, itself, kept_bytes = arguments
    kept_pairs = KeptPairs(Pairs(*pairs))
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    num_rows, num_columns = a.shape[0], 0 if itself else b.shape[0]
    panels, size = kept_panels(num_rows, b.shape[0], kept_bytes)
    kept = torch.empty(size, dtype=torch.float32)
    row_lse = torch.empty(num_rows, dtype=torch.float64)
    column_lse = torch.empty(num_columns, dtype=torch.float64)
    row_positives, column_positives = torch.empty_like(row_lse), torch.empty_like(column_lse)
    row_largest = torch.empty(num_rows if largest else 0, dtype=torch.float64)
    _C.log_sum_exp_cpu(
        as_matrix(a),
        as_matrix(b),
        float(scale),
        _C.Dtype.float32,
        row_lse.data_ptr(),
        column_lse.data_ptr(),
        torch.get_num_threads(),
        pairs=kept_pairs.terms,
        row_positives=row_positives.data_ptr(),
        column_positives=column_positives.data_ptr() if columns else 0,
        row_largest=row_largest.data_ptr() if largest else 0,
        itself=itself,
        kept=(kept.data_ptr(), panels),
    )
    if not columns:
        column_lse, column_positives = column_lse.new_empty(0), column_lse.new_empty(0)
    return row_lse, column_lse, row_positives, column_positives, row_largest, kept


def _products_cpu(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    sides: tuple[Tensor, ...],
    values: tuple[Tensor, Tensor],
    needs: tuple[bool, bool],
    *,
    columns: bool,
    itself: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scale`` times the products of ``weighted_features``, float32."""
    row_lse, column_lse, *weights = (x.double().contiguous() for x in sides)
    row_weights, column_weights, row_positives, column_positives = weights
    kept_pairs = KeptPairs(pairs)
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    a_values, b_values = (with_contiguous_rows(x) for x in values)
    by_a = torch.empty((len(a) if needs[0] else 0, b_values.shape[1]), dtype=torch.float32)
    by_b = torch.empty((len(b) if needs[1] else 0, a_values.shape[1]), dtype=torch.float32)
    panels = kept_panels(len(a), len(b), 0 if kept is None else 4 * len(kept))[0]
    row_side = (row_lse.data_ptr(), row_weights.data_ptr(), row_positives.data_ptr())
    column_side = (column_lse.data_ptr(), column_weights.data_ptr(), column_positives.data_ptr())
    _C.contrast_gradient_cpu(
        as_matrix(a),
        as_matrix(b),
        float(scale),
        kept_pairs.terms,
        row_side,
        row_side if itself else column_side if columns else (0, 0, 0),
        (
            as_matrix(a_values),
            as_matrix(b_values),
            by_a.data_ptr() if needs[0] else 0,
            by_b.data_ptr() if needs[1] else 0,
        ),
        torch.get_num_threads(),
        itself=itself,
        kept=(0 if kept is None else kept.data_ptr(), panels),
    )
    return by_a, by_b


def scale_gradient(a: Tensor, grad_a: Tensor, scale: Tensor) -> Tensor:
    """dL/dscale = <a, dL/da> / scale, at the price of one product of (L, D)."""
    products = torch.einsum("ld,ld->l", a.float(), grad_a)
    gradient = products.sum(dtype=torch.float64) / scale.double()
    return gradient.to(scale.dtype)


def _backward_cpu(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *pairs, columns, row_lse, column_lse = arguments[:-8]
    grads, (itself, need_a, need_b, kept) = arguments[-8:-4], arguments[-4:]
    need_a = need_a or not need_b
    grad_a, grad_b = _products_cpu(
        a,
        b,
        scale,
        Pairs(*pairs),
        (row_lse, column_lse, *grads),
        (a, b),
        (need_a, need_b and not itself),
        columns=columns,
        itself=itself,
        kept=kept,
    )
    grad_scale = scale_gradient(*((a, grad_a) if need_a else (b, grad_b)), scale)
    if itself:
        grad_scale = 0.5 * grad_scale  # every pair has been in the gradients of two rows
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale


def _weighted_cpu(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *pairs, columns = arguments[:-10]
    row_lse, column_lse, *weights = arguments[-10:-4]
    a_values, b_values, *needs = arguments[-4:]
    products = _products_cpu(
        a,
        b,
        scale,
        Pairs(*pairs),
        (row_lse, column_lse, *(x.double() / scale.double() for x in weights)),
        (a_values, b_values),
        (needs[0], needs[1]),
        columns=columns,
    )
    return products[0].to(b_values.dtype), products[1].to(a_values.dtype)


def _forward_fake(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, columns, largest, itself, kept_bytes = arguments
    num_rows, num_columns = a.shape[0], b.shape[0] if columns and not itself else 0
    sizes = (num_rows, num_columns, num_rows, num_columns, num_rows if largest else 0)
    size = kept_panels(num_rows, b.shape[0], kept_bytes)[1]
    sums = [a.new_empty(size, dtype=torch.float64) for size in sizes]
    return (*sums, a.new_empty(size, dtype=torch.float32))


def _backward_fake(
    a: Tensor, b: Tensor, scale: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    itself, need_a, need_b, _ = arguments[-4:]
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
    *pairs, columns, _, itself, _ = ctx.rest
    sides = (row_lse, column_lse, row_lse, column_lse)
    given = [
        torch.zeros_like(side) if grad is None else grad
        for side, grad in zip(sides, grads[:4], strict=True)
    ]
    need_a, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not itself
    grad_a, grad_b, grad_scale = torch.ops.pyfeat.pair_sums_backward(
        a, b, scale, *pairs, columns, row_lse, column_lse, *given, itself, need_a, need_b, kept
    )
    return (
        grad_a if need_a else None,
        grad_b if need_b else None,
        grad_scale,
        *(None for _ in ctx.rest),
    )


torch.library.impl("pyfeat::pair_sums", "CPU", _forward_cpu)
torch.library.impl("pyfeat::pair_sums_backward", "CPU", _backward_cpu)
torch.library.impl("pyfeat::weighted_features", "CPU", _weighted_cpu)
torch.library.register_fake("pyfeat::pair_sums", _forward_fake)
torch.library.register_fake("pyfeat::pair_sums_backward", _backward_fake)
torch.library.register_fake("pyfeat::weighted_features", _weighted_fake)
torch.library.register_autograd("pyfeat::pair_sums", _backward, setup_context=_keep_for_backward)
