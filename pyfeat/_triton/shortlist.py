"""Which groups of rows may still hold one of the k nearest.

Tensor cores multiply the packed rows; of every group of rows only the smallest score leaves the tile
in which it arose. A group's rows are spread evenly over a tile of 128 rows: these columns of a tile
lie in one thread's registers, so that the minimum costs no exchange between threads.

A group's smallest score bounds its nearest row from above and from below. The k-th smallest upper
bound over groups is one for the k-th nearest row, as each group has at least one row; a group whose
lower bound exceeds it holds none of the k nearest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._triton.pack import TILE, PackedMemory, PackedQueries
from pyfeat._triton.tile_table import tiles_of
from pyfeat._triton.tiles import TileConfig, swizzled

# Factor on the error bounds, for the float32 arithmetic on them.
_SPARE = 1.0 + 2.0**-20

# Upper bounds kept per query, each the smallest of the groups that fall to it: the k-th smallest of
# them is a bound, and hardly a looser one, as two of the k best groups seldom fall to the same.
LANES = 512

# Marks of groups are kept in words of this many bits.
MARK_BITS = tl.constexpr(32)

_MARK_QUERIES = 4


# Packed rows and queries come in multiples of these.
ROW_MULTIPLE = 256
QUERY_MULTIPLE = 128


def choose_tile(num_queries: int, device: torch.device, *, masked: bool) -> TileConfig:
    """The smallest tile that holds all queries, else the largest.

    Large ones because the second-level cache feeds about 6 TB/s, 1/10 of what the tensor cores of an
    H100 would take with tiles of 64 x 64. A tile of the mask would not fit the registers beside a large
    tile of products.
    """
    tiles = tiles_of("search, masked" if masked else "search", device)
    return next((tile for tile in tiles if num_queries <= tile.block_m), tiles[-1])


def mark_words(num_groups: int) -> int:
    """Words that the marks of ``num_groups`` groups take."""
    return int(triton.cdiv(num_groups, MARK_BITS.value))


def group_scores(
    queries: PackedQueries, memory: PackedMemory, allowed: Tensor | None, scores: Tensor
) -> None:
    """Write the smallest score of every group of ``memory`` into ``scores`` (Q, groups) float32.

    Rows ruled out by ``allowed`` (Q, N) uint8, and those that fill up the last block, do not count.
    """
    num_queries, num_groups = scores.shape
    num_slots, width = memory.values.shape
    tile = choose_tile(num_queries, scores.device, masked=allowed is not None)
    grid = (triton.cdiv(num_queries, tile.block_m) * (num_slots // tile.block_n),)
    _group_scores_kernel[grid](
        queries.values,
        memory.values,
        memory.row_terms,
        scores,
        scores if allowed is None else allowed,
        0 if allowed is None else allowed.stride(0),
        0 if allowed is None else allowed.stride(1),
        memory.first_row,
        memory.end_row,
        num_queries,
        num_slots,
        num_groups,
        width,
        MASKED=allowed is not None,
        GROUP=memory.group_rows,
        BLOCK_Q=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


def mark_groups(
    scores: Tensor,
    queries: PackedQueries,
    memory: PackedMemory,
    k: int,
    uppers: Tensor,
    marks: Tensor,
) -> None:
    """Mark the groups that may hold one of the ``k`` nearest rows.

    Args:
        scores: (Q, groups) float32, infinite for a group without rows.
        queries: Their bounds count here.
        memory: Its bounds count here.
        k: At most LANES.
        uppers: (Q, LANES) float32, the smallest upper bounds so far; updated.
        marks: (Q, groups / MARK_BITS) int32, one bit for each group; written.
    """
    num_queries, num_groups = scores.shape
    _mark_groups_kernel[(triton.cdiv(num_queries, _MARK_QUERIES),)](
        scores,
        queries.bounds,
        memory.bounds,
        uppers,
        marks,
        num_queries,
        num_groups,
        marks.shape[1],
        k,
        _SPARE,
        ONLY_NEAREST=k == 1,
        QUERIES=_MARK_QUERIES,
        LANES=LANES,
        num_warps=4,
        maxnreg=128,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["first_row", "end_row", "num_queries"])
def _group_scores_kernel(
    queries,  # [query slots, width]
    memory,  # [slots, width]
    row_terms,  # [slots] float32, infinite for rows that do not count
    scores,  # [Q, groups] float32
    allowed,  # [Q, N] uint8 if MASKED
    allowed_query_stride,
    allowed_row_stride,
    first_row,
    end_row,
    num_queries,
    num_slots,
    num_groups,
    width,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    query_block, row_block = swizzled(
        tl.program_id(0), tl.cdiv(num_queries, BLOCK_Q), num_slots // BLOCK_N, 16
    )
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    query_values = queries + query[:, None] * width + column[None, :]
    row_values = memory + slot[None, :] * width + column[:, None]
    products = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for _ in range(0, width, BLOCK_K):
        products = tl.dot(tl.load(query_values), tl.load(row_values), products)
        query_values += BLOCK_K
        row_values += BLOCK_K

    score = tl.load(row_terms + slot)[None, :] - products
    live = query < num_queries
    if MASKED:
        row = first_row + slot.to(tl.int64)
        inside = live[:, None] & (row < end_row)[None, :]
        offset = (
            query.to(tl.int64)[:, None] * allowed_query_stride + row[None, :] * allowed_row_stride
        )
        score = tl.where(tl.load(allowed + offset, mask=inside, other=0) != 0, score, float("inf"))

    groups: tl.constexpr = BLOCK_N // GROUP
    score = tl.reshape(score, (BLOCK_Q, BLOCK_N // TILE, GROUP, TILE // GROUP))
    smallest = tl.reshape(tl.min(score, axis=2), (BLOCK_Q, groups))
    group = row_block * groups + tl.arange(0, groups)
    tl.store(scores + query[:, None] * num_groups + group[None, :], smallest, mask=live[:, None])


@triton.jit
def _bounded_scores(scores, query_bounds, row_bounds, query, group, num_queries, num_groups, spare):
    """Scores (queries, groups), 0 without rows, where there are rows, and bounds on the error."""
    live = query < num_queries
    norm = tl.load(query_bounds + query, mask=live, other=1.0)[:, None]
    residual = tl.load(query_bounds + num_queries + query, mask=live, other=1.0)[:, None]
    query_slack = tl.load(query_bounds + 2 * num_queries + query, mask=live, other=1.0)[:, None]
    inside = group < num_groups
    reach = tl.load(row_bounds + group, mask=inside, other=1.0)[None, :]
    row_norm = tl.load(row_bounds + num_groups + group, mask=inside, other=1.0)[None, :]
    row_slack = tl.load(row_bounds + 2 * num_groups + group, mask=inside, other=1.0)[None, :]

    offset = query[:, None] * num_groups + group[None, :]
    score = tl.load(scores + offset, mask=live[:, None] & inside[None, :], other=float("inf"))
    filled = score != float("inf")
    score = tl.where(filled, score, 0.0)
    error = norm * reach + residual * row_norm + (query_slack + row_slack)
    # The last term is for the rounding of score + error and score - error.
    return score, filled, error * spare + tl.abs(score) * 2.0**-22


@triton.jit
def _ordered(bits):
    """Integers in the order of the floats whose bits these are, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_smallest(values, k):
    """k-th smallest (rows,) of the columns of ``values`` (rows, columns) float32, by bisection."""
    keys = _ordered(values.to(tl.int32, bitcast=True))
    low = tl.min(keys, axis=1)
    high = tl.max(keys, axis=1)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        enough = tl.sum((keys <= middle[:, None]).to(tl.int32), axis=1) >= k
        low = tl.where(enough, low, tl.minimum(middle + 1, high))
        high = tl.where(enough, middle, high)
    return _ordered(high).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_queries", "num_words", "k"])
def _mark_groups_kernel(
    scores,  # [Q, groups]
    query_bounds,  # [3, Q]
    row_bounds,  # [3, groups]
    uppers,  # [Q, LANES]
    marks,  # [Q, words] int32
    num_queries,
    num_groups,
    num_words,
    k,
    spare,
    ONLY_NEAREST: tl.constexpr,
    QUERIES: tl.constexpr,
    LANES: tl.constexpr,
):
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, LANES)
    live = query < num_queries
    kept = uppers + query[:, None] * LANES + lane[None, :]
    smallest = tl.load(kept, mask=live[:, None], other=float("inf"))
    for start in range(0, num_groups, LANES):
        score, filled, error = _bounded_scores(
            scores, query_bounds, row_bounds, query, start + lane, num_queries, num_groups, spare
        )
        # fmin: an upper bound that is NaN is none.
        smallest = tl.minimum(smallest, tl.where(filled, score + error, float("inf")))
    tl.store(kept, smallest, mask=live[:, None])
    threshold = tl.min(smallest, axis=1) if ONLY_NEAREST else _kth_smallest(smallest, k)

    bit = tl.arange(0, MARK_BITS)
    for start in range(0, num_groups, LANES):
        score, filled, error = _bounded_scores(
            scores, query_bounds, row_bounds, query, start + lane, num_queries, num_groups, spare
        )
        # A lower bound that is NaN must not drop a group.
        marked = filled & ~(score - error > threshold[:, None])
        bits = (
            tl.reshape(marked.to(tl.int32), (QUERIES, LANES // MARK_BITS, MARK_BITS))
            << bit[None, None, :]
        )
        word = start // MARK_BITS + tl.arange(0, LANES // MARK_BITS)
        inside = live[:, None] & (word < num_words)[None, :]
        tl.store(
            marks + query[:, None] * num_words + word[None, :], tl.sum(bits, axis=2), mask=inside
        )
