"""Gradients of deformable attention by values, locations and weights.

The gradient of a query reaches its points' corners: one pass reads each corner for the sample and
its slope along every axis, n + 1 sums over channels, and adds to the gradient by values. Of a
softmax, ``dz_i = a_i (dA_i - sum_k a_k dA_k)``: the sum comes about on the way, and a second pass
over the points of a query finishes what the first has left, without values.

Additions to values are in no fixed order, unless torch is asked for deterministic algorithms; then
``sampling_sorted.py`` sorts them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._triton.sampling import BLOCK_T
from pyfeat._triton.sampling_arguments import CHANGING, QueryBlocks, Sampling
from pyfeat._triton.sampling_points import (
    corner_of_point,
    level_block,
    level_sizes,
    place_of_point,
    rows_of_program,
    softmax_terms,
    weight_of_point,
)
from pyfeat._triton.sampling_sorted import sorted_value_gradient


def sampling_gradients(
    sampling: Sampling,
    grad_output: Tensor,
    *,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by ``value``, ``locations`` and ``weights``, (0,) where not needed.

    Args:
        sampling: The arguments of the sums.
        grad_output: (B, Q, H D), contiguous.
        need_value: Whether the gradient by values is needed.
        need_locations: That by locations.
        need_weights: That by weights, by logits with ``softmax``.

    Returns:
        (B, S, H, D) in ``sampling.accumulator``, and the others in the dtypes of what they are by.

    Precision: sums in ``sampling.accumulator``. Bit-identical between runs but for additions to
    values, and for these too where torch is asked for deterministic algorithms.
    Memory: results; one more float of each weight if these are logits of another dtype than sums;
    at most 128 MB if additions are sorted.
    """
    value, locations, weights = sampling.value, sampling.locations, sampling.weights
    dtype = sampling.accumulator
    by_value = value.new_zeros(value.shape if need_value else 0, dtype=dtype)
    moves = need_locations and not sampling.discrete  # cells have no slope
    by_locations = locations.new_zeros(locations.shape if need_locations else 0)
    by_weights = weights.new_zeros(weights.shape if need_weights else 0)
    if sampling.is_empty:
        return by_value, by_locations, by_weights
    scatters = need_value and not torch.are_deterministic_algorithms_enabled()
    if need_value and not scatters:
        sorted_value_gradient(sampling, grad_output, by_value)
    if not (scatters or moves or need_weights):
        return by_value, by_locations, by_weights
    products = by_weights
    if sampling.softmax and need_weights and weights.dtype != dtype:
        products = weights.new_empty(weights.shape, dtype=dtype)
    blocks = QueryBlocks.of(sampling)
    batch, _, num_heads = locations.shape[:3]
    _sampling_gradients_kernel[(blocks.count * num_heads * batch,)](
        value,
        locations,
        weights,
        grad_output,
        by_value,
        by_locations,
        by_weights,
        products,
        value.shape[1],
        blocks.count,
        *sampling.arguments(),
        **sampling.constants(),
        **blocks.constants(value.shape[3]),
        BLOCK_T=BLOCK_T,
        SCATTERS=scatters,
        MOVES=moves,
        WEIGHS=need_weights,
    )
    return by_value, by_locations, by_weights


@triton.jit(do_not_specialize=[*CHANGING, "num_cells"])
def _sampling_gradients_kernel(
    value,  # [B, S, H, D]
    locations,  # [B, Q, H, T, N]
    weights,  # [B, Q, H, T]
    grad_output,  # [B, Q, H, D]
    by_value,  # [B, S, H, D] if SCATTERS
    by_locations,  # [B, Q, H, T, N] if MOVES
    by_weights,  # [B, Q, H, T] if WEIGHS
    products,  # [B, Q, H, T] gradients by softmaxed weights, if SOFTMAX and WEIGHS
    num_cells,
    num_blocks,
    num_queries,
    num_heads,
    num_points,
    batch_stride,
    cell_stride,
    head_stride,
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
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILED: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCATTERS: tl.constexpr,
    MOVES: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    ACCUMULATOR: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    CORNERS: tl.constexpr = 1 if DISCRETE else 2**N
    levels = level_block(level_0, level_1, level_2, level_3, level_4, level_5, level_6, level_7)
    row, live, batch, head = rows_of_program(
        num_blocks, num_queries, num_heads, num_levels, levels, N, BLOCK_Q, TILED, TILE_Y, TILE_X
    )
    channel = tl.arange(0, BLOCK_D)
    present = live[:, None]
    if D != BLOCK_D:
        present &= (channel < D)[None, :]
    grad_at = grad_output + row[:, None] * D + channel[None, :]
    grad = tl.load(grad_at, mask=present, other=0.0).to(ACCUMULATOR)
    first_weight = row * num_points
    shift, factor = softmax_terms(
        weights + first_weight, live, num_points, SOFTMAX, DOUBLE, BLOCK_T
    )
    point = row * num_points
    level_at = value + batch * batch_stride + head * head_stride
    grad_stride = num_heads * D
    by_level = by_value + (batch * num_cells * num_heads + head) * D
    total = tl.zeros((BLOCK_Q,), ACCUMULATOR)
    for index in range(num_levels):
        z, y, x, count = level_sizes(index, levels, N)
        for _ in range(count):
            iz, iy, ix, tz, ty, tx, sz, sy, sx, counted = place_of_point(
                locations + point * N, live, z, y, x, N, DOUBLE, BORDER, ALIGN_CORNERS, DISCRETE
            )
            weight = weight_of_point(weights + point, counted, shift, factor, SOFTMAX, DOUBLE)
            sample = tl.zeros((BLOCK_Q, BLOCK_D), ACCUMULATOR)
            along_z = tl.zeros((BLOCK_Q, BLOCK_D), ACCUMULATOR)
            along_y = tl.zeros((BLOCK_Q, BLOCK_D), ACCUMULATOR)
            along_x = tl.zeros((BLOCK_Q, BLOCK_D), ACCUMULATOR)
            for CORNER in tl.static_range(CORNERS):
                cell, inside, wz, wy, wx = corner_of_point(
                    CORNER, iz, iy, ix, tz, ty, tx, counted, z, y, x, N, WIDE
                )
                mask = inside[:, None] & present
                share = wz * wy * wx
                if MOVES or WEIGHS:
                    at = level_at + (cell * cell_stride)[:, None] + channel[None, :]
                    values = tl.load(at, mask=mask, other=0.0).to(ACCUMULATOR)
                    sample += share[:, None] * values
                    along_x += (wz * wy)[:, None] * (values if CORNER % 2 == 1 else -values)
                    if N >= 2:
                        down = values if CORNER // 2 % 2 == 1 else -values
                        along_y += (wz * wx)[:, None] * down
                    if N == 3:
                        along_z += (wy * wx)[:, None] * (values if CORNER // 4 == 1 else -values)
                if SCATTERS:
                    at = by_level + (cell * grad_stride)[:, None] + channel[None, :]
                    added = (weight * share)[:, None] * grad
                    tl.atomic_add(at, added, mask=mask, sem="relaxed")
            if MOVES:
                at = by_locations + point * N
                slope = tl.sum(grad * along_x, axis=1) * (weight * sx)
                tl.store(at, tl.where(counted, slope, 0.0), mask=live)
                if N >= 2:
                    slope = tl.sum(grad * along_y, axis=1) * (weight * sy)
                    tl.store(at + 1, tl.where(counted, slope, 0.0), mask=live)
                if N == 3:
                    slope = tl.sum(grad * along_z, axis=1) * (weight * sz)
                    tl.store(at + 2, tl.where(counted, slope, 0.0), mask=live)
            if WEIGHS:
                product = tl.where(counted, tl.sum(grad * sample, axis=1), 0.0)
                total += weight * product
                tl.store(products + point, product, mask=live)
            point += 1
        num_level_cells = (z * y * x).to(tl.int64)
        level_at += num_level_cells * cell_stride
        by_level += num_level_cells * grad_stride
    if SOFTMAX and WEIGHS:
        # Each point's product was stored by one of the threads that now share it.
        tl.debug_barrier()
        for first in range(0, num_points, BLOCK_T):
            place = first + tl.arange(0, BLOCK_T)
            mask = live[:, None] & (place < num_points)[None, :]
            at = first_weight[:, None] + place[None, :]
            logit = tl.load(weights + at, mask=mask, other=0.0).to(ACCUMULATOR)
            product = tl.load(products + at, mask=mask, other=0.0)
            weight = tl.exp(logit - shift[:, None]) * factor[:, None]
            tl.store(by_weights + at, weight * (product - total[:, None]), mask=mask)
