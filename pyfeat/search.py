"""Exact nearest neighbours."""

from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyfeat import _ops, reference
from pyfeat._backends import BACKENDS, Backend, select_backend
from pyfeat._checks import (
    as_tensor,
    check_choice,
    check_features,
    check_finite,
    check_k,
    check_mask,
)

Metric = Literal["euclidean", "sqeuclidean", "cosine", "inner_product"]
METRICS: tuple[Metric, ...] = ("euclidean", "sqeuclidean", "cosine", "inner_product")
NonFinite = Literal["raise", "skip"]


class Neighbours(NamedTuple):
    """The k nearest memory rows of every query, nearest first."""

    distances: Tensor  # (Q, k) float32, float64 for float64 features, in feature units
    indices: Tensor  # (Q, k) int64


class NumpyNeighbours(NamedTuple):
    """``Neighbours`` of numpy inputs."""

    distances: NDArray[Any]  # (Q, k)
    indices: NDArray[np.int64]  # (Q, k)


class RangeNeighbours(NamedTuple):
    """All memory rows within a radius; those of query q lie from offsets[q] to offsets[q + 1]."""

    offsets: Tensor  # (Q + 1,) int64
    distances: Tensor  # (R,) as in Neighbours, nearest first
    indices: Tensor  # (R,) int64


class NumpyRangeNeighbours(NamedTuple):
    """``RangeNeighbours`` of numpy inputs."""

    offsets: NDArray[np.int64]  # (Q + 1,)
    distances: NDArray[Any]  # (R,)
    indices: NDArray[np.int64]  # (R,)


@overload
def knn(
    queries: Tensor,
    memory: Tensor,
    k: int = 1,
    *,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
    nonfinite: NonFinite = "raise",
    backend: Backend | None = None,
) -> Neighbours: ...
@overload
def knn(
    queries: NDArray[Any],
    memory: NDArray[Any],
    k: int = 1,
    *,
    metric: Metric = "euclidean",
    mask: NDArray[np.bool_] | None = None,
    nonfinite: NonFinite = "raise",
    backend: Backend | None = None,
) -> NumpyNeighbours: ...
def knn(
    queries: Tensor | NDArray[Any],
    memory: Tensor | NDArray[Any],
    k: int = 1,
    *,
    metric: Metric = "euclidean",
    mask: Tensor | NDArray[np.bool_] | None = None,
    nonfinite: NonFinite = "raise",
    backend: Backend | None = None,
) -> Neighbours | NumpyNeighbours:
    """Find the k nearest rows of ``memory`` for every query, exactly.

    ``distances[q, j]`` is the distance of ``queries[q]`` to ``memory[indices[q, j]]``, ascending in
    ``j`` (descending for inner_product); rows at equal distance come in row order. The distances:

    - euclidean: ``||q - x||``
    - sqeuclidean: ``||q - x||^2``
    - cosine: ``1 - q.x / (||q|| ||x||)``, and 1 where either is a zero vector
    - inner_product: ``q.x``

    Args:
        queries: (Q, D) float32, float64, float16 or bfloat16, any strides. Q may be 0. Tensor or numpy
            array.
        memory: (N, D), same kind, dtype and device as ``queries``. A ``numpy.memmap`` may be larger
            than the machine's memory.
        k: Neighbours per query, 1 <= k <= N.
        metric: The distance, by name.
        mask: (N,) or (Q, N) bool: the rows that may be returned, to all queries or to each. Where they
            run out, the index is -1 and the distance infinite.
        nonfinite: What becomes of rows with NaN or infinity: "raise", or "skip": rows of memory are
            never returned then, queries get index -1 and an infinite distance.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        ``distances`` (Q, k) float32, float64 for float64 features, and ``indices`` (Q, k) int64; numpy
        arrays for numpy inputs.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes disagree, k is out of range, or a feature is NaN or infinite (float64: a
            row of norm above 1e150).
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: equal to float64 brute force by direct differences for any shift or scale of the data.
    Tiles run in 8-bit whole numbers, bfloat16 or float32, whichever the processor multiplies fastest,
    and decide by a proven error bound which rows may still be among the k nearest; these are ranked in
    float64. Distances are rounded once, at the end.
    Memory: outputs plus a workspace of at most 256 MB, also in the backward pass; the (Q, N) matrix
    is never stored.
    Gradients: of the distances, once, by queries and memory; taken as 0 where a distance has none (at
    distance 0, and for the cosine of a zero vector). Bit-identical for any thread count.

    Examples:
        >>> import torch
        >>> knn(torch.zeros(1, 2), torch.eye(2)).indices
        tensor([[0]])
    """
    arguments = _Arguments("knn", queries, memory, metric, mask, nonfinite, backend, k)
    q, x = arguments.queries, arguments.memory
    if arguments.backend == "reference":
        distances, indices = reference.knn(q, x, k, metric, arguments.finite_mask())
    else:
        distances, indices = _ops.knn(
            q,
            x,
            k,
            metric,
            mask=arguments.mask,
            skip_nonfinite=arguments.skip_nonfinite,
            backend=arguments.backend,
        )
    if arguments.numpy_in:
        return NumpyNeighbours(distances.numpy(), indices.numpy())
    return Neighbours(distances, indices)


@overload
def range_search(
    queries: Tensor,
    memory: Tensor,
    radius: float,
    *,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
    nonfinite: NonFinite = "raise",
    backend: Backend | None = None,
) -> RangeNeighbours: ...
@overload
def range_search(
    queries: NDArray[Any],
    memory: NDArray[Any],
    radius: float,
    *,
    metric: Metric = "euclidean",
    mask: NDArray[np.bool_] | None = None,
    nonfinite: NonFinite = "raise",
    backend: Backend | None = None,
) -> NumpyRangeNeighbours: ...
def range_search(
    queries: Tensor | NDArray[Any],
    memory: Tensor | NDArray[Any],
    radius: float,
    *,
    metric: Metric = "euclidean",
    mask: Tensor | NDArray[np.bool_] | None = None,
    nonfinite: NonFinite = "raise",
    backend: Backend | None = None,
) -> RangeNeighbours | NumpyRangeNeighbours:
    """Find all rows of ``memory`` within a radius of every query, exactly.

    Row x is found for query q if its distance, as ``knn`` defines it, is at most ``radius``; for
    inner_product if it is at least ``radius``. Those of query q lie from ``offsets[q]`` to
    ``offsets[q + 1]``, nearest first, rows at equal distance in row order.

    Args:
        queries: As in ``knn``.
        memory: As in ``knn``. N may be 0.
        radius: A number that is not NaN, in units of the distance.
        metric: The distance, by name.
        mask: As in ``knn``.
        nonfinite: As in ``knn``; queries that are skipped find nothing.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        ``offsets`` (Q + 1,) int64, ``distances`` (R,) float32, float64 for float64 features, and
        ``indices`` (R,) int64, R being the number of pairs found; detached.

    Raises:
        TypeError: As ``knn``.
        ValueError: As ``knn``, or if the radius is NaN.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: equal to float64 brute force by direct differences; as ``knn``.
    Memory: three times the result, plus a workspace of at most 256 MB.

    Examples:
        >>> import torch
        >>> range_search(torch.zeros(1, 1), torch.tensor([[3.0], [1.0], [2.0]]), 2.0).indices
        tensor([1, 2])
    """
    arguments = _Arguments("range_search", queries, memory, metric, mask, nonfinite, backend)
    radius = float(radius)
    if radius != radius:
        message = f"range_search: radius must be a number, got {radius}"
        raise ValueError(message)
    q, x = arguments.queries.detach(), arguments.memory.detach()
    if arguments.backend == "reference":
        found = reference.range_search(q, x, radius, metric, arguments.finite_mask())
    else:
        found = _ops.within_cpu(
            q, x, radius, metric, mask=arguments.mask, skip_nonfinite=arguments.skip_nonfinite
        )
    if arguments.numpy_in:
        return NumpyRangeNeighbours(*(part.numpy() for part in found))
    return RangeNeighbours(*found)


class _Arguments:
    """What all searches check: features that fit each other, metric, mask and backend."""

    def __init__(
        self,
        op: str,
        queries: Tensor | NDArray[Any],
        memory: Tensor | NDArray[Any],
        metric: Metric,
        mask: Tensor | NDArray[np.bool_] | None,
        nonfinite: NonFinite,
        backend: Backend | None,
        k: int = 1,
    ) -> None:
        self.op = op
        self.numpy_in = isinstance(queries, np.ndarray)
        if self.numpy_in != isinstance(memory, np.ndarray):
            message = (
                f"{op}: queries and memory must both be tensors or both numpy arrays, "
                f"got {type(queries).__name__} and {type(memory).__name__}"
            )
            raise TypeError(message)
        check_choice(op, "metric", metric, METRICS)
        check_choice(op, "nonfinite", nonfinite, ("raise", "skip"))
        check_choice(op, "backend", backend, (None, *BACKENDS))
        self.queries = as_tensor(op, "queries", queries)
        self.memory = as_tensor(op, "memory", memory)
        check_features(op, "queries", self.queries)
        check_features(
            op, "memory", self.memory, dim=self.queries.shape[1], dtype=self.queries.dtype
        )
        if op == "knn":
            check_k(op, k, self.memory.shape[0])
        self.mask = None if mask is None else as_tensor(op, "mask", mask)
        if self.mask is not None:
            check_mask(op, self.mask, self.queries.shape[0], self.memory.shape[0])
        for name, tensor in (("memory", self.memory), ("mask", self.mask)):
            if tensor is not None and tensor.device != self.queries.device:
                message = (
                    f"{op}: {name} must be on {self.queries.device} like queries, "
                    f"got {tensor.device}"
                )
                raise ValueError(message)
        self.skip_nonfinite = nonfinite == "skip"
        self.backend = select_backend(op, backend, self.queries, k=k)

    def finite_mask(self) -> Tensor | None:
        """The mask, less the pairs with a row that is not finite, which raises unless skipped."""
        if not self.skip_nonfinite:
            check_finite(self.op, "queries", self.queries)
            check_finite(self.op, "memory", self.memory)
            return self.mask
        usable = self.queries.isfinite().all(1)[:, None] & self.memory.isfinite().all(1)  # [Q, N]
        return usable if self.mask is None else usable & self.mask
