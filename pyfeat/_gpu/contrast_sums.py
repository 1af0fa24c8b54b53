"""Sums over the rows and columns of all pairs, chunk by chunk.

Rows against themselves take the chunks above the diagonal only, whose columns are rows as well.
"""

import math

import torch
from torch import Tensor

from pyfeat._gpu.contrast_pairs import AllPairs, ContrastKernels, LineSums
from pyfeat._gpu.tiles import Tile

# Of the parts that tiles leave behind, for rows and columns together.
_PART_BYTES = 64 << 20
# Numbers that a tile leaves behind at most for each of its rows and columns.
_PART_KINDS = 4


def sums_of_tiles(
    kernels: ContrastKernels, problem: AllPairs, *, columns: bool, largest: bool, itself: bool
) -> tuple[LineSums, LineSums]:
    """Sums of rows and of columns; those of columns (0,) unless they are wanted.

    Args:
        kernels: Of the backend.
        problem: The pairs.
        columns: Whether sums over columns are wanted.
        largest: Whether the largest of every row is wanted.
        itself: ``b`` is ``a``, and pairs say the same of ij and ji.
    """
    num_rows, num_columns = problem.num_rows, problem.num_columns
    device = problem.a.device
    of_rows = LineSums.none(num_rows, device, largest=largest)
    of_columns = LineSums.none(num_columns if columns else 0, device, largest=False)
    tile = kernels.sums_tile(num_rows, num_columns, problem.a)
    height, width = chunk_shape(num_rows, num_columns, tile, square=itself)
    for first_row in range(0, num_rows, height):
        rows = slice(first_row, first_row + height)
        for first_column in range(first_row if itself else 0, num_columns, width):
            part = slice(first_column, first_column + width)
            block = problem.block(rows, part)
            on_diagonal = itself and first_row == first_column
            others = None
            if columns or (itself and not on_diagonal):
                others = (of_rows if itself else of_columns).part(part)
            kernels.add_sums(block, tile, of_rows.part(rows), others, on_diagonal=on_diagonal)
    return of_rows, of_columns


def chunk_shape(
    num_rows: int, num_columns: int, tile: Tile, *, square: bool = False
) -> tuple[int, int]:
    """Rows and columns, in whole tiles, whose parts fit _PART_BYTES."""
    most = max(_PART_BYTES // (_PART_KINDS * 4 * tile.num_lines), 1)  # tiles
    row_tiles = max(-(-num_rows // tile.block_m), 1)
    column_tiles = max(-(-num_columns // tile.block_n), 1)
    if square:
        side = min(row_tiles, math.isqrt(most))
        return side * tile.block_m, side * tile.block_n
    wide = min(column_tiles, max(math.isqrt(most), most // row_tiles))
    high = min(row_tiles, max(most // wide, 1))
    return high * tile.block_m, wide * tile.block_n


def softplus_sums(kernels: ContrastKernels, problem: AllPairs, bias: Tensor) -> Tensor:
    """Of every row, sums of softplus and of signed sigmoids, (2, L) float64.

    That is ``softplus(Z)`` and ``y sigmoid(Z)`` of ``Z = y (S + bias)``, y -1 for positive pairs and 1
    for others.

    Args:
        kernels: Of the backend.
        problem: The pairs.
        bias: () float.
    """
    num_rows, num_columns = problem.num_rows, problem.num_columns
    sums = torch.zeros((2, num_rows), dtype=torch.float64, device=problem.a.device)
    tile = kernels.gradient_tile(num_rows, num_columns, problem.a)
    height, width = chunk_shape(num_rows, num_columns, tile)
    for first_row in range(0, num_rows, height):
        rows = slice(first_row, first_row + height)
        for first_column in range(0, num_columns, width):
            block = problem.block(rows, slice(first_column, first_column + width))
            kernels.add_softplus(block, tile, bias, sums[:, rows], None, None)
    return sums
