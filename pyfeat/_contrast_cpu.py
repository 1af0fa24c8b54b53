"""The ops over all pairs on the CPU: kernels, and blocks in plain torch for float64 features."""

from typing import Any

import torch
from torch import Tensor

from pyfeat import _C, _contrast_blocks
from pyfeat._checks import as_matrix, dtype_name, with_contiguous_rows
from pyfeat._pairs import Pairs, WeightedSide


class KeptPairs:
    """Pairs as the kernels take them, and the tensors that hold them."""

    def __init__(self, pairs: Pairs) -> None:
        self._held = [None if x is None else x.contiguous() for x in pairs[:5]]
        bias, row_ids, column_ids, row_groups, column_groups = (
            0 if x is None else x.data_ptr() for x in self._held
        )
        self.terms = _C.PairTerms(
            bias,
            row_ids,
            column_ids,
            row_groups,
            column_groups,
            pairs.keep_positives,
            pairs.separate_positives,
            pairs.only_positives,
        )


def kept_panels(
    num_rows: int, num_columns: int, dtype: torch.dtype, num_bytes: int
) -> tuple[int, int]:
    """How many row panels of tiles are kept, and the floats they have.

    As many as fit if these are half of them; else as many as fit in a quarter: a small part of many
    tiles saves little.
    """
    panel = _panel_size(num_columns, dtype)
    if panel == 0:
        return 0, 0
    panels = -(-num_rows // _C.tile_shape(getattr(_C.Dtype, dtype_name(dtype)))[0])
    fit = num_bytes // (4 * panel)
    panels = min(panels, fit) if 2 * fit >= panels else fit // 4
    return panels, panels * panel


def _panel_size(num_columns: int, dtype: torch.dtype) -> int:
    """Floats of one row panel of tiles."""
    height, width = _C.tile_shape(getattr(_C.Dtype, dtype_name(dtype)))
    return height * width * -(-num_columns // width)


def _reused(size: int) -> Tensor:
    """(size,) float32, uninitialised, in memory that stays for the next call once it is dropped."""
    if size == 0:
        return torch.empty(0, dtype=torch.float32)
    return torch.frombuffer(_C.ReusedFloats(size), dtype=torch.float32)


def forward(
    a: Tensor, b: Tensor, scale: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, ...]:
    *pairs, columns, largest, itself, kept_bytes = arguments
    if a.dtype == torch.float64:
        sums = _contrast_blocks.sums(a, b, scale, Pairs(*pairs), columns=columns, largest=largest)
        return (*sums, a.new_empty(0, dtype=torch.float32))
    kept_pairs = KeptPairs(Pairs(*pairs))
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    num_rows, num_columns = a.shape[0], 0 if itself else b.shape[0]
    panels, size = kept_panels(num_rows, b.shape[0], a.dtype, kept_bytes)
    kept = _reused(size)
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


def _products(
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
    panels = 0 if kept is None or not len(kept) else len(kept) // _panel_size(len(b), a.dtype)
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
    products = (a.to(grad_a.dtype) * grad_a).sum(dim=1)  # no matrix product: that could be TF32
    gradient = products.sum(dtype=torch.float64) / scale.double()
    return gradient.to(scale.dtype)


def backward(
    a: Tensor, b: Tensor, scale: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *pairs, columns, row_lse, column_lse = arguments[:-9]
    grads, (itself, need_a, need_b, need_scale, kept) = arguments[-9:-5], arguments[-5:]
    need_a = need_a or not need_b
    sides = row_lse, column_lse, *(x.double() for x in grads)
    if a.dtype == torch.float64:
        gradients = _contrast_blocks.gradients(
            a, b, scale, Pairs(*pairs), sides_by_dim(columns, *sides)
        )
        if itself:
            return gradients[0] + gradients[1], b.new_empty(0, b.shape[1]), gradients[2]
        return gradients
    grad_a, grad_b = _products(
        a,
        b,
        scale,
        Pairs(*pairs),
        sides,
        (a, b),
        (need_a, need_b and not itself),
        columns=columns,
        itself=itself,
        kept=kept,
    )
    if not need_scale:
        grad_scale = torch.zeros_like(scale)
    else:
        grad_scale = scale_gradient(*((a, grad_a) if need_a else (b, grad_b)), scale)
    if itself:
        grad_scale = 0.5 * grad_scale  # every pair has been in the gradients of two rows
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale


def weighted(
    a: Tensor, b: Tensor, scale: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *pairs, columns = arguments[:-10]
    row_lse, column_lse, *weights = arguments[-10:-4]
    a_values, b_values, *needs = arguments[-4:]
    sides = row_lse, column_lse, *(x.double() for x in weights)
    if a.dtype == torch.float64 or backend == "reference":
        return _contrast_blocks.products(
            a, b, scale, Pairs(*pairs), sides_by_dim(columns, *sides), a_values, b_values
        )
    products = _products(
        a,
        b,
        scale,
        Pairs(*pairs),
        (*sides[:2], *(x / scale.double() for x in sides[2:])),
        (a_values, b_values),
        (needs[0], needs[1]),
        columns=columns,
    )
    return products[0].to(b_values.dtype), products[1].to(a_values.dtype)


def sides_by_dim(columns: bool, *vectors: Tensor) -> _contrast_blocks.Sides:
    """From log-sum-exps, gradients by them and by positive sums, each of rows and of columns."""
    by_dim = (vectors[1::2], vectors[::2])
    return {dim: WeightedSide(*by_dim[dim]) for dim in ((0, 1) if columns else (1,))}
