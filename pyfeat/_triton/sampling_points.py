"""Where points lie in their levels, which every kernel of deformable attention begins with.

Positions and weights are float32, float64 for float64 values.
"""

import triton
import triton.language as tl


@triton.jit
def level_block(level_0, level_1, level_2, level_3, level_4, level_5, level_6, level_7):
    """The numbers of all levels as one block (8,) int64."""
    place = tl.arange(0, 8)
    levels = tl.zeros((8,), tl.int64) + level_0
    levels = tl.where(place == 1, level_1, levels)
    levels = tl.where(place == 2, level_2, levels)
    levels = tl.where(place == 3, level_3, levels)
    levels = tl.where(place == 4, level_4, levels)
    levels = tl.where(place == 5, level_5, levels)
    levels = tl.where(place == 6, level_6, levels)
    return tl.where(place == 7, level_7, levels)


@triton.jit
def level_sizes(index, levels, N: tl.constexpr):
    """Sizes of a level along z, y and x, 1 for axes that are missing, and its number of points."""
    level = tl.sum(tl.where(tl.arange(0, 8) == index, levels, 0), axis=0)
    z = tl.full((), 1, tl.int32)
    y = tl.full((), 1, tl.int32)
    if N == 1:
        x = level & 0xFFFFFFFFFFFF
    elif N == 2:
        x = level & 0xFFFFFF
        y = ((level >> 24) & 0xFFFFFF).to(tl.int32)
    else:
        x = level & 0xFFFF
        y = ((level >> 16) & 0xFFFF).to(tl.int32)
        z = ((level >> 32) & 0xFFFF).to(tl.int32)
    return z, y, x.to(tl.int32), (level >> 48).to(tl.int32)


@triton.jit
def queries_of_block(
    block,
    num_queries,
    num_levels,
    levels,
    N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILED: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Queries (BLOCK_Q,) of a block, and which of them there are."""
    lane = tl.arange(0, BLOCK_Q)
    if not TILED:
        query = block * BLOCK_Q + lane
        return query, query < num_queries
    TILE_Z: tl.constexpr = BLOCK_Q // (TILE_Y * TILE_X)
    first_block = 0
    first_query = 0
    # One level has the block and sets it anew. A constant crashes the compilers of Triton 3.3 to 3.5.
    at = block
    start = block * 0
    depth = block * 0
    height = block * 0
    width = block * 0
    for index in range(num_levels):
        z, y, x, _count = level_sizes(index, levels, N)
        end = first_block + tl.cdiv(z, TILE_Z) * tl.cdiv(y, TILE_Y) * tl.cdiv(x, TILE_X)
        here = (block >= first_block) & (block < end)
        at = tl.where(here, block - first_block, at)
        start = tl.where(here, first_query, start)
        depth = tl.where(here, z, depth)
        height = tl.where(here, y, height)
        width = tl.where(here, x, width)
        first_block = end
        first_query += z * y * x
    across = tl.cdiv(width, TILE_X)
    down = tl.cdiv(height, TILE_Y)
    x = at % across * TILE_X + lane % TILE_X
    y = at // across % down * TILE_Y + lane // TILE_X % TILE_Y
    z = at // (across * down) * TILE_Z + lane // (TILE_X * TILE_Y)
    return start + (z * height + y) * width + x, (z < depth) & (y < height) & (x < width)


@triton.jit
def rows_of_program(
    num_blocks,
    num_queries,
    num_heads,
    num_levels,
    levels,
    N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILED: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):
    """Rows (BLOCK_Q,) of batches, queries and heads, which there are, and the batch and head."""
    # Programs of one head follow each other: its values stay in the cache.
    slice_of_batch = tl.program_id(0) // num_blocks
    query, live = queries_of_block(
        tl.program_id(0) % num_blocks,
        num_queries,
        num_levels,
        levels,
        N,
        BLOCK_Q,
        TILED,
        TILE_Y,
        TILE_X,
    )
    batch = (slice_of_batch // num_heads).to(tl.int64)
    head = (slice_of_batch % num_heads).to(tl.int64)
    return (batch * num_queries + query) * num_heads + head, live, batch, head


@triton.jit
def _place(
    p,
    size,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DISCRETE: tl.constexpr,
):
    """Along one axis: lower cell, fraction of the way to the next, its slope, and what counts."""
    length = tl.zeros_like(p) + size.to(p.dtype)
    last = length - 1
    if DISCRETE:
        u = p * length + 0.5
        slope = length
    elif ALIGN_CORNERS:
        u = p * last
        slope = last
    else:
        u = p * length - 0.5
        slope = length
    # Positions are compared before they are converted: not every float is an integer.
    if BORDER or DISCRETE:
        counted = (p == p) & (length > 0)
        slope = tl.where((u > 0) & (u < last), slope, 0.0)
        u = tl.where(u > 0, u, 0.0)
        u = tl.where(u < last, u, last)
    else:
        counted = (u >= -1) & (u < length) & (length > 0)
    u = tl.where(counted, u, 0.0)
    lower = tl.floor(u)
    fraction = u - lower
    if DISCRETE:
        fraction = tl.zeros_like(u)
    return lower.to(tl.int32), fraction, slope, counted


@triton.jit
def place_of_point(
    at,  # [BLOCK_Q] pointers to the point's location
    live,  # [BLOCK_Q]
    z,
    y,
    x,
    N: tl.constexpr,
    DOUBLE: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    DISCRETE: tl.constexpr,
):
    """Lower cells, fractions and slopes along z, y and x, and which points count.

    Of axes that are missing, what is returned stands in their place and is not to be used.
    """
    POSITION: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    p = tl.load(at, mask=live, other=0.0).to(POSITION)
    ix, tx, sx, counted = _place(p, x, BORDER, ALIGN_CORNERS, DISCRETE)
    iy, ty, sy = ix, tx, sx
    iz, tz, sz = ix, tx, sx
    counted &= live
    if N >= 2:
        p = tl.load(at + 1, mask=live, other=0.0).to(POSITION)
        iy, ty, sy, inside = _place(p, y, BORDER, ALIGN_CORNERS, DISCRETE)
        counted &= inside
    if N == 3:
        p = tl.load(at + 2, mask=live, other=0.0).to(POSITION)
        iz, tz, sz, inside = _place(p, z, BORDER, ALIGN_CORNERS, DISCRETE)
        counted &= inside
    return iz, iy, ix, tz, ty, tx, sz, sy, sx, counted


@triton.jit
def corner_of_point(
    CORNER: tl.constexpr,  # bit 0 is set for the upper cell along x, bit 1 along y, bit 2 along z
    iz,
    iy,
    ix,
    tz,
    ty,
    tx,
    counted,
    z,
    y,
    x,
    N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Cell in the level, whether it is one, and the shares of the weight along z, y and x."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    cell = ix + CORNER % 2
    inside = counted & (cell >= 0) & (cell < x)
    cell = cell.to(OFFSET)
    wx = tx if CORNER % 2 == 1 else 1.0 - tx
    wy = tl.zeros_like(tx) + 1.0
    wz = wy
    if N >= 2:
        row = iy + CORNER // 2 % 2
        inside &= (row >= 0) & (row < y)
        cell += row.to(OFFSET) * x
        wy = ty if CORNER // 2 % 2 == 1 else 1.0 - ty
    if N == 3:
        layer = iz + CORNER // 4
        inside &= (layer >= 0) & (layer < z)
        cell += layer.to(OFFSET) * (y * x)
        wz = tz if CORNER // 4 == 1 else 1.0 - tz
    return cell, inside, wz, wy, wx


@triton.jit
def softmax_terms(
    at,  # [BLOCK_Q] pointers to the logits of the first point
    live,
    num_points,
    SOFTMAX: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``shift`` and ``factor``: the weight of a point is ``exp(logit - shift) factor``."""
    ACCUMULATOR: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    total = tl.zeros(at.shape, ACCUMULATOR)
    if not SOFTMAX:
        return total, total
    shift = tl.full(at.shape, -float("inf"), ACCUMULATOR)
    for first in range(0, num_points, BLOCK_T):
        point = first + tl.arange(0, BLOCK_T)
        inside = (point < num_points)[None, :]
        logits = tl.load(at[:, None] + point[None, :], mask=live[:, None] & inside, other=0.0)
        logits = tl.where(inside, logits.to(ACCUMULATOR), -float("inf"))
        largest = tl.maximum(shift, tl.max(logits, axis=1))
        # Only infinite ones so far: their difference would not be a number.
        finite = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(shift - finite) + tl.sum(tl.exp(logits - finite[:, None]), axis=1)
        shift = largest
    return tl.where(shift == -float("inf"), 0.0, shift), 1.0 / total


@triton.jit
def weight_of_point(
    at,  # [BLOCK_Q] pointers to the point's weight or logit
    counted,
    shift,
    factor,
    SOFTMAX: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """The weight of a point, 0 if it does not count, even if the softmax is not a number."""
    ACCUMULATOR: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    weight = tl.load(at, mask=counted, other=0.0).to(ACCUMULATOR)
    if SOFTMAX:
        weight = tl.where(counted, tl.exp(weight - shift) * factor, 0.0)
    return weight
