"""Registration with torch: what ``torch.compile`` and ``opcheck`` see of the kernels."""

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import as_matrix, with_contiguous_rows

# torch.library.custom_op would import torch._dynamo, which takes seconds, on the first call.
torch.library.define(
    "pyfeat::knn", "(Tensor queries, Tensor memory, SymInt k, str metric) -> (Tensor, Tensor)"
)


def search_cpu(
    queries: Tensor, memory: Tensor, k: int, metric: str, packed: _C.PackedMemory | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel itself; ``packed`` is ``memory`` in packed form, made beforehand."""
    queries = with_contiguous_rows(queries)
    memory = with_contiguous_rows(memory)
    distances = queries.new_empty((queries.shape[0], k))
    indices = queries.new_empty((queries.shape[0], k), dtype=torch.int64)
    _C.knn_cpu(
        as_matrix(queries),
        as_matrix(memory),
        k,
        getattr(_C.Metric, metric),
        distances.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
        packed=packed,
    )
    return distances, indices


@torch.library.impl("pyfeat::knn", "CPU")
def _knn_cpu(queries: Tensor, memory: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    return search_cpu(queries, memory, k, metric)


def _knn_fake(queries: Tensor, memory: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


torch.library.register_fake("pyfeat::knn", _knn_fake)


def knn(queries: Tensor, memory: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Distances (Q, k) float32 and indices (Q, k) int64; see ``pyfeat.knn``."""
    distances, indices = torch.ops.pyfeat.knn(queries, memory, k, metric)
    return distances, indices
