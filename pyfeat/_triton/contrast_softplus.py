"""Sums of softplus over all pairs and their gradient by the similarities.

It needs no sum over others: one pass over tiles gives both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._gpu.contrast_pairs import AllPairs
from pyfeat._triton.contrast_products import store_gradient
from pyfeat._triton.contrast_tiles import (
    LOG2_E,
    halves,
    pair_arguments,
    pair_constants,
    similarities,
    tile_products,
    which_count,
)
from pyfeat._triton.tiles import SWEEP, TileConfig, swizzled


def add_softplus(
    block: AllPairs,
    tile: TileConfig,
    bias: Tensor,
    sums: Tensor,
    weights: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """See ``ContrastKernels``."""
    column_tiles = triton.cdiv(block.num_columns, tile.block_n)
    parts = block.a.new_empty((2, column_tiles, block.num_rows), dtype=torch.float32)
    _softplus_kernel[(tile.num_tiles(block.num_rows, block.num_columns),)](
        *pair_arguments(block),
        bias,
        parts,
        parts if weights is None else weights,
        parts if gradient is None else gradient,
        0 if gradient is None else gradient.stride(0),
        GRADIENT=gradient is not None,
        **pair_constants(block, tile),
    )
    sums.add_(parts.sum(dim=1, dtype=torch.float64))


@triton.jit
def _log1p(t):
    """log(1 + t) for 0 <= t <= 1 without a loss of digits near 0."""
    # 2 artanh(s) with s = t / (2 + t) <= 1 / 3: what the series leaves out is s^14 / 15 < 2^-25 of
    # it. The GPU's own logarithm has an absolute error near 1.
    s = t / (2.0 + t)
    u = s * s
    series = tl.fma(u, 1.0 / 13.0, 1.0 / 11.0)
    series = tl.fma(u, series, 1.0 / 9.0)
    series = tl.fma(u, series, 1.0 / 7.0)
    series = tl.fma(u, series, 1.0 / 5.0)
    series = tl.fma(u, series, 1.0 / 3.0)
    return 2.0 * tl.fma(s * u, series, s)


@triton.jit
def _quarter(
    products,  # [rows, columns]
    row,
    column,
    scale,
    column_bias,
    row_ids,
    column_ids,
    row_groups,
    column_groups,
    num_rows,
    num_columns,
    bias,
    weights,
    gradient,
    gradient_stride,
    GRADIENT: tl.constexpr,
    BIAS: tl.constexpr,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP_POSITIVES: tl.constexpr,
):
    """Sums over these columns of a tile, of every row; stores their gradient if GRADIENT."""
    similarity = similarities(products, column, 1.0, scale, column_bias, num_columns, BIAS)
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
    z = similarity + tl.load(bias).to(tl.float32)
    z = tl.where(positive, -z, z)
    t = tl.exp2(-tl.abs(z) * LOG2_E)
    softplus = tl.where(counted, tl.maximum(z, 0.0) + _log1p(t), 0.0)
    sigmoid = tl.where(counted, tl.where(z >= 0, 1.0, t) / (1.0 + t), 0.0)
    sigmoid = tl.where(positive, -sigmoid, sigmoid)
    if GRADIENT:
        weight = tl.load(weights + row, mask=row < num_rows, other=0.0)[:, None]
        store_gradient(weight * sigmoid, row, column, gradient, gradient_stride)
    return tl.sum(softplus, axis=1), tl.sum(sigmoid, axis=1)


@triton.jit
def _half(
    products,  # [rows, columns]
    row,
    first,  # of the columns
    scale,
    column_bias,
    row_ids,
    column_ids,
    row_groups,
    column_groups,
    num_rows,
    num_columns,
    bias,
    weights,
    gradient,
    gradient_stride,
    GRADIENT: tl.constexpr,
    BIAS: tl.constexpr,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP_POSITIVES: tl.constexpr,
):
    """The same of two quarters."""
    left, right = halves(products)
    softplus, sigmoids = _quarter(
        left,
        row,
        first + tl.arange(0, left.shape[1]),
        scale,
        column_bias,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        bias,
        weights,
        gradient,
        gradient_stride,
        GRADIENT,
        BIAS,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    more_softplus, more_sigmoids = _quarter(
        right,
        row,
        first + left.shape[1] + tl.arange(0, left.shape[1]),
        scale,
        column_bias,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        bias,
        weights,
        gradient,
        gradient_stride,
        GRADIENT,
        BIAS,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    return softplus + more_softplus, sigmoids + more_sigmoids


# One program for each tile of BLOCK_M rows and BLOCK_N columns. Bound by the product, 2 D
# operations for each pair; beside it come an exponential and two divisions.
@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _softplus_kernel(
    a,
    a_stride,
    b,
    b_stride,
    scale,
    column_bias,
    row_ids,
    column_ids,
    row_groups,
    column_groups,
    num_rows,
    num_columns,
    dim,
    bias,  # []
    parts,  # [2, column tiles, L] float32: sums of softplus and of signed sigmoids
    weights,  # [L] float32 if GRADIENT
    gradient,  # [L, S] float32, float16 or bfloat16 if GRADIENT
    gradient_stride,
    GRADIENT: tl.constexpr,
    BIAS: tl.constexpr,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP_POSITIVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    row_tile, column_tile = swizzled(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), column_tiles, SWEEP
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
    first = column_tile * BLOCK_N
    softplus, sigmoids = _half(
        left,
        row,
        first,
        scale,
        column_bias,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        bias,
        weights,
        gradient,
        gradient_stride,
        GRADIENT,
        BIAS,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    more_softplus, more_sigmoids = _half(
        right,
        row,
        first + BLOCK_N // 2,
        scale,
        column_bias,
        row_ids,
        column_ids,
        row_groups,
        column_groups,
        num_rows,
        num_columns,
        bias,
        weights,
        gradient,
        gradient_stride,
        GRADIENT,
        BIAS,
        IDS,
        GROUPS,
        KEEP_POSITIVES,
    )
    at = parts + column_tile * num_rows + row
    plane = column_tiles * num_rows
    live = row < num_rows
    tl.store(at, softplus + more_softplus, mask=live)
    tl.store(at + plane, sigmoids + more_sigmoids, mask=live)
