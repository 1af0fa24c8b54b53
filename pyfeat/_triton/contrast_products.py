"""Products of a gradient by the similarities with features, a block of pairs at a time.

For a block of about 4,096 x 4,096 pairs one kernel computes the similarities again and writes the
gradient G by them, in 16 bits for features of 16 bits, else in float32; two products then add
``G b`` and ``G.T a`` to sums in float32. A kernel that kept the sums of its rows on chip, for all D
features, would have room for about 32 rows, fewer than the 64 that tensor cores of compute
capability 9.0 multiply at once.

For each pair that is 6 D operations in three products. G is written once and read twice: 6 bytes in
16 bits, 12 in float32, mostly from the second-level cache if it holds a block of 32 MB. The sums of
the 4,096 rows and columns of a block are read and written: D / 256 bytes for each pair, 3 for
D = 768. With 256 rows to a block these would be more than 8 D / 256 bytes, 24.

float32 is multiplied by a kernel of our own, so that it stays float32 whatever
``torch.backends.cuda.matmul`` allows. 16 bits are multiplied by the library where it adds to
float32 in place (torch 2.10, on a GPU) and torch is not asked for deterministic algorithms, which
it takes this product not to be; else by the same kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._chunks import even_chunk
from pyfeat._triton.contrast_tiles import AllPairs, choose_tile, gradient_tile, readable
from pyfeat._triton.tiles import SWEEP, TileConfig, swizzled

# Rows and columns of a block, and its size: 32 MB in 16 bits, 64 MB in float32.
_BLOCK_SIDE = 4096
_BLOCK_PAIRS = _BLOCK_SIDE * _BLOCK_SIDE
# Rows and columns of blocks come in multiples of this, so that all of them have whole tiles.
_MULTIPLE = 128

_TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Block(NamedTuple):
    """Some rows with some columns, and where their gradient goes."""

    pairs: AllPairs
    rows: slice
    columns: slice
    tile: TileConfig
    gradient: Tensor  # [l, s], a view with room for whole tiles


class Wanted(NamedTuple):
    """Which products are."""

    by_a: bool = True  # G b
    by_b: bool = True  # G.T a
    # b is a, and the gradient is symmetric: ``by_a`` is all there is.
    itself: bool = False


def products_of_blocks(
    problem: AllPairs,
    write_gradient: Callable[[Block], None],
    a_values: Tensor,
    b_values: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor]:
    """Products of the gradient G with features.

    Args:
        problem: The pairs.
        write_gradient: Writes whole tiles of the gradient of a block, 0 for what does not count.
        a_values: (L, E), the features or others in their place, of their dtype.
        b_values: (S, F).
        wanted: What is.

    Returns:
        ``G b_values`` (L, F) and ``G.T a_values`` (S, E), float32, without rows if not wanted.
    """
    num_rows, num_columns = problem.num_rows, problem.num_columns
    left, right = readable(a_values), readable(b_values)
    of_rows, of_columns = num_rows if wanted.by_a else 0, num_columns if wanted.by_b else 0
    by_a = right.new_zeros((of_rows, right.shape[1]), dtype=torch.float32)
    by_b = left.new_zeros((of_columns, left.shape[1]), dtype=torch.float32)
    height, width = _block_shape(num_rows, num_columns, square=wanted.itself)
    workspace = right.new_empty((height, width))
    tile = gradient_tile(min(height, num_rows), min(width, num_columns), problem.a)
    for first_row in range(0, num_rows, height):
        rows = slice(first_row, min(first_row + height, num_rows))
        for first_column in range(first_row if wanted.itself else 0, num_columns, width):
            columns = slice(first_column, min(first_column + width, num_columns))
            pairs = problem.block(rows, columns)
            gradient = workspace[: pairs.num_rows, : pairs.num_columns]
            write_gradient(Block(pairs, rows, columns, tile, gradient))
            if wanted.by_a:
                _add_product(by_a[rows], gradient, right[columns])
            if wanted.by_b:
                _add_product(by_b[columns], gradient.T, left[rows])
            elif wanted.itself and first_row != first_column:
                _add_product(by_a[columns], gradient.T, right[rows])
    return _narrowed(by_a, b_values), _narrowed(by_b, a_values)


def _narrowed(products: Tensor, values: Tensor) -> Tensor:
    """Without the columns that ``readable`` added."""
    return products[:, : values.shape[1]].contiguous()


def _block_shape(num_rows: int, num_columns: int, *, square: bool) -> tuple[int, int]:
    """Rows and columns of the blocks, even ones."""
    num_rows, num_columns = max(num_rows, 1), max(num_columns, 1)
    if square:
        side = even_chunk(num_rows, _BLOCK_SIDE, _MULTIPLE)
        return side, side
    most_columns = max(_BLOCK_SIDE, _BLOCK_PAIRS // max(num_rows, _MULTIPLE))
    width = even_chunk(num_columns, most_columns, _MULTIPLE)
    return even_chunk(num_rows, _BLOCK_PAIRS // width, _MULTIPLE), width


def _add_product(out: Tensor, gradient: Tensor, values: Tensor) -> None:
    """Add ``gradient @ values`` to ``out`` (rows, F); the gradient is a view of whole tiles."""
    if _library_adds(gradient):
        with torch.autocast("cuda", enabled=False):
            torch.addmm(out, gradient, values, out_dtype=torch.float32, out=out)
        return
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


def _library_adds(gradient: Tensor) -> bool:
    return (
        gradient.is_cuda
        and gradient.element_size() == 2
        and _TORCH_VERSION >= (2, 10)
        and not torch.are_deterministic_algorithms_enabled()
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
