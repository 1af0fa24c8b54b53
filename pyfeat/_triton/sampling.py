"""Deformable attention: weighted sums of values at fractional positions of levels.

A program takes a block of queries of one head. Of each point it finds the position once for every
16 bytes of channels, reads up to 2^n corners, 16 bytes at a time, and adds them to float32 sums,
which stay in registers until the end. With ``softmax`` the weights are taken from the logits on the
way; they are never stored.

Cost of 13,294 queries of 8 heads of 32 channels in float32, 16 points each, on an H100 (3.35 TB/s,
about 6 TB/s from its second-level cache), by arithmetic: 48 MB to be read or written at least once,
14 us, but 871 MB of corners, 145 us from the second-level cache. Blocks of queries that are
neighbours in their level sample the same cells, which the first-level cache then holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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

# Logits that a program reads at a time.
BLOCK_T = 16


def sampled_sums(sampling: Sampling, dtype: torch.dtype) -> Tensor:
    """(B, Q, H D) of ``dtype``: each rounded once from a sum in ``sampling.accumulator``.

    Memory: the result.
    """
    batch, num_queries, num_heads = sampling.locations.shape[:3]
    dim = sampling.value.shape[3]
    shape = (batch, num_queries, num_heads * dim)
    if sampling.is_empty:
        return sampling.value.new_zeros(shape, dtype=dtype)
    out = sampling.value.new_empty(shape, dtype=dtype)
    blocks = QueryBlocks.of(sampling)
    _sampled_sums_kernel[(blocks.count * num_heads * batch,)](
        sampling.value,
        sampling.locations,
        sampling.weights,
        out,
        blocks.count,
        *sampling.arguments(),
        **sampling.constants(),
        **blocks.constants(dim),
        BLOCK_T=BLOCK_T,
    )
    return out


@triton.jit(do_not_specialize=CHANGING)
def _sampled_sums_kernel(
    value,  # [B, S, H, D]
    locations,  # [B, Q, H, T, N]
    weights,  # [B, Q, H, T]
    out,  # [B, Q, H, D]
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
):
    ACCUMULATOR: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    CORNERS: tl.constexpr = 1 if DISCRETE else 2**N
    levels = level_block(level_0, level_1, level_2, level_3, level_4, level_5, level_6, level_7)
    row, live, batch, head = rows_of_program(
        num_blocks, num_queries, num_heads, num_levels, levels, N, BLOCK_Q, TILED, TILE_Y, TILE_X
    )
    location_at = locations + row * num_points * N
    weight_at = weights + row * num_points
    shift, factor = softmax_terms(weight_at, live, num_points, SOFTMAX, DOUBLE, BLOCK_T)
    channel = tl.arange(0, BLOCK_D)
    level_at = value + batch * batch_stride + head * head_stride
    sums = tl.zeros((BLOCK_Q, BLOCK_D), ACCUMULATOR)
    for index in range(num_levels):
        z, y, x, count = level_sizes(index, levels, N)
        for _ in range(count):
            iz, iy, ix, tz, ty, tx, _sz, _sy, _sx, counted = place_of_point(
                location_at, live, z, y, x, N, DOUBLE, BORDER, ALIGN_CORNERS, DISCRETE
            )
            weight = weight_of_point(weight_at, counted, shift, factor, SOFTMAX, DOUBLE)
            for CORNER in tl.static_range(CORNERS):
                cell, inside, wz, wy, wx = corner_of_point(
                    CORNER, iz, iy, ix, tz, ty, tx, counted, z, y, x, N, WIDE
                )
                at = level_at + (cell * cell_stride)[:, None] + channel[None, :]
                mask = inside[:, None]
                if D != BLOCK_D:
                    mask &= (channel < D)[None, :]
                values = tl.load(at, mask=mask, other=0.0).to(ACCUMULATOR)
                sums += (weight * (wz * wy * wx))[:, None] * values
            location_at += N
            weight_at += 1
        level_at += (z * y * x).to(tl.int64) * cell_stride
    at = out + row[:, None] * D + channel[None, :]
    mask = live[:, None]
    if D != BLOCK_D:
        mask &= (channel < D)[None, :]
    tl.store(at, sums, mask=mask)
