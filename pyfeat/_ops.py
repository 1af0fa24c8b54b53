"""Registration with torch: what ``torch.compile`` and ``opcheck`` see of the kernels."""

from typing import Protocol

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import as_matrix, with_contiguous_rows

# Of the neighbours that the backward pass gathers at a time.
_BACKWARD_BYTES = 32 << 20

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


class _Context(Protocol):
    """What the backward pass of an op may keep from the forward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    metric: str

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _keep_for_backward(
    ctx: _Context, inputs: tuple[Tensor, Tensor, int, str], output: tuple[Tensor, Tensor]
) -> None:
    queries, memory, _, ctx.metric = inputs
    ctx.save_for_backward(queries, memory, output[1])


def _knn_backward(
    ctx: _Context, grad_distances: Tensor, grad_indices: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    """Gather the neighbours, differentiate their distances, scatter into the rows of memory.

    The (Q, k, D) neighbours exist for one chunk of queries at a time. Rows are added one after the
    other in the order of queries: equal bits for any thread count.
    """
    queries, memory, indices = ctx.saved_tensors
    needs_queries, needs_memory = ctx.needs_input_grad[:2]
    grad_queries = torch.zeros_like(queries) if needs_queries else None
    grad_memory = torch.zeros_like(memory) if needs_memory else None
    chunk = max(1, _BACKWARD_BYTES // max(4 * indices.shape[1] * queries.shape[1], 1))
    for first in range(0, queries.shape[0], chunk):
        part = slice(first, first + chunk)
        rows = indices[part].reshape(-1)
        to_query, to_rows = _pull_back(
            queries[part, None],
            memory[rows].view(-1, indices.shape[1], memory.shape[1]),
            ctx.metric,
        )
        weights = grad_distances[part, :, None]  # [q, k, 1]
        if grad_queries is not None:
            grad_queries[part] = (weights * to_query).sum(dim=1)
        if grad_memory is not None:
            grad_memory.index_add_(0, rows, (weights * to_rows).flatten(0, 1))
    return grad_queries, grad_memory, None, None


def _pull_back(q: Tensor, x: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Gradients of the distance of q (q, 1, D) to x (q, k, D) by either, (q, k, D) both.

    Where a distance has no gradient, at coinciding points and zero vectors, it is taken as 0.
    """
    if metric == "inner_product":
        return x, q.expand_as(x)
    if metric == "cosine":
        q_norm, x_norm = q.norm(dim=-1, keepdim=True), x.norm(dim=-1, keepdim=True)
        q_unit, x_unit = _divided(q, q_norm), _divided(x, x_norm)
        cosine = (q_unit * x_unit).sum(dim=-1, keepdim=True)  # [q, k, 1]
        angular = (q_norm > 0) & (x_norm > 0)
        return (
            _divided(cosine * q_unit - x_unit, q_norm) * angular,
            _divided(cosine * x_unit - q_unit, x_norm) * angular,
        )
    difference = q - x
    if metric == "sqeuclidean":
        return 2.0 * difference, -2.0 * difference
    direction = _divided(difference, difference.norm(dim=-1, keepdim=True))
    return direction, -direction


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """``x / by``, and 0 where ``by`` is 0."""
    return x / by.where(by > 0, torch.inf)


torch.library.register_autograd("pyfeat::knn", _knn_backward, setup_context=_keep_for_backward)


def knn(queries: Tensor, memory: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Distances (Q, k) float32 and indices (Q, k) int64; see ``pyfeat.knn``."""
    distances, indices = torch.ops.pyfeat.knn(queries, memory, k, metric)
    return distances, indices
