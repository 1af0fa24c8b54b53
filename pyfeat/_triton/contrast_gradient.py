"""The gradient of log-sum-exps and positive sums by the similarities."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._gpu.contrast_pairs import AllPairs
from pyfeat._pairs import WeightedSide
from pyfeat._triton.contrast_products import store_gradient
from pyfeat._triton.contrast_tiles import (
    LOG2_E,
    halves,
    pair_arguments,
    pair_constants,
    similarities,
    tile_products,
    which_count,
    which_have_power,
)
from pyfeat._triton.tiles import SWEEP, TileConfig, swizzled

_LINES = 256


def write_gradient(
    block: AllPairs,
    tile: TileConfig,
    row_terms: Tensor,
    column_terms: Tensor | None,
    gradient: Tensor,
) -> Tensor:
    """See ``ContrastKernels``."""
    num_tiles = tile.num_tiles(block.num_rows, block.num_columns)
    sums = block.a.new_empty(num_tiles, dtype=torch.float32)
    _pair_gradient_kernel[(num_tiles,)](
        *pair_arguments(block),
        row_terms,
        row_terms.stride(0),
        row_terms if column_terms is None else column_terms,
        row_terms.stride(0) if column_terms is None else column_terms.stride(0),
        gradient,
        gradient.stride(0),
        sums,
        COLUMNS=column_terms is not None,
        SEPARATE_POSITIVES=block.pairs.separate_positives,
        ONLY_POSITIVES=block.pairs.only_positives,
        **pair_constants(block, tile),
    )
    return sums


def gradient_terms(side: WeightedSide, factor: Tensor) -> Tensor:
    """See ``ContrastKernels``."""
    num_lines = len(side.lse)
    terms = torch.empty((3, num_lines), dtype=torch.float32, device=side.lse.device)
    _gradient_terms_kernel[(triton.cdiv(num_lines, _LINES),)](
        *(x.double().contiguous() for x in side),
        factor,
        terms,
        num_lines,
        LINES=_LINES,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return terms


@triton.jit(do_not_specialize=["num_lines"])
def _gradient_terms_kernel(
    lse,  # [lines] float64
    weights,  # [lines] float64
    positives,  # [lines] float64
    factor,  # [] float64
    terms,  # [3, lines] float32
    num_lines,
    LINES: tl.constexpr,
):
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    live = line < num_lines
    factor = tl.load(factor)
    exponent = tl.load(lse + line, mask=live, other=0.0) * LOG2_E
    # Where nothing counts: a shift at which no power of 2 is left.
    some = exponent > float("-inf")
    exponent = tl.where(some, exponent, 0.0)
    shift = tl.floor(exponent + 0.5)
    weight = factor * tl.load(weights + line, mask=live, other=0.0) * tl.exp2(shift - exponent)
    positive = factor * tl.load(positives + line, mask=live, other=0.0)
    tl.store(terms + line, tl.where(some, shift, 1e38).to(tl.float32), mask=live)
    tl.store(terms + num_lines + line, tl.where(some, weight, 0.0).to(tl.float32), mask=live)
    tl.store(terms + 2 * num_lines + line, positive.to(tl.float32), mask=live)


@triton.jit
def _softmax_gradient(exponents, terms, plane, line, num_lines, AXIS: tl.constexpr):
    """``weight 2^(z - shift)`` of a tile, with the terms of the lines that lie across AXIS."""
    live = line < num_lines
    shift = tl.load(terms + line, mask=live, other=0.0)
    weight = tl.load(terms + plane + line, mask=live, other=0.0)
    return tl.expand_dims(weight, AXIS) * tl.exp2(exponents - tl.expand_dims(shift, AXIS))


@triton.jit
def _store_half(
    products,  # [rows, columns]
    row,
    column,
    scale,
    bias,
    row_ids,
    column_ids,
    row_groups,
    column_groups,
    num_rows,
    num_columns,
    row_terms,
    row_plane,
    column_terms,
    column_plane,
    gradient,
    gradient_stride,
    COLUMNS: tl.constexpr,
    SEPARATE_POSITIVES: tl.constexpr,
    ONLY_POSITIVES: tl.constexpr,
    BIAS: tl.constexpr,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP_POSITIVES: tl.constexpr,
):
    """Store the gradient of these columns of a tile; the sums of G a.b over them, of every row."""
    exponents = similarities(products, column, LOG2_E, scale, bias, num_columns, BIAS)
    counted, positive = which_count(
        row,
        column,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    counted = which_have_power(counted, positive, SEPARATE_POSITIVES, ONLY_POSITIVES)
    exponents = tl.where(counted, exponents, float("-inf"))
    value = _softmax_gradient(exponents, row_terms, row_plane, row, num_rows, 1)
    if COLUMNS:
        value += _softmax_gradient(exponents, column_terms, column_plane, column, num_columns, 0)
    if IDS:
        live = row < num_rows
        pulled = tl.load(row_terms + 2 * row_plane + row, mask=live, other=0.0)[:, None]
        if COLUMNS:
            live = column < num_columns
            pulls = tl.load(column_terms + 2 * column_plane + column, mask=live, other=0.0)
            pulled = pulled + pulls[None, :]
        value += tl.where(positive, pulled, 0.0)
    store_gradient(value, row, column, gradient, gradient_stride)
    return tl.sum(value * products, axis=1)


# One program for each tile of BLOCK_M rows and BLOCK_N columns. Bound by the product, 2 D
# operations for each pair; beside it come two exponentials, and the gradient is stored once.
@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _pair_gradient_kernel(
    a,
    a_stride,
    b,
    b_stride,
    scale,
    bias,
    row_ids,
    column_ids,
    row_groups,
    column_groups,
    num_rows,
    num_columns,
    dim,
    row_terms,  # [3, L] float32: shift, weight, positive
    row_plane,
    column_terms,  # [3, S] if COLUMNS
    column_plane,
    gradient,  # [L, S] float32, float16 or bfloat16
    gradient_stride,
    sums,  # [tiles] float32, of G a.b before it is rounded to 16 bits
    COLUMNS: tl.constexpr,
    SEPARATE_POSITIVES: tl.constexpr,
    ONLY_POSITIVES: tl.constexpr,
    BIAS: tl.constexpr,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP_POSITIVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tile, column_tile = swizzled(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N), SWEEP
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tile_products(
        row,
        column,
        a,
        a_stride,
        b,
        b_stride,
        num_rows,
        num_columns,
        dim,
        EVEN_K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    left, right = halves(products)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    weighted = _store_half(
        left,
        row,
        column,
        scale,
        bias,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        row_terms,
        row_plane,
        column_terms,
        column_plane,
        gradient,
        gradient_stride,
        COLUMNS,
        SEPARATE_POSITIVES,
        ONLY_POSITIVES,
        BIAS,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    column += BLOCK_N // 2
    weighted += _store_half(
        right,
        row,
        column,
        scale,
        bias,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        row_terms,
        row_plane,
        column_terms,
        column_plane,
        gradient,
        gradient_stride,
        COLUMNS,
        SEPARATE_POSITIVES,
        ONLY_POSITIVES,
        BIAS,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    tl.store(sums + tl.program_id(0), tl.sum(weighted))
