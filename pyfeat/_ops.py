"""Registration with torch: what ``torch.compile`` and ``opcheck`` see of the kernels."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._backends import Backend, select_backend
from pyfeat._checks import (
    as_mask,
    as_matrix,
    check_finite,
    distance_dtype_of,
    dtype_name,
    with_contiguous_rows,
)

# Of the neighbours that the backward pass gathers at a time.
_BACKWARD_BYTES = 32 << 20

# torch.library.custom_op would import torch._dynamo, which takes seconds, on the first call.
torch.library.define(
    "pyfeat::knn",
    "(Tensor queries, Tensor memory, SymInt k, str metric, Tensor? mask, bool skip_nonfinite,"
    " str? backend=None) -> (Tensor, Tensor)",
)


def search_cpu(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None = None,
    skip_nonfinite: bool = False,
    *,
    packed: _C.PackedMemory | None = None,
    distance_dtype: torch.dtype | None = None,
    report: Callable[[tuple[int, int, int]], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel itself; ``packed`` is ``memory`` in packed form, made beforehand.

    Distances are float32, float64 for float64 features, unless said otherwise. ``report`` is called
    with the numbers of rows ranked in float64, of queries tried again in a finer precision, and of
    those that took every row in float64.
    """
    queries, memory = with_contiguous_rows(queries), with_contiguous_rows(memory)
    mask = None if mask is None else with_contiguous_rows(mask)
    distances = queries.new_empty(
        (queries.shape[0], k), dtype=distance_dtype or distance_dtype_of(queries)
    )
    indices = queries.new_empty((queries.shape[0], k), dtype=torch.int64)
    counters = _C.knn_cpu(
        as_matrix(queries),
        as_matrix(memory),
        k,
        getattr(_C.Metric, metric),
        distances.data_ptr(),
        getattr(_C.Dtype, dtype_name(distances.dtype)),
        indices.data_ptr(),
        as_mask(mask),
        _C.NonFinite.skip if skip_nonfinite else _C.NonFinite.refuse,
        torch.get_num_threads(),
        packed=packed,
    )
    if report is not None:
        report(counters)
    return distances, indices


def _knn_fake(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    skip_nonfinite: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return (
        queries.new_empty(shape, dtype=distance_dtype_of(queries)),
        queries.new_empty(shape, dtype=torch.int64),
    )


def _knn_on_cpu(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    skip_nonfinite: bool,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    if backend not in (None, "cpu"):
        select_backend("knn", backend, queries, k=k)  # says why not
    return search_cpu(queries, memory, k, metric, mask, skip_nonfinite)


def search_cuda(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None = None,
    skip_nonfinite: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels for GPUs, each imported here and nowhere else.

    Only what must raise is waited for: with ``skip_nonfinite`` the CUDA kernels can be captured.
    """
    if not skip_nonfinite:
        check_finite("knn", "queries", queries)
        check_finite("knn", "memory", memory)
    if select_backend("knn", backend, queries, k=k) == "cuda":
        from pyfeat._cuda_ops import search

        return search.knn(queries, memory, k, metric, allowed=mask)
    if not skip_nonfinite:
        return _search_triton(queries, memory, k, metric, mask)
    usable = memory.isfinite().all(dim=1)  # [N]
    searchable = queries.isfinite().all(dim=1)[:, None]  # [Q, 1]
    distances, indices = _search_triton(
        queries.where(searchable, 0.0),
        memory.where(usable[:, None], 0.0),
        k,
        metric,
        usable if mask is None else usable & mask,
    )
    none = -torch.inf if metric == "inner_product" else torch.inf
    return distances.where(searchable, none), indices.where(searchable, -1)


def _search_triton(
    queries: Tensor, memory: Tensor, k: int, metric: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    from pyfeat._triton import similarity

    return similarity.knn(queries, memory, k, metric, allowed=mask)


torch.library.impl("pyfeat::knn", "CPU", _knn_on_cpu)
torch.library.impl("pyfeat::knn", "CUDA", search_cuda)
torch.library.register_fake("pyfeat::knn", _knn_fake)


class _Context(Protocol):
    """What the backward pass of an op may keep from the forward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    metric: str

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _keep_for_backward(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, int, str, Tensor | None, bool, str | None],
    output: tuple[Tensor, Tensor],
) -> None:
    queries, memory, _, ctx.metric, *_ = inputs
    ctx.save_for_backward(queries, memory, output[1])


def _knn_backward(
    ctx: _Context, grad_distances: Tensor, grad_indices: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
    """Gather the neighbours, differentiate their distances, scatter into the rows of memory.

    The (Q, k, D) neighbours exist for one chunk of queries at a time. Rows are added one after the
    other in the order of queries, in float32 or float64: equal bits for any thread count.
    """
    queries, memory, indices = ctx.saved_tensors
    needs_queries, needs_memory = ctx.needs_input_grad[:2]
    dtype = grad_distances.dtype
    grad_queries = torch.zeros_like(queries) if needs_queries else None
    grad_memory = torch.zeros_like(memory, dtype=dtype) if needs_memory else None
    chunk = max(1, _BACKWARD_BYTES // max(4 * indices.shape[1] * queries.shape[1], 1))
    for first in range(0, queries.shape[0], chunk):
        part = slice(first, first + chunk)
        rows = indices[part].reshape(-1)
        missing = rows < 0  # a query with fewer than k rows to choose from
        rows = rows.clamp_min(0)
        to_query, to_rows = _pull_back(
            queries[part, None].to(dtype),
            memory[rows].to(dtype).view(-1, indices.shape[1], memory.shape[1]),
            ctx.metric,
        )
        weights = grad_distances[part].masked_fill(missing.view(-1, indices.shape[1]), 0.0)
        weights = weights[:, :, None]  # [q, k, 1]
        if grad_queries is not None:
            grad_queries[part] = (weights * to_query).sum(dim=1)
        if grad_memory is not None:
            grad_memory.index_add_(0, rows, (weights * to_rows).flatten(0, 1))
    return (
        grad_queries,
        None if grad_memory is None else grad_memory.to(memory.dtype),
        None,
        None,
        None,
        None,
        None,
    )


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


def knn(
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: str,
    *,
    mask: Tensor | None = None,
    skip_nonfinite: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Distances (Q, k) and indices (Q, k) int64; see ``pyfeat.knn``."""
    distances, indices = torch.ops.pyfeat.knn(
        queries, memory, k, metric, mask, skip_nonfinite, backend
    )
    return distances, indices


def within_cpu(
    queries: Tensor,
    memory: Tensor,
    radius: float,
    metric: str,
    *,
    mask: Tensor | None = None,
    skip_nonfinite: bool = False,
    packed: _C.PackedMemory | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (Q + 1,), distances (R,) and indices (R,); see ``pyfeat.range_search``."""
    queries, memory = with_contiguous_rows(queries), with_contiguous_rows(memory)
    mask = None if mask is None else with_contiguous_rows(mask)
    offsets, distances, indices, _ = _C.within_cpu(
        as_matrix(queries),
        as_matrix(memory),
        radius,
        getattr(_C.Metric, metric),
        as_mask(mask),
        _C.NonFinite.skip if skip_nonfinite else _C.NonFinite.refuse,
        torch.get_num_threads(),
        packed=packed,
    )
    return (
        torch.from_numpy(offsets),
        torch.from_numpy(distances).to(distance_dtype_of(queries)),
        torch.from_numpy(indices),
    )
