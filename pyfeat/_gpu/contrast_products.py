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

float32 is multiplied by a kernel of the backend, so that it stays float32 whatever
``torch.backends.cuda.matmul`` allows. 16 bits are multiplied by the library where it adds to
float32 in place (torch 2.10, on a GPU) and torch is not asked for deterministic algorithms, which
it takes this product not to be; else by the same kernel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._chunks import even_chunk
from pyfeat._gpu.contrast_pairs import AllPairs, ContrastKernels
from pyfeat._gpu.tiles import Tile
from pyfeat._pairs import WeightedSide

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
    tile: Tile
    gradient: Tensor  # [l, s], a view with room for whole tiles


class Wanted(NamedTuple):
    """Which products are."""

    by_a: bool = True  # G b
    by_b: bool = True  # G.T a
    # b is a, and the gradient is symmetric: ``by_a`` is all there is.
    itself: bool = False


def products_of_blocks(
    kernels: ContrastKernels,
    problem: AllPairs,
    write_gradient: Callable[[Block], None],
    a_values: Tensor,
    b_values: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor]:
    """Products of the gradient G with features.

    Args:
        kernels: Of the backend.
        problem: The pairs.
        write_gradient: Writes whole tiles of the gradient of a block, 0 for what does not count.
        a_values: (L, E), the features or others in their place, of their dtype.
        b_values: (S, F).
        wanted: What is.

    Returns:
        ``G b_values`` (L, F) and ``G.T a_values`` (S, E), float32, without rows if not wanted.
    """
    num_rows, num_columns = problem.num_rows, problem.num_columns
    left, right = kernels.readable(a_values), kernels.readable(b_values)
    of_rows, of_columns = num_rows if wanted.by_a else 0, num_columns if wanted.by_b else 0
    by_a = right.new_zeros((of_rows, right.shape[1]), dtype=torch.float32)
    by_b = left.new_zeros((of_columns, left.shape[1]), dtype=torch.float32)
    height, width = _block_shape(num_rows, num_columns, square=wanted.itself)
    workspace = right.new_empty((height, width))
    tile = kernels.gradient_tile(min(height, num_rows), min(width, num_columns), problem.a)
    for first_row in range(0, num_rows, height):
        rows = slice(first_row, min(first_row + height, num_rows))
        for first_column in range(first_row if wanted.itself else 0, num_columns, width):
            columns = slice(first_column, min(first_column + width, num_columns))
            pairs = problem.block(rows, columns)
            gradient = workspace[: pairs.num_rows, : pairs.num_columns]
            write_gradient(Block(pairs, rows, columns, tile, gradient))
            if wanted.by_a:
                _add_product(kernels, by_a[rows], gradient, right[columns])
            if wanted.by_b:
                _add_product(kernels, by_b[columns], gradient.T, left[rows])
            elif wanted.itself and first_row != first_column:
                _add_product(kernels, by_a[columns], gradient.T, right[rows])
    return _narrowed(by_a, b_values), _narrowed(by_b, a_values)


def gradient_products(
    kernels: ContrastKernels,
    problem: AllPairs,
    rows: WeightedSide,
    columns: WeightedSide | None,
    factor: Tensor,
    a_values: Tensor,
    b_values: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of G, ``factor`` times the gradient by S, with features.

    Args:
        kernels: Of the backend.
        problem: The pairs.
        rows: Their log-sum-exps and the gradients by their sums.
        columns: Likewise; None: they have no part. Those of rows again for a batch with itself.
        factor: () float64.
        a_values: (L, E), features or others in their place.
        b_values: (S, F).
        wanted: Which products are.

    Returns:
        ``G b_values`` (L, F) and ``G.T a_values`` (S, E), float32, without rows if not wanted, and
        the sum of G a.b () float64.
    """
    row_terms = kernels.gradient_terms(rows, factor)
    column_terms = None if columns is None else kernels.gradient_terms(columns, factor)
    total = torch.zeros((), dtype=torch.float64, device=problem.a.device)

    def write(block: Block) -> None:
        of_columns = None if column_terms is None else column_terms[:, block.columns]
        sums = kernels.write_gradient(
            block.pairs, block.tile, row_terms[:, block.rows], of_columns, block.gradient
        )
        # Of a batch with itself, a block beside the diagonal stands for the one on its other side.
        twice = wanted.itself and block.rows != block.columns
        total.add_(sums.sum(dtype=torch.float64), alpha=2 if twice else 1)

    products = products_of_blocks(kernels, problem, write, a_values, b_values, wanted)
    return (*products, total)


def softplus_products(
    kernels: ContrastKernels,
    problem: AllPairs,
    bias: Tensor,
    weights: Tensor,
    a_values: Tensor,
    b_values: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums as of ``softplus_sums``, and products of G with features.

    Args:
        kernels: Of the backend.
        problem: The pairs.
        bias: () float.
        weights: (L,) float32: ``G_ij = weights_i y_ij sigmoid(Z_ij)``.
        a_values: (L, E), features or others in their place.
        b_values: (S, F).
        wanted: Which products are.

    Returns:
        The sums, ``G b_values`` (L, F) and ``G.T a_values`` (S, E), float32, without rows if not
        wanted.
    """
    sums = torch.zeros((2, problem.num_rows), dtype=torch.float64, device=problem.a.device)

    def write(block: Block) -> None:
        part = weights[block.rows]
        target = sums[:, block.rows]
        kernels.add_softplus(block.pairs, block.tile, bias, target, part, block.gradient)

    return (sums, *products_of_blocks(kernels, problem, write, a_values, b_values, wanted))


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


def _add_product(kernels: ContrastKernels, out: Tensor, gradient: Tensor, values: Tensor) -> None:
    """Add ``gradient @ values`` to ``out`` (rows, F); the gradient is a view of whole tiles."""
    if _library_adds(gradient):
        with torch.autocast("cuda", enabled=False):
            torch.addmm(out, gradient, values, out_dtype=torch.float32, out=out)
    elif gradient.shape[1] and values.shape[1]:
        kernels.add_product(out, gradient, values)


def _library_adds(gradient: Tensor) -> bool:
    return (
        gradient.is_cuda
        and gradient.element_size() == 2
        and _TORCH_VERSION >= (2, 10)
        and not torch.are_deterministic_algorithms_enabled()
    )
