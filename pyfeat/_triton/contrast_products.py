"""Products of a gradient by the similarities with features, added up in float32."""

import triton
import triton.language as tl
from torch import Tensor

from pyfeat._triton.contrast_tiles import choose_tile
from pyfeat._triton.tiles import SWEEP, swizzled


def add_product(out: Tensor, gradient: Tensor, values: Tensor) -> None:
    """See ``ContrastKernels``."""
    num_rows, dim = out.shape
    tile = choose_tile(num_rows, dim, gradient)
    _add_product_kernel[(tile.num_tiles(num_rows, dim),)](
        gradient,
        *gradient.stride(),
        values,
        values.stride(0),
        out,
        out.stride(0),
        num_rows,
        gradient.shape[1],
        dim,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


@triton.jit
def store_gradient(value, row, column, gradient, gradient_stride):
    """Store a part of a tile of the gradient, in the dtype in which it will be multiplied."""
    # Whole tiles without a mask, which could be stored in single elements only. Offsets in a block
    # are below 2^31.
    at = gradient + row[:, None] * gradient_stride + column[None, :]
    tl.store(at, value.to(gradient.dtype.element_ty))


# One program for each tile of the sums, which it reads and writes once for all of K.
@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def _add_product_kernel(
    gradient,  # [R, K], whole tiles: zeros beyond K, anything beyond R
    row_stride,
    inner_stride,
    values,  # [K, F]
    value_stride,
    out,  # [R, F] float32
    out_stride,
    num_rows,
    num_inner,
    dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_tile, column_tile = swizzled(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(dim, BLOCK_N), SWEEP
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live_column = (column < dim)[None, :]
    g_at = gradient + row[:, None] * row_stride + k[None, :] * inner_stride
    x_at = values + k.to(tl.int64)[:, None] * value_stride + column[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_inner, BLOCK_K):
        g = tl.load(g_at)
        x = tl.load(x_at, mask=live_column & (k < num_inner - start)[:, None], other=0.0)
        products = tl.dot(g, x, products, input_precision="ieee")
        g_at += BLOCK_K * inner_stride
        x_at += BLOCK_K * value_stride
    out += (row_tile * BLOCK_M).to(tl.int64) * out_stride + column_tile * BLOCK_N
    at = out + tl.arange(0, BLOCK_M)[:, None] * out_stride + tl.arange(0, BLOCK_N)[None, :]
    inside = (row < num_rows)[:, None] & live_column
    tl.store(at, tl.load(at, mask=inside) + products, mask=inside)
