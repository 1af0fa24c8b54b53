"""Exact nearest neighbours by the CUDA kernels.

For every part of the memory kernels follow one another:

1. queries and rows are rounded to bfloat16, and what that loses is measured (``pack.cuh``);
2. a sample of 1 in 32 rows is multiplied with the queries on tensor cores, and the k-th smallest upper
   bound on the scores of these rows becomes the threshold of each query (``shortlist.cuh``);
3. all rows are multiplied, and those whose lower bound is within the threshold are listed;
4. of the listed rows, those that the k-th smallest upper bound of the list leaves are ranked by direct
   differences in float64 (``rank.cuh``);
5. of queries whose list is too short, as those near a cluster of more than 2,048 rows that rounding does not
   tell apart, all rows are ranked in float64.

Cost of 12,544 x 65,536 x 1,536, k = 1, on an H200 (989 TFLOP/s in bfloat16, 4.8 TB/s), reckoned for
normal rows: 2.53 TFLOP, 2.55 ms at the peak and 3.9 ms at the 65 % that such tiles reach; the sample 0.12
ms; epilogues, two instructions for each product, 0.13 ms; packing 0.71 GB, 0.2 ms, for each of two chunks of
the queries; lists and ranking 0.1 ms: about 4.6 ms, 55 % of the product rate. Where rows lie in narrow
clusters more of them are ranked: of the patch-like rows of ``benchmarks.gpu.lists`` 353 for a query, 4 ms.

Why bfloat16: products of 8-bit whole numbers have twice the rate, but what their rounding loses grows like
the square root of D beside the spread of products. Of 65,536 normal rows they would list 112 instead of 43 at
256 features, where they would save 0.2 of 1.0 ms, 342 instead of 63 at 768, and 737 instead of 68 at 1,536,
where 3 % of the lists would be too short: 60 microseconds for each of these queries, 22 ms.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat import _cuda
from pyfeat._checks import distance_dtype_of, dtype_name, with_contiguous_rows
from pyfeat._chunks import even_chunk
from pyfeat._cuda_ops.frame import address_of, as_matrix, queue_of
from pyfeat._frame import Frame, choose_frame

# Shares of the workspace of 256 MB: packed rows, and what is kept of the queries.
_ROW_BYTES = 80 << 20
_QUERY_BYTES = 160 << 20
# Rows and queries are packed in multiples of these.
_ROW_MULTIPLE = 256
_QUERY_MULTIPLE = 128


@dataclass(frozen=True)
class PackedPart:
    """Rows [first_row, end_row) of a memory as the kernels read them."""

    first_row: int
    end_row: int
    values: Tensor  # bytes


@dataclass(frozen=True)
class PackedRows:
    """A whole memory in packed form, for a metric."""

    metric: str
    frame: Frame
    part: PackedPart


@torch.no_grad()
def pack(memory: Tensor, metric: str) -> PackedRows:
    """Pack ``memory`` (N, D) once for many searches: 2 bytes for each feature, D rounded up to 64."""
    memory = with_contiguous_rows(memory)
    with _on_device(memory):
        frame = choose_frame(memory, _ranked_as(metric))
        return PackedRows(metric, frame, _packed_part(memory, 0, len(memory), frame, None))


@torch.no_grad()
def knn(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: str,
    *,
    allowed: Tensor | None = None,
    packed: PackedRows | None = None,
    bound_scale: float = 1.0,
    report: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of ``memory`` for every query, exactly.

    Args:
        queries: (Q, D) float32, float16, bfloat16 or float64. Copied if the last axis is not
            contiguous. A query that is not finite finds nothing.
        memory: (N, D), dtype and device of ``queries``, N >= 1. Rows that are not finite are not
            found.
        k: Neighbours per query, 1 <= k <= 64.
        metric: "euclidean", "sqeuclidean", "cosine" or "inner_product".
        allowed: (N,) or (Q, N) bool; rows where it is False are not found. None allows all.
        packed: What ``pack`` made of ``memory`` for this metric; None packs it here.
        bound_scale: Factor of the error bounds; only tests that show what they are for change it.
        report: Called for every part of the memory and chunk of the queries with the numbers of rows
            that were listed (q,), and of queries whose list was too short for them (1,).

    Returns:
        Distances (Q, k) float32, or float64 for such inputs, and indices (Q, k) int64, nearest first,
        equal distances in row order. Where fewer than k rows are allowed the rest has index -1 and
        distance inf (-inf for inner_product).

    Precision: the neighbours that float64 brute force by direct differences returns, up to the
    rounding of its sums, whose order is another; equal rows tie exactly. Bit-identical between runs.
    Memory: outputs plus a workspace of at most 256 MB, which ``packed`` does not count to.
    """
    num_queries, dim = queries.shape
    distances = queries.new_empty((num_queries, k), dtype=distance_dtype_of(queries))
    indices = queries.new_empty((num_queries, k), dtype=torch.int64)
    if num_queries == 0:
        return distances, indices
    queries, memory = with_contiguous_rows(queries), with_contiguous_rows(memory)
    if allowed is not None:
        allowed = with_contiguous_rows(allowed)
        if allowed.ndim == 1 and packed is not None:
            allowed = allowed.expand(num_queries, -1)  # what is packed knows of no mask
    with _on_device(memory):
        search = _Search(memory, metric, allowed, packed, bound_scale, report)
        chunks = plan(num_queries, len(memory), dim, k)
        parts = search.parts(chunks.rows)
        for first in range(0, num_queries, chunks.queries):
            chunk = slice(first, first + chunks.queries)
            search.run(queries[chunk], chunk, parts, distances[chunk], indices[chunk])
    return distances, indices


class Chunks(NamedTuple):
    """How much is searched at a time."""

    queries: int
    rows: int


def plan(num_queries: int, num_rows: int, dim: int, k: int) -> Chunks:
    """Chunks that fit the workspace, in multiples of what is packed together."""
    row_bytes = _cuda.packed_bytes(_ROW_MULTIPLE, dim) // _ROW_MULTIPLE
    query_bytes = _cuda.workspace_bytes(_QUERY_MULTIPLE, dim, k) // _QUERY_MULTIPLE
    return Chunks(
        even_chunk(num_queries, _QUERY_BYTES // query_bytes, _QUERY_MULTIPLE),
        even_chunk(num_rows, _ROW_BYTES // row_bytes, _ROW_MULTIPLE),
    )


class _Search:
    """One memory and metric; the queries come in chunks."""

    def __init__(
        self,
        memory: Tensor,
        metric: str,
        allowed: Tensor | None,
        packed: PackedRows | None,
        bound_scale: float,
        report: Callable[[Tensor, Tensor], None] | None,
    ) -> None:
        self.memory = memory  # [N, D]
        self.metric = metric
        self.allowed = allowed  # [N] or [Q, N]
        self.packed = packed
        self.bound_scale = bound_scale
        self.report = report
        self.frame = choose_frame(memory, _ranked_as(metric)) if packed is None else packed.frame

    def parts(self, most_rows: int) -> list[PackedPart | range]:
        """The parts of the memory: packed, if all are one, else to be packed when they are needed."""
        if self.packed is not None:
            return [self.packed.part]
        num_rows = len(self.memory)
        if most_rows >= num_rows:
            return [self._pack(range(num_rows))]
        return [
            range(first, min(first + most_rows, num_rows))
            for first in range(0, num_rows, most_rows)
        ]

    def run(
        self,
        queries: Tensor,
        chunk: slice,
        parts: list[PackedPart | range],
        distances: Tensor,
        indices: Tensor,
    ) -> None:
        """Search all ``parts`` for ``queries``, which are ``chunk`` of all."""
        num_queries, k = distances.shape
        size = _cuda.workspace_bytes(num_queries, queries.shape[1], k)
        workspace = torch.empty(size, dtype=torch.uint8, device=queries.device)
        paired = self.allowed is not None and self.allowed.ndim == 2
        mask = self.allowed[chunk] if self.allowed is not None and paired else None
        for i, rows in enumerate(parts):
            part = self._pack(rows) if isinstance(rows, range) else rows
            _cuda.knn(
                as_matrix(queries),
                as_matrix(self.memory),
                _as_part(part),
                k,
                getattr(_cuda.Metric, self.metric),
                (address_of(mask), 0 if mask is None else mask.stride(0)),
                _as_frame(self.frame),
                address_of(workspace),
                i == 0,
                i == len(parts) - 1,
                (
                    address_of(distances),
                    address_of(indices),
                    getattr(_cuda.Dtype, dtype_name(distances.dtype)),
                ),
                queue_of(queries),
                bound_scale=self.bound_scale,
            )
            del part  # before the next is packed
            if self.report is not None:
                offsets = _cuda.count_offsets(num_queries, queries.shape[1], k)
                counts, num_overflowed = (
                    workspace[offset:].view(torch.int32) for offset in offsets
                )
                self.report(counts[:num_queries], num_overflowed[:1])

    def _pack(self, rows: range) -> PackedPart:
        common = self.allowed if self.allowed is not None and self.allowed.ndim == 1 else None
        return _packed_part(self.memory, rows.start, rows.stop, self.frame, common)


def _packed_part(
    memory: Tensor, first_row: int, end_row: int, frame: Frame, allowed: Tensor | None
) -> PackedPart:
    size = _cuda.packed_bytes(end_row - first_row, memory.shape[1])
    values = torch.empty(size, dtype=torch.uint8, device=memory.device)
    part = PackedPart(first_row, end_row, values)
    _cuda.pack_memory(
        as_matrix(memory),
        _as_part(part),
        address_of(allowed),
        getattr(_cuda.Metric, frame.metric),
        _as_frame(frame),
        queue_of(memory),
    )
    return part


def _ranked_as(metric: str) -> str:
    return "euclidean" if metric == "sqeuclidean" else metric


def _as_part(part: PackedPart) -> tuple[int, int, int]:
    return part.first_row, part.end_row, address_of(part.values)


def _as_frame(frame: Frame) -> tuple[int, int, int]:
    return address_of(frame.mean), address_of(frame.scale), address_of(frame.shift)


def _on_device(tensor: Tensor) -> "torch.cuda.device | nullcontext[None]":
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
