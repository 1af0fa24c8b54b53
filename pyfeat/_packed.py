"""The packed copy of a memory that is searched again and again."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import as_matrix
from pyfeat._ops import search_cpu, within_cpu
from pyfeat.search import Metric

if TYPE_CHECKING:
    from pyfeat._cuda_ops.search import PackedRows

# The bounds of a precision on the distances get tighter in this order.
_COARSEST_FIRST = ("int8", "bf16", "float32")

# A precision is given up when more than this fraction of the queries came back undecided and were
# searched a second time, which costs more than a finer precision would; of fewer queries, the
# fraction says little.
_UNDECIDED = 1 / 8
_FEWEST_QUERIES = 64


class PackedCopy:
    """Rows in the order that the kernels read them, packed when a search first needs them.

    They are packed in the fastest precision at first. Where that is too coarse to tell the rows
    apart, the answers stay exact but take long; the next search packs the rows in a finer one.
    """

    def __init__(self) -> None:
        self._packed: _C.PackedMemory | None = None
        self._on_gpu: PackedRows | None = None
        self._precision = ""  # the fastest
        self._num_queries = self._num_undecided = 0  # since the rows were packed

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack again.
        return {**self.__dict__, "_packed": None, "_on_gpu": None}

    def drop(self) -> None:
        """The rows have changed: pack them again, in the same precision."""
        self._packed = self._on_gpu = None

    def search(
        self, queries: Tensor, rows: Tensor, k: int, metric: Metric, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Distances (Q, k) and indices (Q, k); see ``pyfeat.knn``."""
        packed = self._of(rows, metric)

        def observe(counters: tuple[int, int, int]) -> None:
            self._observe(packed, queries.shape[0], *counters[1:])

        return search_cpu(queries, rows, k, metric, mask, packed=packed, report=observe)

    def search_on_gpu(
        self, queries: Tensor, rows: Tensor, k: int, metric: Metric, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same by the CUDA kernels, for tensors of one GPU; they have a packed copy of their own."""
        from pyfeat._cuda_ops import search

        if self._on_gpu is None:
            self._on_gpu = search.pack(rows, metric)
        return search.knn(queries, rows, k, metric, allowed=mask, packed=self._on_gpu)

    def range_search(
        self, queries: Tensor, rows: Tensor, radius: float, metric: Metric, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets (Q + 1,), distances (R,) and indices (R,); see ``pyfeat.range_search``."""
        packed = self._of(rows, metric)
        return within_cpu(queries, rows, radius, metric, mask=mask, packed=packed)

    def _of(self, rows: Tensor, metric: Metric) -> _C.PackedMemory:
        if self._packed is None:
            self._packed = _C.PackedMemory(
                as_matrix(rows),
                getattr(_C.Metric, metric),
                _C.NonFinite.refuse,
                torch.get_num_threads(),
                precision=self._precision,
            )
            self._num_queries = self._num_undecided = 0
        return self._packed

    def _observe(
        self, packed: _C.PackedMemory, num_queries: int, undecided: int, exhaustive: int
    ) -> None:
        # Without tiles, as for a very large k, the precision plays no part.
        if packed is not self._packed or exhaustive > undecided:
            return
        self._num_queries += num_queries
        self._num_undecided += undecided
        too_many = self._num_undecided > _UNDECIDED * self._num_queries
        if too_many and self._num_queries >= _FEWEST_QUERIES:
            finer = next_finer(packed.precision)
            if finer is not None:
                self._precision, self._packed = finer, None


def next_finer(precision: str) -> str | None:
    """The fastest precision with tighter bounds; None if there is none."""
    finer = _COARSEST_FIRST[_COARSEST_FIRST.index(precision) + 1 :]
    return next((name for name in reversed(_C.precisions()) if name in finer), None)
