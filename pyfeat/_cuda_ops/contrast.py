"""Launches the kernels of losses over all pairs, as ``pyfeat._gpu.contrast`` asks for them.

Features are packed once, as tiles are read (2 bytes for each value of 16 bits, 4 of float32); blocks
of pairs are views of what is packed. float32 is multiplied in float32 without tensor cores, which
would round it to 10 bits.

Cost of 65,536 x 65,536 x 768 in bfloat16, rows and columns, on an H200 (989 TFLOP/s, 4.8 TB/s,
about 6 TB/s from its second-level cache), by arithmetic: a product of 6.6 TFLOP takes 6.7 ms at the
peak. Two of them arise in tiles of 128 x 256, 12,288 cycles of tensor cores each. What becomes of a
tile is about 5,100 instructions of a warp for sums and 5,400 for the gradient, as compiled, in groups
of columns that neither hold positive pairs nor leave any out, which nearly all are (``fragments.cuh``):
10,700 cycles of the four schedulers at most; elsewhere it is two to three times that. Where nothing
overlaps that is 13 ms each, the library's two products 19 ms at 70 % of the peak, parts of sums (3 GB)
and sums of gradients (13 GB) 5 ms: at most 50 ms in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat import _cuda
from pyfeat._checks import dtype_name, with_contiguous_rows
from pyfeat._cuda_ops.frame import Queue, address_of, as_matrix, queue_of
from pyfeat._gpu.contrast_pairs import AllPairs, LineSums
from pyfeat._gpu.tiles import Tile
from pyfeat._pairs import WeightedSide

# Rows that begin at multiples of 16 bytes are what the library multiplies fastest.
_WIDTH = 16
# Rows of a panel, of which whole ones are read and written.
_PANEL = 128


class PairTile(NamedTuple):
    """What one thread block multiplies at a time."""

    block_m: int
    block_n: int
    num_lines: int

    def num_tiles(self, num_rows: int, num_columns: int) -> int:
        """Tiles of a product with so many rows and columns."""
        return -(-num_rows // self.block_m) * -(-num_columns // self.block_n)


class _Packed(NamedTuple):
    """Two packed matrices as the kernels take them."""

    a: int
    b: int
    dtype: _cuda.Dtype
    num_rows: int
    num_columns: int
    width: int


def packed(features: Tensor) -> Tensor:
    """See ``ContrastKernels``."""
    features = with_contiguous_rows(features)
    num_rows, dim = features.shape
    rows, width = _cuda.packed_shape(_dtype(features), num_rows, dim)
    panels = features.new_empty((rows, width))
    if num_rows:
        _cuda.pack_features(as_matrix(features), address_of(panels), queue_of(features))
    return panels[:num_rows]


def readable(values: Tensor) -> Tensor:
    """See ``ContrastKernels``."""
    missing = -values.shape[1] % _WIDTH
    if missing:
        return torch.nn.functional.pad(values, (0, missing))
    return with_contiguous_rows(values)


def sums_tile(num_rows: int, num_columns: int, features: Tensor) -> PairTile:
    """See ``ContrastKernels``."""
    rows, columns, lines = _cuda.pair_tile_shape(_dtype(features), queue_of(features))
    # As high as it is wide: chunks of a batch with itself are square.
    return PairTile(columns, columns, lines * columns // rows)


def gradient_tile(num_rows: int, num_columns: int, features: Tensor) -> PairTile:
    """See ``ContrastKernels``."""
    return sums_tile(num_rows, num_columns, features)


def add_sums(
    block: AllPairs,
    tile: Tile,
    of_rows: LineSums,
    of_columns: LineSums | None,
    *,
    on_diagonal: bool,
) -> None:
    """See ``ContrastKernels``."""
    queue, pair = queue_of(block.a), _pair(block)
    row_slots, column_slots, _ = _cuda.plan_pairs(pair, queue)
    ids, largest = block.has_ids, of_rows.largest.numel() > 0
    kinds = 2 + ids + largest
    slots = row_slots + column_slots if on_diagonal else row_slots
    shape = (kinds, slots, block.num_rows)
    row_parts = block.a.new_empty(shape, dtype=torch.float32)
    if on_diagonal:  # tiles left of the diagonal leave nothing
        row_parts.zero_()
        row_parts[0] = -torch.inf
        if largest:
            row_parts[-1] = -torch.inf
    column_parts = None
    if of_columns is not None:
        shape = (kinds, column_slots, block.num_columns)
        column_parts = block.a.new_empty(shape, dtype=torch.float32)
    scale = block.scale.double()
    _cuda.pair_sums(
        pair,
        _terms(block),
        address_of(scale),
        address_of(row_parts),
        address_of(column_parts),
        ids,
        largest,
        on_diagonal,
        queue,
    )
    _merge(row_parts, of_rows, queue, ids=ids)
    if of_columns is not None and column_parts is not None:
        _merge(column_parts, of_columns, queue, ids=ids)


def _merge(parts: Tensor, sums: LineSums, queue: Queue, *, ids: bool) -> None:
    largest = sums.largest if sums.largest.numel() else None
    positives = sums.positives if ids else None
    _, num_slots, num_lines = parts.shape
    _cuda.merge_sums(
        address_of(parts),
        num_slots,
        num_lines,
        address_of(sums.lse),
        address_of(positives),
        address_of(largest),
        queue,
    )


def add_softplus(
    block: AllPairs,
    tile: Tile,
    bias: Tensor,
    sums: Tensor,
    weights: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """See ``ContrastKernels``."""
    queue, pair = queue_of(block.a), _pair(block)
    row_slots, _, _ = _cuda.plan_pairs(pair, queue)
    parts = block.a.new_empty((2, row_slots, block.num_rows), dtype=torch.float32)
    scale, bias = block.scale.double(), bias.double()
    _cuda.pair_softplus(
        pair,
        _terms(block),
        address_of(scale),
        address_of(bias),
        address_of(parts),
        address_of(weights),
        (0, 0) if gradient is None else _whole_tiles(gradient),
        queue,
    )
    sums.add_(parts.sum(dim=1, dtype=torch.float64))


def gradient_terms(side: WeightedSide, factor: Tensor) -> Tensor:
    """See ``ContrastKernels``."""
    lse, weights, positives = (x.double().contiguous() for x in side)
    terms = torch.empty((3, len(lse)), dtype=torch.float32, device=lse.device)
    factor = factor.double()
    _cuda.gradient_terms(
        address_of(lse),
        address_of(weights),
        address_of(positives),
        address_of(factor),
        address_of(terms),
        len(lse),
        queue_of(terms),
    )
    return terms


def write_gradient(
    block: AllPairs,
    tile: Tile,
    row_terms: Tensor,
    column_terms: Tensor | None,
    gradient: Tensor,
) -> Tensor:
    """See ``ContrastKernels``."""
    queue, pair = queue_of(block.a), _pair(block)
    _, _, num_sums = _cuda.plan_pairs(pair, queue)
    sums = block.a.new_empty(num_sums, dtype=torch.float64)
    scale = block.scale.double()
    _cuda.pair_gradient(
        pair,
        _terms(block),
        address_of(scale),
        (address_of(row_terms), row_terms.stride(0)),
        (address_of(column_terms), 0 if column_terms is None else column_terms.stride(0)),
        _whole_tiles(gradient),
        address_of(sums),
        queue,
    )
    return sums


def add_product(out: Tensor, gradient: Tensor, values: Tensor) -> None:
    """See ``ContrastKernels``."""
    # Tiles are products of rows with rows: values become rows of columns.
    left, right = packed(gradient), packed(values.T)
    pair = _Packed(
        _panels(left, 0),
        _panels(right, 1),
        _dtype(left),
        len(out),
        out.shape[1],
        left.shape[1],
    )
    _cuda.add_product(pair, address_of(out), out.stride(0), queue_of(out))


def _dtype(features: Tensor) -> _cuda.Dtype:
    dtype: _cuda.Dtype = getattr(_cuda.Dtype, dtype_name(features.dtype))
    return dtype


def _pair(block: AllPairs) -> _Packed:
    a, b = block.a, block.b
    left, right = _panels(a, 0), _panels(b, 1)
    return _Packed(left, right, _dtype(a), block.num_rows, block.num_columns, a.shape[1])


def _panels(rows: Tensor, spare: int) -> int:
    """The address of the panels that hold these rows, and of so many more."""
    num_rows, width = rows.shape
    height = (-(-num_rows // _PANEL) + spare) * _PANEL
    return address_of(rows.as_strided((height, width), (width, 1)))


def _whole_tiles(gradient: Tensor) -> tuple[int, int]:
    """Address and row stride of a view of a workspace, with the rest of its panels."""
    height, width = (-(-count // _PANEL) * _PANEL for count in gradient.shape)
    return address_of(gradient.as_strided((height, width), gradient.stride())), gradient.stride(0)


def _terms(block: AllPairs) -> tuple[int, int, int, int, int, bool, bool, bool]:
    bias, row_ids, column_ids, row_groups, column_groups = (address_of(x) for x in block.pairs[:5])
    keep, separate, only = block.pairs[5:]
    return bias, row_ids, column_ids, row_groups, column_groups, keep, separate, only
