"""Rows as the tensor cores read them, with what is needed to bound the error of a product.

Error of one packed score, in the frame's units. u = 2^-24; x and q are the exact transformed row and
query, x^ and q^ what is packed in bfloat16.

- packing: ``||x - x^||`` and ``||q - q^||`` are measured in float64. The product may treat subnormal
  values as zero, at most ``sqrt(D) tiny`` more, tiny = 2^-126.
- product: products of bfloat16 are exact in float32. A tensor core adds a few of them (at least 4) to
  the running sum at once: it aligns all terms with the largest and may cut off what lies below the
  last bit of a float32 of that size, so that each term loses at most 2^-23 of the largest magnitude
  in sight, which ``sum |q_d x_d|`` bounds; so does the one rounding of each such sum. These are at
  most ``D + 2 D / 4 < 2 D`` losses in any order of the terms, rounded or truncated:
  ``|p - q^.x^| <= g ||q^|| ||x^|| + D tiny``, ``g = 4 D u / (1 - 4 D u)``.
- row term: h, rounded once: ``u |h| + tiny``.
- score: ``fl(h - p)``: ``u (|h| + |p|)``, ``|p| <= (1 + g) ||q^|| ||x^||``, at most 2u for g < 1.

With ``|q.x - q^.x^| <= ||q - q^|| ||x|| + ||q^|| ||x - x^||`` the sum is
``||q|| (||x - x^|| + (g + 2u) ||x||) + ||q - q^|| ||x|| + 2u |h| + (D + 2) tiny (1 + ||q||)``.
The bounds take max(||q||, ||q^||) for ||q||, and the same for x.

Brute force in float64 rounds, too: distances that differ by less than that may come out equal, and
then the lower index wins, so such rows must not be dropped. Its error is at most D + 4 units 2^-53 of
the squared distance, which ``(||q|| + ||x||)^2`` bounds, or of ``sum |q_d x_d|`` for inner_product,
which ``(||q|| + m + ||x||)^2`` bounds with m the norm of the mean. Either is at most
``2 (||q|| + m)^2 + 2 ||x||^2``: one part goes to the query, one to the row. The same term covers the
float64 sums taken here.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._frame import Frame

# Rows of one tile of the memory; a group of rows is spread evenly over a tile (see shortlist.py).
TILE = tl.constexpr(128)
# Packed rows are filled up with zeros to a multiple of this width.
WIDTH = 64

_QUERIES_PER_PROGRAM = 8
# Features that one program holds at a time; with more, float64 runs out of registers.
_BLOCK_FEATURES = 1024

# Rows larger than this in the frame's units have no bound, so that they stay in. Below it nothing
# overflows: products stay under 2^125, row terms under 2^108.
_LARGEST_NORM = tl.constexpr(2.0**54)
_LARGEST_ROW_TERM = tl.constexpr(2.0**108)
_UNIT = tl.constexpr(2.0**-24)
_TINY = tl.constexpr(2.0**-126)
_INFINITY = tl.constexpr(float("inf"))
# For the rounding of the bounds themselves, also when they are stored as float32.
_SPARE = tl.constexpr(1.0 + 2.0**-20)


@dataclass(frozen=True)
class PackedMemory:
    """A range of memory rows, filled up to whole blocks with rows of infinite score."""

    first_row: int
    end_row: int
    group_rows: int
    values: Tensor  # [slots, width] bfloat16
    row_terms: Tensor  # [slots] float32
    factors: Tensor  # [slots] float64, 1 / norm for cosine (0 for a zero row), else unused
    bounds: Tensor  # [3, groups] float32: reach, norm, slack

    @property
    def num_groups(self) -> int:
        return self.bounds.shape[1]


@dataclass(frozen=True)
class PackedQueries:
    """A range of queries, filled up to whole blocks with zeros."""

    values: Tensor  # [slots, width] bfloat16
    factors: Tensor  # [Q] float64
    bounds: Tensor  # [3, Q] float32: norm, residual, slack


def packed_width(dim: int) -> int:
    """Columns of a packed row of ``dim`` features."""
    return -(-dim // WIDTH) * WIDTH


def pack_memory(
    memory: Tensor,
    first_row: int,
    end_row: int,
    frame: Frame,
    *,
    group_rows: int,
    multiple: int,
    allowed: Tensor | None,
) -> PackedMemory:
    """Pack rows [first_row, end_row) of ``memory`` (N, D) in whole blocks of ``multiple`` rows.

    Rows that ``allowed`` (N,) uint8 rules out get an infinite score.
    """
    device, dim = memory.device, memory.shape[1]
    slots = -(-(end_row - first_row) // multiple) * multiple
    packed = PackedMemory(
        first_row,
        end_row,
        group_rows,
        torch.empty((slots, packed_width(dim)), dtype=_packed_dtype(memory), device=device),
        torch.empty(slots, dtype=torch.float32, device=device),
        torch.empty(slots, dtype=torch.float64, device=device),
        torch.empty((3, slots // group_rows), dtype=torch.float32, device=device),
    )
    _pack_memory_kernel[(packed.num_groups,)](
        memory,
        memory.stride(0),
        first_row,
        end_row,
        memory if allowed is None else allowed,
        0 if allowed is None else allowed.stride(0),
        frame.mean,
        frame.scale,
        frame.shift,
        packed.values,
        packed.row_terms,
        packed.factors,
        packed.bounds,
        dim,
        packed.values.shape[1],
        METRIC=frame.metric,
        MASKED=allowed is not None,
        GROUP=group_rows,
        BLOCK_D=_BLOCK_FEATURES // group_rows,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return packed


def pack_queries(queries: Tensor, frame: Frame, *, multiple: int) -> PackedQueries:
    """Pack ``queries`` (Q, D) in whole blocks of ``multiple`` rows."""
    device = queries.device
    num_queries, dim = queries.shape
    slots = -(-num_queries // multiple) * multiple
    packed = PackedQueries(
        torch.empty((slots, packed_width(dim)), dtype=_packed_dtype(queries), device=device),
        torch.empty(num_queries, dtype=torch.float64, device=device),
        torch.empty((3, num_queries), dtype=torch.float32, device=device),
    )
    _pack_queries_kernel[(slots // _QUERIES_PER_PROGRAM,)](
        queries,
        queries.stride(0),
        frame.mean,
        frame.scale,
        frame.shift,
        packed.values,
        packed.factors,
        packed.bounds,
        num_queries,
        dim,
        packed.values.shape[1],
        METRIC=frame.metric,
        ROWS=_QUERIES_PER_PROGRAM,
        BLOCK_D=_BLOCK_FEATURES // _QUERIES_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return packed


def _packed_dtype(features: Tensor) -> torch.dtype:
    # On the CPU runs the interpreter, which cannot multiply bfloat16: it gets the same values.
    return torch.float32 if features.device.type == "cpu" else torch.bfloat16


@triton.jit
def load_float64(pointers, mask):
    """Features of any floating dtype, without loss."""
    values = tl.load(pointers, mask=mask, other=0.0)
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    return values.to(tl.float64)


@triton.jit
def _rounded_to_bfloat16(x):
    """The nearest bfloat16 number, ties to even, as float32; the interpreter's cast would cut off."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pack_rows(
    rows,  # [R] pointers to the first feature of each row
    live,  # [R]
    mean,
    scale,
    values,  # [R] pointers to the first packed value of each row
    dim,
    width,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store rows in packed form.

    Returns, (R,) float64 each: the factor 1 / norm, a bound on ||x - x^||, one on ||x|| and ||x^||,
    ||x||^2, and mean.x.
    """
    columns = tl.arange(0, BLOCK_D)
    factor = tl.full((ROWS,), 1.0, tl.float64)
    if METRIC == "cosine":
        squares = tl.zeros((ROWS, BLOCK_D), tl.float64)
        for start in range(0, dim, BLOCK_D):
            inside = live[:, None] & (start + columns < dim)[None, :]
            x = load_float64(rows[:, None] + (start + columns)[None, :], inside)
            squares += x * x
        squared = tl.sum(squares, axis=1)
        positive = squared > 0
        factor = tl.where(positive, 1.0 / tl.sqrt(tl.where(positive, squared, 1.0)), 0.0)

    residuals = tl.zeros((ROWS, BLOCK_D), tl.float64)
    squares = tl.zeros((ROWS, BLOCK_D), tl.float64)
    products = tl.zeros((ROWS, BLOCK_D), tl.float64)
    for start in range(0, width, BLOCK_D):
        column = start + columns
        inside = live[:, None] & (column < dim)[None, :]
        center = tl.load(mean + column, mask=column < dim, other=0.0)[None, :]
        x = load_float64(rows[:, None] + column[None, :], inside)
        x = tl.where(inside, (x * factor[:, None] - center) * scale, 0.0)
        clamped = tl.minimum(tl.maximum(x, -_LARGEST_NORM), _LARGEST_NORM)
        rounded = _rounded_to_bfloat16(clamped.to(tl.float32))
        tl.store(values[:, None] + column[None, :], rounded, mask=(column < width)[None, :])
        error = x - rounded.to(tl.float64)
        residuals += error * error
        squares += x * x
        if METRIC == "inner_product":
            products += x * center
    squared = tl.sum(squares, axis=1)
    flushed = tl.sqrt(tl.cast(dim, tl.float64)) * _TINY
    residual = (tl.sqrt(tl.sum(residuals, axis=1)) + flushed) * _SPARE
    norm = (tl.sqrt(squared) + residual) * _SPARE
    return factor, residual, norm, squared, tl.sum(products, axis=1) * scale


@triton.jit
def _float64_noise(norm, dim):
    """This row's part of what brute force in float64 may be off by, in units of the score."""
    return 2.0 * (dim + 16.0) * 2.0**-51 * norm * norm


@triton.jit
def group_slots(group, GROUP: tl.constexpr):
    """Packed rows (GROUP,) int64 of a group: group c of a tile has its rows c + j TILE / GROUP."""
    groups_per_tile: tl.constexpr = TILE // GROUP
    first = group // groups_per_tile * TILE + group % groups_per_tile
    return first.to(tl.int64) + tl.arange(0, GROUP) * groups_per_tile


@triton.jit
def live_rows(rows, end_row, allowed, row_stride, MASKED: tl.constexpr):
    """Whether each of ``rows`` exists and, if MASKED, ``allowed`` is not zero there."""
    live = rows < end_row
    if MASKED:
        live = live & (tl.load(allowed + rows * row_stride, mask=live, other=0) != 0)
    return live


@triton.jit
def _store_group_bounds(bounds, num_groups, residual, norm, row_term, dim):
    """Reach, norm and slack, float32, from the largest values (float64) of the rows of a group."""
    lost = 4.0 * dim * _UNIT
    lost = lost / (1.0 - lost) + 2.0 * _UNIT
    underflow = (dim + 8.0) * _TINY
    reach = residual + lost * norm + underflow
    slack = 2.0 * _UNIT * row_term + _float64_noise(norm, dim) + underflow
    tl.store(bounds, (reach * _SPARE).to(tl.float32))
    tl.store(bounds + num_groups, (norm * _SPARE + _TINY).to(tl.float32))
    tl.store(bounds + 2 * num_groups, (slack * _SPARE).to(tl.float32))


@triton.jit(do_not_specialize=["first_row", "end_row"])
def _pack_memory_kernel(
    memory,  # [N, D]
    memory_stride,
    first_row,
    end_row,
    allowed,  # [N] uint8 if MASKED
    allowed_stride,
    mean,  # [D] float64
    scale,  # [] float64
    shift,  # [] float64
    values,  # [slots, width]
    row_terms,  # [slots]
    factors,  # [slots]
    bounds,  # [3, groups]
    dim,
    width,
    METRIC: tl.constexpr,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0)
    slots = group_slots(group, GROUP)
    rows = first_row + slots
    live = live_rows(rows, end_row, allowed, allowed_stride, MASKED)
    scaling = tl.load(scale)
    factor, residual, norm, squared, mean_product = _pack_rows(
        memory + rows * memory_stride,
        live,
        mean,
        scaling,
        values + slots * width,
        dim,
        width,
        METRIC,
        GROUP,
        BLOCK_D,
    )
    # q.x = (q - mean).(x - mean) + mean.(x - mean) + q.mean, the last equal for all rows.
    term = -mean_product if METRIC == "inner_product" else 0.5 * squared
    if METRIC == "cosine":
        # A zero row counts as a unit vector orthogonal to every query.
        term += tl.where(factor == 0, 0.5 * scaling * scaling, 0.0)
    bounded = (norm <= _LARGEST_NORM) & (tl.abs(term) <= _LARGEST_ROW_TERM)
    stored = tl.where(bounded, term, 0.0).to(tl.float32)
    tl.store(row_terms + slots, tl.where(live, stored, _INFINITY))
    tl.store(factors + slots, factor)
    _store_group_bounds(
        bounds + group,
        tl.num_programs(0),
        tl.max(tl.where(live & bounded, residual, 0.0)),
        tl.max(tl.where(live, tl.where(bounded, norm, _INFINITY), 0.0)),
        tl.max(tl.where(live & bounded, tl.abs(term), 0.0)),
        tl.cast(dim, tl.float64),
    )


@triton.jit(do_not_specialize=["num_queries"])
def _pack_queries_kernel(
    queries,  # [Q, D]
    query_stride,
    mean,  # [D] float64
    scale,  # [] float64
    shift,  # [] float64
    values,  # [slots, width]
    factors,  # [Q]
    bounds,  # [3, Q]
    num_queries,
    dim,
    width,
    METRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slots = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = slots < num_queries
    factor, residual, norm, _, _ = _pack_rows(
        queries + slots * query_stride,
        live,
        mean,
        tl.load(scale),
        values + slots * width,
        dim,
        width,
        METRIC,
        ROWS,
        BLOCK_D,
    )
    bounded = norm <= _LARGEST_NORM
    noise = _float64_noise(norm + tl.load(shift), tl.cast(dim, tl.float64))
    slack = tl.where(bounded, noise * _SPARE + _TINY, 0.0)
    norm = tl.where(bounded, norm * _SPARE + _TINY, _INFINITY)
    residual = tl.where(bounded, residual * _SPARE + _TINY, _INFINITY)
    tl.store(factors + slots, factor, mask=live)
    tl.store(bounds + slots, norm.to(tl.float32), mask=live)
    tl.store(bounds + num_queries + slots, residual.to(tl.float32), mask=live)
    tl.store(bounds + 2 * num_queries + slots, slack.to(tl.float32), mask=live)
