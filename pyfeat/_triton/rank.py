"""The ranking that counts: distances by direct differences in float64, of the marked groups' rows."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyfeat._triton.pack import (
    PackedMemory,
    PackedQueries,
    group_slots,
    live_rows,
    load_float64,
)
from pyfeat._triton.shortlist import MARK_BITS, mark_words

# Words of marks that one program reads at a time.
_WORDS = 32
# Few queries are cut into slices of the memory until there are about this many programs.
_PROGRAMS = 2048
# Features that one program holds at a time: more would leave registers for fewer programs.
_BLOCK_FEATURES = 512
# Indices that are no rows: of the neighbours still missing, and behind these, of rows that may not be
# offered.
MISSING = 1 << 61
_NEVER = tl.constexpr(1 << 62)


@dataclass(frozen=True)
class Candidates:
    """The k best rows so far of each query and slice of the memory, in no order."""

    keys: Tensor  # [Q, slices, k] float64, smaller is nearer; infinite where there is none
    rows: Tensor  # [Q, slices, k] int64

    @classmethod
    def none(cls, num_queries: int, num_groups: int, k: int, device: torch.device) -> "Candidates":
        """No candidates yet, to be sought in ``num_groups`` groups at a time."""
        blocks = triton.cdiv(mark_words(num_groups), _WORDS)
        slices = max(1, min(blocks, _PROGRAMS // num_queries))
        shape = (num_queries, slices, k)
        keys = torch.full(shape, float("inf"), dtype=torch.float64, device=device)
        # Distinct, so that one at a time is replaced.
        rows = torch.arange(MISSING, MISSING + k, device=device)
        return cls(keys, rows.expand(shape).contiguous())

    def ranked(self) -> tuple[Tensor, Tensor]:
        """Keys and rows (Q, k) each, by key, then by row."""
        k = self.keys.shape[2]
        if self.keys.shape[1:] == (1, 1):
            return self.keys[:, 0], self.rows[:, 0]
        rows, order = self.rows.flatten(1).sort(dim=1)
        keys = self.keys.flatten(1).gather(1, order)
        keys, order = keys.sort(dim=1, stable=True)
        return keys[:, :k], rows.gather(1, order)[:, :k]


def rank_marked(
    queries: Tensor,
    memory: Tensor,
    packed_queries: PackedQueries,
    packed: PackedMemory,
    metric: str,
    allowed: Tensor | None,
    marks: Tensor,
    candidates: Candidates,
) -> None:
    """Offer the rows of all marked groups to ``candidates``.

    Args:
        queries: (Q, D).
        memory: (N, D).
        packed_queries: For the factors of cosine.
        packed: The range of rows that the marks are about.
        metric: The distance, by name.
        allowed: (Q, N) uint8, zero for rows to leave out.
        marks: (Q, words) int32.
        candidates: Updated.
    """
    num_queries, num_slices, k = candidates.keys.shape
    _rank_marked_kernel[(num_queries, num_slices)](
        queries,
        queries.stride(0),
        memory,
        memory.stride(0),
        packed_queries.factors,
        packed.factors,
        memory if allowed is None else allowed,
        0 if allowed is None else allowed.stride(0),
        0 if allowed is None else allowed.stride(1),
        marks,
        candidates.keys,
        candidates.rows,
        packed.first_row,
        packed.end_row,
        marks.shape[1],
        queries.shape[1],
        k,
        METRIC=metric,
        MASKED=allowed is not None,
        GROUP=packed.group_rows,
        WORDS=_WORDS,
        K=triton.next_power_of_2(k),
        BLOCK_D=_BLOCK_FEATURES // packed.group_rows,
        num_warps=1,
        maxnreg=168,  # left alone, ptxas spills some to fit one more program on a processor
        enable_fp_fusion=False,
    )


@triton.jit
def _keys(
    query,  # pointer to the query's first feature
    rows,  # [GROUP] pointers to the rows' first features
    live,  # [GROUP]
    query_factor,
    factors,  # [GROUP]
    dim,
    METRIC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the metric ranks by (GROUP,) float64: smaller is nearer. Equal rows get equal bits."""
    columns = tl.arange(0, BLOCK_D)
    terms = tl.zeros((GROUP, BLOCK_D), tl.float64)
    for start in range(0, dim, BLOCK_D):
        column = start + columns
        inside = column < dim
        q = load_float64(query + column, inside)[None, :]
        x = load_float64(rows[:, None] + column[None, :], live[:, None] & inside[None, :])
        if METRIC == "inner_product":
            terms -= q * x
        else:
            if METRIC == "cosine":
                q *= query_factor
                x *= factors[:, None]
            difference = q - x
            terms += difference * difference
    key = tl.sum(terms, axis=1)
    if METRIC == "cosine":
        # 1 - cos = ||q/|q| - x/|x|||^2 / 2 keeps its digits for near-parallel vectors; the angle to
        # a zero vector counts as a right one.
        key = tl.where(tl.minimum(factors, query_factor) == 0, 1.0, 0.5 * key)
    return tl.where(live, key, float("inf"))


@triton.jit
def _first(keys, rows):
    """Smallest key, and the smallest row that has it."""
    key = tl.min(keys)
    return key, tl.min(tl.where(keys == key, rows, _NEVER))


@triton.jit
def _last(keys, rows):
    """Largest key, and the largest row that has it."""
    key = tl.max(keys)
    return key, tl.max(tl.where(keys == key, rows, -1))


@triton.jit
def _offer(key, row, keys, rows):
    """Let candidates replace the worst of the best while they precede it: by key, then by row."""
    near_key, near_row = _first(key, row)
    last_key, last_row = _last(keys, rows)
    while (near_key < last_key) | ((near_key == last_key) & (near_row < last_row)):
        replaced = (keys == last_key) & (rows == last_row)
        keys = tl.where(replaced, near_key, keys)
        rows = tl.where(replaced, near_row, rows)
        last_key, last_row = _last(keys, rows)
        taken = row == near_row
        key = tl.where(taken, float("inf"), key)
        row = tl.where(taken, _NEVER, row)
        near_key, near_row = _first(key, row)
    return keys, rows


@triton.jit
def _lowest_bit(word):
    """Index of the lowest bit that is set."""
    bit = tl.arange(0, MARK_BITS)
    return tl.min(tl.where(((word >> bit) & 1) != 0, bit, MARK_BITS))


@triton.jit(do_not_specialize=["first_row", "end_row", "num_words", "k"])
def _rank_marked_kernel(
    queries,  # [Q, D]
    query_stride,
    memory,  # [N, D]
    memory_stride,
    query_factors,  # [Q] float64
    row_factors,  # [slots] float64
    allowed,  # [Q, N] uint8 if MASKED
    allowed_query_stride,
    allowed_row_stride,
    marks,  # [Q, words] int32
    best_keys,  # [Q, slices, k] float64
    best_rows,  # [Q, slices, k] int64
    first_row,
    end_row,
    num_words,
    dim,
    k,
    METRIC: tl.constexpr,
    MASKED: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    kept = (query * tl.num_programs(1) + tl.program_id(1)) * k + place
    # Places beyond k hold what is nearer than any row, and so are never replaced.
    keys = tl.load(best_keys + kept, mask=place < k, other=-float("inf"))
    rows = tl.load(best_rows + kept, mask=place < k, other=-1)
    query_factor = tl.load(query_factors + query)
    for start in range(tl.program_id(1) * WORDS, num_words, tl.num_programs(1) * WORDS):
        word = start + tl.arange(0, WORDS)
        words = tl.load(marks + query * num_words + word, mask=word < num_words, other=0)
        at = tl.min(tl.where(words != 0, word, num_words))
        while at < num_words:
            group = at * MARK_BITS + _lowest_bit(tl.sum(tl.where(word == at, words, 0)))
            slots = group_slots(group, GROUP)
            row = first_row + slots
            live = live_rows(
                row, end_row, allowed + query * allowed_query_stride, allowed_row_stride, MASKED
            )
            key = _keys(
                queries + query * query_stride,
                memory + row * memory_stride,
                live,
                query_factor,
                tl.load(row_factors + slots),
                dim,
                METRIC,
                GROUP,
                BLOCK_D,
            )
            keys, rows = _offer(key, tl.where(live, row, _NEVER), keys, rows)
            words = tl.where(word == at, words & (words - 1), words)
            at = tl.min(tl.where(words != 0, word, num_words))

    tl.store(best_keys + kept, keys, mask=place < k)
    tl.store(best_rows + kept, rows, mask=place < k)
