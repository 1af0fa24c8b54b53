"""The gradient of deformable attention by values, in an order that is the same in every run.

What points add to cells is written down, one term for each corner: the cell, and the factor of the
gradient of the query. Terms are sorted by cell, those of one cell staying in order, and each cell
then gathers its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._triton.sampling_arguments import CHANGING, Sampling
from pyfeat._triton.sampling_points import (
    corner_of_point,
    level_block,
    level_sizes,
    place_of_point,
    softmax_terms,
    weight_of_point,
)

# Terms that are sorted at a time; each takes 4 or 8 bytes for its cell, as many for its factor, and
# in the sort the cell and an index of 8 bytes twice: at most 128 MB in all.
_MAX_TERMS = 1 << 21
# Queries of one program, each with one head, and logits that it reads at a time.
_BLOCK_Q = 128
_BLOCK_T = 16
# Elements that a program of one cell reads at a time, terms times channels; where cells have few
# terms, no more than that many terms.
_ELEMENTS = 1024
_FEW_TERMS = 4
_MAX_WARPS = 8


def sorted_value_gradient(sampling: Sampling, grad_output: Tensor, by_value: Tensor) -> None:
    """Add to ``by_value`` (B, S, H, D) the gradient by values.

    Args:
        sampling: The arguments of the sums; not empty.
        grad_output: (B, Q, H D), contiguous.
        by_value: In ``sampling.accumulator``, contiguous.
    """
    batch, num_queries, num_heads, num_points, _ = sampling.locations.shape
    num_cells, dim = sampling.value.shape[1], sampling.value.shape[3]
    corners = 1 if sampling.discrete else 2**sampling.ndim
    terms = num_heads * num_points * corners  # of one query
    step = max(1, _MAX_TERMS // terms)
    grads = grad_output.view(batch * num_queries, num_heads * dim)
    for first in range(0, batch * num_queries, step):
        last = min(first + step, batch * num_queries)
        batches = slice(first // num_queries, (last - 1) // num_queries + 1)
        num_slots = (batches.stop - batches.start) * num_heads * num_cells
        slots, factors = _terms(sampling, first, last, terms, num_slots, batches.start)
        slots, order = slots.sort(stable=True)
        ends = torch.searchsorted(slots, torch.arange(num_slots, device=slots.device), right=True)
        block_d = triton.next_power_of_2(dim)
        block_t = max(1, _ELEMENTS // block_d)
        if len(order) <= _FEW_TERMS * num_slots:
            block_t = min(block_t, _FEW_TERMS)
        _gather_terms_kernel[(num_slots,)](
            ends,
            order,
            factors,
            grads[first:last],
            by_value[batches],
            num_cells,
            num_heads,
            num_points * corners,
            D=dim,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=min(max(1, block_t * block_d // 256), _MAX_WARPS),
            enable_fp_fusion=True,
        )


def _terms(
    sampling: Sampling, first: int, last: int, terms: int, num_slots: int, first_batch: int
) -> tuple[Tensor, Tensor]:
    """Of the queries [first, last) of all batches: slots, ``num_slots`` for no cell, and factors.

    A slot is a cell of a head of a batch, counted from those of ``first_batch``.
    """
    _, num_queries, num_heads, num_points, _ = sampling.locations.shape
    device = sampling.value.device
    count = (last - first) * terms
    slot_dtype = torch.int32 if num_slots < 2**31 - 1 else torch.int64
    slots = torch.empty(count, dtype=slot_dtype, device=device)
    factors = torch.empty(count, dtype=sampling.accumulator, device=device)
    rows = slice(first * num_heads, last * num_heads)
    _corner_terms_kernel[(triton.cdiv((last - first) * num_heads, _BLOCK_Q),)](
        sampling.locations.flatten(0, 2)[rows],
        sampling.weights.flatten(0, 2)[rows],
        slots,
        factors,
        (last - first) * num_heads,
        first - first_batch * num_queries,
        num_slots,
        sampling.value.shape[1],
        num_queries,
        num_heads,
        num_points,
        len(sampling.shapes),
        *sampling.levels(),
        **sampling.constants(),
        BLOCK_Q=_BLOCK_Q,
        BLOCK_T=_BLOCK_T,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return slots, factors


@triton.jit(do_not_specialize=[*CHANGING, "num_rows", "first_query", "num_slots", "num_cells"])
def _corner_terms_kernel(
    locations,  # [rows, T, N]
    weights,  # [rows, T]
    slots,  # [rows, T, corners]
    factors,  # [rows, T, corners]
    num_rows,  # of queries and heads
    first_query,  # in the first batch that has slots
    num_slots,
    num_cells,
    num_queries,
    num_heads,
    num_points,
    num_levels,
    level_0,
    level_1,
    level_2,
    level_3,
    level_4,
    level_5,
    level_6,
    level_7,
    N: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DISCRETE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DOUBLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    CORNERS: tl.constexpr = 1 if DISCRETE else 2**N
    levels = level_block(level_0, level_1, level_2, level_3, level_4, level_5, level_6, level_7)
    row = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = row < num_rows
    batch = (row // num_heads + first_query) // num_queries
    first_slot = (batch * num_heads + row % num_heads) * num_cells
    point = row * num_points
    shift, factor = softmax_terms(weights + point, live, num_points, SOFTMAX, DOUBLE, BLOCK_T)
    for index in range(num_levels):
        z, y, x, count = level_sizes(index, levels, N)
        for _ in range(count):
            iz, iy, ix, tz, ty, tx, _sz, _sy, _sx, counted = place_of_point(
                locations + point * N, live, z, y, x, N, DOUBLE, BORDER, ALIGN_CORNERS, DISCRETE
            )
            weight = weight_of_point(weights + point, counted, shift, factor, SOFTMAX, DOUBLE)
            for CORNER in tl.static_range(CORNERS):
                cell, inside, wz, wy, wx = corner_of_point(
                    CORNER, iz, iy, ix, tz, ty, tx, counted, z, y, x, N, WIDE
                )
                at = point * CORNERS + CORNER
                slot = tl.where(inside, first_slot + cell, num_slots)
                tl.store(slots + at, slot, mask=live)
                tl.store(factors + at, weight * (wz * wy * wx), mask=live)
            point += 1
        first_slot += z * y * x


# One program for each slot: a cell of one head of one batch.
@triton.jit(do_not_specialize=["num_cells", "terms_per_row"])
def _gather_terms_kernel(
    ends,  # [slots] int64, ends of the slots' terms in the order
    order,  # [terms] int64
    factors,  # [terms]
    grads,  # [rows, D]
    by_value,  # [B, S, H, D]
    num_cells,
    num_heads,
    terms_per_row,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + slot - 1, mask=slot > 0, other=0)
    end = tl.load(ends + slot)
    channel = tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_T, BLOCK_D), by_value.dtype.element_ty)
    for first in range(begin, end, BLOCK_T):
        place = first + tl.arange(0, BLOCK_T)
        live = place < end
        term = tl.load(order + place, mask=live, other=0)
        factor = tl.load(factors + term, mask=live, other=0.0)
        at = grads + (term // terms_per_row * D)[:, None] + channel[None, :]
        grad = tl.load(at, mask=live[:, None] & (channel < D)[None, :], other=0.0)
        sums += factor[:, None] * grad.to(sums.dtype)
    head_of_batch = slot // num_cells
    batch = head_of_batch // num_heads
    row = (batch * num_cells + slot % num_cells) * num_heads + head_of_batch % num_heads
    at = by_value + row * D + channel
    inside = channel < tl.where(begin < end, D, 0)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.sum(sums, axis=0), mask=inside)
