"""Exact nearest neighbours on an NVIDIA GPU.

Three kernels follow one another, and the host never waits for the device:

1. ``pack.py`` rounds rows and queries to bfloat16 and measures what that loses;
2. ``shortlist.py`` multiplies them on tensor cores, keeps the smallest score of every group of 8 or 16
   rows, and marks the groups that may hold one of the k nearest, by a proven error bound;
3. ``rank.py`` ranks the rows of these groups by direct differences in float64.

Cost of 12,544 x 65,536 x 384, k = 1, on an H200 (989 TFLOP/s in bfloat16, 4.8 TB/s): 631 GFLOP, 0.64
ms at the peak and about 1.1 ms at the 55 to 60 % of it that such tiles reach; 16-row scores 206 MB
written and read (0.09 ms); about two groups a query to rank, 0.6 GB (0.13 ms); packing 0.17 GB
(0.04 ms): about 1.4 ms. Of 784 x 16,384 x 1,536: 39 GFLOP in 448 tiles of 128 x 256 on 132
processors, 4 rounds where 3 would do, about 0.09 ms; packing 0.15 GB, 0.03 ms; ranking 0.15 GB, 0.03
ms: about 0.15 ms, less than the launches take if the device is idle.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._checks import with_contiguous_rows
from pyfeat._chunks import even_chunk
from pyfeat._frame import Frame, choose_frame
from pyfeat._triton import MAX_K
from pyfeat._triton.pack import PackedMemory, pack_memory, pack_queries, packed_width
from pyfeat._triton.rank import MISSING, Candidates, rank_marked
from pyfeat._triton.shortlist import (
    LANES,
    QUERY_MULTIPLE,
    ROW_MULTIPLE,
    group_scores,
    mark_groups,
    mark_words,
)

# A block of rows this wide still fits the workspace.
MAX_DIM = 1 << 17

# Shares of the workspace of 256 MB: packed rows, packed queries, scores. Each query adds 2 KB of upper
# bounds and, with k = 64, 1 KB of candidates.
_ROW_BYTES = 64 << 20
_QUERY_BYTES = 32 << 20
_SCORE_BYTES = 96 << 20
_LARGEST_QUERY_CHUNK = 8192


@torch.no_grad()
def knn(
    queries: Tensor, memory: Tensor, k: int, metric: str, *, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of ``memory`` for every query, exactly.

    Args:
        queries: (Q, D) float32, float16, bfloat16 or float64, finite. Copied if the last axis is not
            contiguous.
        memory: (N, D), dtype and device of ``queries``, N >= 1, D <= MAX_DIM.
        k: Neighbours per query, 1 <= k <= MAX_K.
        metric: "euclidean", "sqeuclidean", "cosine" or "inner_product".
        allowed: (N,) or (Q, N) bool; rows where it is False are not found. None allows all.

    Returns:
        Distances (Q, k) float32, or float64 for such inputs, and indices (Q, k) int64, nearest first,
        equal distances in row order. Where fewer than k rows are allowed the rest has index -1 and
        distance inf (-inf for inner_product).

    Raises:
        ValueError: If k or D is too large.

    Precision: the neighbours that float64 brute force by direct differences returns, up to the
    rounding of its sums, whose order is another; equal rows tie exactly. Bit-identical between runs.
    Memory: outputs plus a workspace of at most 256 MB.
    """
    num_queries, dim = queries.shape
    num_rows = memory.shape[0]
    if k > MAX_K:
        message = f"knn: k must be at most {MAX_K} on a GPU, got {k}"
        raise ValueError(message)
    if dim > MAX_DIM:
        message = f"knn: features must have at most {MAX_DIM} columns on a GPU, got {dim}"
        raise ValueError(message)
    wide = queries.dtype == torch.float64
    distances = queries.new_empty((num_queries, k), dtype=torch.float64 if wide else torch.float32)
    indices = queries.new_empty((num_queries, k), dtype=torch.int64)
    if num_queries == 0:
        return distances, indices

    queries, memory = with_contiguous_rows(queries), with_contiguous_rows(memory)
    with torch.cuda.device(memory.device) if memory.is_cuda else nullcontext():
        chunks = _plan(num_queries, num_rows, dim, group_rows=_group_rows(k))
        search = _Search(memory, metric, allowed, chunks)
        for first in range(0, num_queries, chunks.queries):
            part = slice(first, first + chunks.queries)
            keys, rows = search.nearest(queries[part], part, k)
            distances[part] = _distances(keys, metric)
            indices[part] = rows.where(rows < MISSING, -1)
    return distances, indices


class _Chunks(NamedTuple):
    """How much is searched at a time."""

    queries: int
    rows: int
    group_rows: int


def _group_rows(k: int) -> int:
    # Scores cost 12 / rows bytes for each row of the memory, ranking 4 D rows for each neighbour.
    return 16 if k <= 4 else 8


def _plan(num_queries: int, num_rows: int, dim: int, *, group_rows: int) -> _Chunks:
    """Chunks that fit the workspace: the whole memory where possible, as it is then packed once."""
    row_bytes = 2 * packed_width(max(dim, 1))
    most_queries = min(num_queries, _LARGEST_QUERY_CHUNK, _QUERY_BYTES // row_bytes)
    most_rows = _ROW_BYTES // row_bytes
    if num_rows <= most_rows:
        score_bytes = 4 * -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE // group_rows
        most_queries = min(most_queries, _SCORE_BYTES // score_bytes)
    else:
        most_rows = min(most_rows, _SCORE_BYTES // (4 * most_queries) * group_rows)
    return _Chunks(
        even_chunk(num_queries, most_queries, QUERY_MULTIPLE),
        even_chunk(num_rows, most_rows, ROW_MULTIPLE),
        group_rows,
    )


class _Search:
    """One memory and metric; the queries come in chunks."""

    def __init__(
        self, memory: Tensor, metric: str, allowed: Tensor | None, chunks: _Chunks
    ) -> None:
        self.memory = memory  # [N, D]
        self.metric = "euclidean" if metric == "sqeuclidean" else metric  # ranked alike
        self.allowed = None if allowed is None else allowed.view(torch.uint8)  # [N] or [Q, N]
        self.chunks = chunks
        self.frame: Frame = choose_frame(memory, self.metric)
        self.whole = self._packed(0) if chunks.rows >= len(memory) else None

    def nearest(self, queries: Tensor, part: slice, k: int) -> tuple[Tensor, Tensor]:
        """Keys (q, k) float64 and rows (q, k) of ``queries`` (q, D), which are ``part`` of all."""
        device, num_queries = queries.device, len(queries)
        allowed, paired = self._allowed_for(part, num_queries)
        packed_queries = pack_queries(queries, self.frame, multiple=QUERY_MULTIPLE)
        most_groups = self.chunks.rows // self.chunks.group_rows
        scores = torch.empty(num_queries * most_groups, dtype=torch.float32, device=device)
        uppers = torch.full((num_queries, LANES), float("inf"), device=device)
        candidates = Candidates.none(num_queries, most_groups, k, device)
        for first_row in range(0, len(self.memory), self.chunks.rows):
            packed = self.whole or self._packed(first_row)
            groups = packed.num_groups
            found = scores[: num_queries * groups].view(num_queries, groups)
            group_scores(packed_queries, packed, allowed if paired else None, found)
            marks = torch.empty((num_queries, mark_words(groups)), dtype=torch.int32, device=device)
            mark_groups(found, packed_queries, packed, k, uppers, marks)
            rank_marked(
                queries,
                self.memory,
                packed_queries,
                packed,
                self.metric,
                allowed,
                marks,
                candidates,
            )
        return candidates.ranked()

    def _packed(self, first_row: int) -> PackedMemory:
        return pack_memory(
            self.memory,
            first_row,
            min(first_row + self.chunks.rows, len(self.memory)),
            self.frame,
            group_rows=self.chunks.group_rows,
            multiple=ROW_MULTIPLE,
            allowed=self.allowed if self.allowed is not None and self.allowed.ndim == 1 else None,
        )

    def _allowed_for(self, part: slice, num_queries: int) -> tuple[Tensor | None, bool]:
        """The mask (q, N) of a part of the queries, and whether it differs between them."""
        if self.allowed is None:
            return None, False
        if self.allowed.ndim == 1:
            return self.allowed.expand(num_queries, -1), False
        return self.allowed[part], True


def _distances(keys: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return keys.sqrt()
    return -keys if metric == "inner_product" else keys
