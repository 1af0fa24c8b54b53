"""Log-sum-exps and positive sums of the rows and columns of similarities, in one pass over tiles.

A tile leaves behind, for each of its rows, the largest similarity, the sum of exponentials relative
to it, and the sum over positives; likewise for its columns. A second kernel merges these parts.
Rows against themselves take the tiles above the diagonal only, whose columns are rows as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._gpu.contrast_pairs import AllPairs, LineSums
from pyfeat._triton.contrast_tiles import (
    LOG2_E,
    LOG_2,
    pair_arguments,
    pair_constants,
    similarities,
    tile_products,
    which_count,
    which_have_power,
)
from pyfeat._triton.tiles import SWEEP, TileConfig, swizzled

# Lines and tiles that one program merges at a time.
_LINES, _MERGED = 32, 64


def add_sums(
    block: AllPairs,
    tile: TileConfig,
    of_rows: LineSums,
    of_columns: LineSums | None,
    *,
    on_diagonal: bool,
) -> None:
    """See ``ContrastKernels``."""
    row_tiles = triton.cdiv(block.num_rows, tile.block_m)
    column_tiles = triton.cdiv(block.num_columns, tile.block_n)
    num_tiles = row_tiles * column_tiles
    if on_diagonal:
        num_tiles = row_tiles * (row_tiles + 1) // 2
    ids, largest = block.has_ids, of_rows.largest.numel() > 0
    kinds = 2 + ids + largest
    new = block.a.new_empty
    row_parts = new((kinds, column_tiles, block.num_rows), dtype=torch.float32)
    column_parts = row_parts
    if of_columns is not None:
        column_parts = new((kinds, row_tiles, block.num_columns), dtype=torch.float32)
    _pair_sums_kernel[(num_tiles,)](
        *pair_arguments(block),
        row_parts,
        column_parts,
        COLUMNS=of_columns is not None or on_diagonal,
        ON_DIAGONAL=on_diagonal,
        LARGEST=largest,
        SEPARATE_POSITIVES=block.pairs.separate_positives,
        ONLY_POSITIVES=block.pairs.only_positives,
        **pair_constants(block, tile),
    )
    _merge(row_parts, of_rows, ids=ids)
    if of_columns is not None:
        _merge(column_parts, of_columns, ids=ids)


def _merge(parts: Tensor, sums: LineSums, *, ids: bool) -> None:
    _, num_tiles, num_lines = parts.shape
    _merge_sums_kernel[(triton.cdiv(num_lines, _LINES),)](
        parts,
        *sums,
        num_lines,
        num_tiles,
        IDS=ids,
        LARGEST=sums.largest.numel() > 0,
        LINES=_LINES,
        TILES=_MERGED,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit
def _store_parts(
    parts,  # [kinds, tiles, lines]
    tile,
    line,
    num_tiles,
    num_lines,
    end_line,  # of those that are stored
    exponents,
    positives,
    others,
    AXIS: tl.constexpr,
    IDS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """What a tile leaves behind for the lines across AXIS."""
    at = parts + tile * num_lines + line
    plane = num_tiles * num_lines
    inside = line < end_line
    top = tl.max(exponents, axis=AXIS)
    # Relative to 0 where nothing counts: the sum is 0.
    shift = tl.expand_dims(tl.where(top == float("-inf"), 0.0, top), AXIS)
    tl.store(at, top, mask=inside)
    tl.store(at + plane, tl.sum(tl.exp2(exponents - shift), axis=AXIS), mask=inside)
    if IDS:
        tl.store(at + 2 * plane, tl.sum(positives, axis=AXIS), mask=inside)
    if LARGEST:
        tl.store(at + (2 + IDS) * plane, tl.max(others, axis=AXIS), mask=inside)


@triton.jit
def _triangular(place):
    """Row and column, row <= column, of a place below 2^20 in the order of columns."""
    # 8 place + 1 is a float32 number, and its root rounded right is whole where that is a square.
    column = ((tl.sqrt_rn(8.0 * place + 1.0) - 1.0) * 0.5).to(tl.int32)
    return place - column * (column + 1) // 2, column


# One program for each tile of BLOCK_M rows and BLOCK_N columns. Bound by the product, 2 D
# operations for each pair; beside it come two exponentials and at most
# 16 bytes (1 / BLOCK_M + 1 / BLOCK_N).
@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _pair_sums_kernel(
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
    row_parts,  # [kinds, column tiles, L] float32: largest exponent, sum relative to it, ...
    column_parts,  # [kinds, row tiles, S] if COLUMNS; ON_DIAGONAL these are those of rows
    COLUMNS: tl.constexpr,
    ON_DIAGONAL: tl.constexpr,
    LARGEST: tl.constexpr,
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
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    if ON_DIAGONAL:
        row_tile, column_tile = _triangular(tl.program_id(0))
    else:
        row_tile, column_tile = swizzled(tl.program_id(0), row_tiles, column_tiles, SWEEP)
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
    positives = tl.where(positive, exponents, 0.0)
    others = tl.where(counted & ~positive, exponents, float("-inf"))
    counted = which_have_power(counted, positive, SEPARATE_POSITIVES, ONLY_POSITIVES)
    exponents = tl.where(counted, exponents, float("-inf"))
    _store_parts(
        row_parts,
        column_tile,
        row,
        column_tiles,
        num_rows,
        num_rows,
        exponents,
        positives,
        others,
        1,
        IDS,
        LARGEST,
    )
    if COLUMNS:
        end_column = num_columns
        # A tile on the diagonal has stored these lines already: the last to come would be chance.
        if ON_DIAGONAL:
            end_column = tl.where(row_tile == column_tile, 0, num_columns)
        _store_parts(
            column_parts,
            row_tile,
            column,
            row_tiles,
            num_columns,
            end_column,
            exponents,
            positives,
            others,
            0,
            IDS,
            LARGEST,
        )


@triton.jit(do_not_specialize=["num_lines", "num_tiles"])
def _merge_sums_kernel(
    parts,  # [kinds, tiles, lines] float32
    lse,  # [lines] float64, updated, as are the others
    positives,  # [lines] if IDS
    largest,  # [lines] if LARGEST
    num_lines,
    num_tiles,
    IDS: tl.constexpr,
    LARGEST: tl.constexpr,
    LINES: tl.constexpr,
    TILES: tl.constexpr,
):
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    tile = tl.arange(0, TILES)[:, None]
    live = line < num_lines
    plane = num_tiles * num_lines
    before = tl.load(lse + line, mask=live, other=float("-inf")) * LOG2_E
    top = tl.full((LINES,), float("-inf"), tl.float32)
    other = tl.full((LINES,), float("-inf"), tl.float32)
    for first in range(0, num_tiles, TILES):
        at = parts + (first + tile) * num_lines + line[None, :]
        inside = (first + tile < num_tiles) & live[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=inside, other=float("-inf")), axis=0))
        if LARGEST:
            part = tl.load(at + (2 + IDS) * plane, mask=inside, other=float("-inf"))
            other = tl.maximum(other, tl.max(part, axis=0))
    shift = tl.maximum(before, top.to(tl.float64))
    shift = tl.where(shift == float("-inf"), 0.0, shift)

    total = tl.exp2(before - shift)
    positive = tl.zeros((LINES,), tl.float64)
    for first in range(0, num_tiles, TILES):
        at = parts + (first + tile) * num_lines + line[None, :]
        inside = (first + tile < num_tiles) & live[None, :]
        part = tl.load(at, mask=inside, other=float("-inf")).to(tl.float64) - shift[None, :]
        sums = tl.load(at + plane, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(sums * tl.exp2(part.to(tl.float32)).to(tl.float64), axis=0)
        if IDS:
            values = tl.load(at + 2 * plane, mask=inside, other=0.0)
            positive += tl.sum(values.to(tl.float64), axis=0)
    logarithm = (shift + tl.log2(tl.where(total == 0, 1.0, total))) * LOG_2
    tl.store(lse + line, tl.where(total == 0, float("-inf"), logarithm), mask=live)
    if IDS:
        known = tl.load(positives + line, mask=live, other=0.0)
        tl.store(positives + line, known + positive * LOG_2, mask=live)
    if LARGEST:
        known = tl.load(largest + line, mask=live, other=float("-inf"))
        tl.store(largest + line, tl.maximum(known, other.to(tl.float64) * LOG_2), mask=live)
