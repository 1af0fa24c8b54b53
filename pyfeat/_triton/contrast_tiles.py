"""One tile of similarities of all pairs, which every kernel of the losses begins with.

Products of float32 features are summed in float32 without TF32, those of 16 bits on tensor cores,
which add up in float32. The scale comes as the sum of two float32 numbers, so that a similarity is
rounded once more than its product, as ``scale * (a @ b.T)`` is.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._checks import with_contiguous_rows
from pyfeat._gpu.contrast_pairs import AllPairs
from pyfeat._triton.tile_table import tiles_of
from pyfeat._triton.tiles import TileConfig

# Similarities times this are exponents of 2, which is what the GPU has an instruction for.
LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)

# Where there would be fewer large tiles than this, about the processors of a GPU, small ones keep more
# of them busy.
_FEW_TILES = 128
# Rows of features that begin at multiples of 16 are read 16 bytes at a time.
_WIDTH = 16


def choose_tile(num_rows: int, num_columns: int, features: Tensor) -> TileConfig:
    """The tile for a matrix of so many rows and columns, a product of ``features``.

    Large ones read 1 / block_m + 1 / block_n features for each product; twice the columns would leave too
    few registers for what becomes of a tile. Without tensor cores arithmetic is the bound well before the
    cache is.
    """
    tiles = _tiles(features)
    return next((t for t in tiles if t.num_tiles(num_rows, num_columns) >= _FEW_TILES), tiles[-1])


def gradient_tile(num_rows: int, num_columns: int, features: Tensor) -> TileConfig:
    """The same for a matrix that is computed to be weighted and stored."""
    if features.element_size() == 4:
        # Without tensor cores a thread has other operands to hold beside a large tile.
        return _tiles(features)[-1]
    return choose_tile(num_rows, num_columns, features)


def _tiles(features: Tensor) -> tuple[TileConfig, ...]:
    """By the size of a feature, square ones, the largest first."""
    return tiles_of(f"pairs, {features.element_size()} bytes", features.device)


def readable(features: Tensor) -> Tensor:
    """With contiguous rows of a width that is read fast, and in a dtype that can be multiplied."""
    # On the CPU runs the interpreter, which cannot multiply bfloat16: it gets the same values.
    if features.device.type == "cpu" and features.dtype == torch.bfloat16:
        features = features.float()
    missing = -features.shape[1] % _WIDTH
    if missing:
        return torch.nn.functional.pad(features, (0, missing))
    return with_contiguous_rows(features)


def pair_arguments(block: AllPairs) -> tuple[Any, ...]:
    """The first 13 of a kernel; tensors that are missing are not read."""
    a, b = block.a, block.b
    vectors = (block.scale if x is None else x for x in block.pairs[:5])
    return (
        *(a, a.stride(0), b, b.stride(0), block.scale),
        *vectors,
        *(block.num_rows, block.num_columns, a.shape[1]),
    )


def pair_constants(block: AllPairs, tile: TileConfig) -> dict[str, Any]:
    """The others of a kernel, by name, with the options of its compilation."""
    pairs = block.pairs
    return {
        "BIAS": pairs.column_bias is not None,
        "IDS": block.has_ids,
        "GROUPS": pairs.row_groups is not None and pairs.column_groups is not None,
        "KEEP_POSITIVES": pairs.keep_positives,
        "EVEN_K": block.a.shape[1] % tile.block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


@triton.jit
def tile_products(
    row,  # [BLOCK_M]
    column,  # [BLOCK_N]
    a,  # [L, D]
    a_stride,
    b,  # [S, D]
    b_stride,
    num_rows,
    num_columns,
    dim,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products (BLOCK_M, BLOCK_N) float32; rows and columns beyond the end are the last ones."""
    k = tl.arange(0, BLOCK_K)
    a_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    b_row = tl.minimum(column, num_columns - 1).to(tl.int64)
    a_values = a + a_row[:, None] * a_stride + k[None, :]
    b_values = b + b_row[None, :] * b_stride + k[:, None]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        if EVEN_K:
            x = tl.load(a_values)
            y = tl.load(b_values)
        else:
            x = tl.load(a_values, mask=(k < dim - start)[None, :], other=0.0)
            y = tl.load(b_values, mask=(k < dim - start)[:, None], other=0.0)
        products = tl.dot(x, y, products, input_precision="ieee")
        a_values += BLOCK_K
        b_values += BLOCK_K
    return products


@triton.jit
def similarities(
    products,  # [rows, columns]
    column,
    unit,  # what similarities are multiplied by
    scale,  # []
    bias,  # [S] float32 if BIAS
    num_columns,
    BIAS: tl.constexpr,
):
    """``unit (scale products + bias)``, rounded once, or twice with a bias."""
    exact = tl.load(scale).to(tl.float64) * unit
    high = exact.to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    rest = products * low
    if BIAS:
        added = tl.load(bias + column, mask=column < num_columns, other=0.0) * unit
        rest += added[None, :]
    return tl.fma(products, high, rest)


@triton.jit
def which_count(
    row,
    column,
    row_ids,  # [L] int32 if IDS
    column_ids,  # [S]
    row_groups,  # [L] int32 if GROUPS
    column_groups,  # [S]
    num_rows,
    num_columns,
    IDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEEP_POSITIVES: tl.constexpr,
):
    """Which pairs of a tile exist and are not left out, and which of these are positive."""
    live_row = row < num_rows
    live_column = column < num_columns
    counted = live_row[:, None] & live_column[None, :]
    positive = tl.zeros((row.shape[0], column.shape[0]), tl.int1)
    if IDS:
        row_id = tl.load(row_ids + row, mask=live_row, other=0)
        column_id = tl.load(column_ids + column, mask=live_column, other=0)
        positive = counted & (row_id[:, None] == column_id[None, :])
    if GROUPS:
        row_group = tl.load(row_groups + row, mask=live_row, other=0)
        column_group = tl.load(column_groups + column, mask=live_column, other=0)
        counted = counted & (row_group[:, None] != column_group[None, :])
        if KEEP_POSITIVES:
            counted = counted | positive
        positive = positive & counted
    return counted, positive


@triton.jit
def which_have_power(
    counted, positive, SEPARATE_POSITIVES: tl.constexpr, ONLY_POSITIVES: tl.constexpr
):
    """Which pairs are in the log-sum-exps."""
    if SEPARATE_POSITIVES:
        counted = counted & ~positive
    if ONLY_POSITIVES:
        counted = counted & positive
    return counted


@triton.jit
def halves(tile):
    """The left and the right half of a tile, without an exchange between threads.

    What becomes of a tile needs several numbers for each of its columns: for half of the columns
    they stay in registers.
    """
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))
