"""Rows of features with ids in arrays that have room to grow, and the searches among them."""

import copy
from contextlib import AbstractContextManager
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat._backends import select_backend
from pyfeat._checks import as_tensor, check_features, check_finite, check_k, check_mask
from pyfeat._ids import are_alike, as_ids, shape_like
from pyfeat._packed import PackedCopy
from pyfeat.search import (
    Metric,
    Neighbours,
    NumpyNeighbours,
    NumpyRangeNeighbours,
    RangeNeighbours,
    knn,
    range_search,
)


class RowStore:
    """What a memory bank is made of: it holds rows and answers; ``MemoryBank`` changes them."""

    def __init__(self, metric: Metric) -> None:
        self.metric: Metric = metric
        self._features = _grown(torch.empty((0, 0)), 0)  # [capacity, D]
        self._ids = torch.empty((0,), dtype=torch.int64)  # [capacity] or [capacity, c]
        self._size = 0
        self._next_id = 0
        self._packed = PackedCopy()
        self._radius: float | None = None
        self._version = self._features._version  # at the latest change that was made here

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_features": self.features,
            "_ids": self.ids,
            "_packed": copy.copy(self._packed),
            "_radius": self.radius,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Rows are added in place: a copy must not share them.
        self._features = _grown(self._features, self._size)
        self._ids = _grown(self._ids, self._size)
        self._version = self._features._version

    @property
    def features(self) -> Tensor:
        """(N, D), a view of the stored rows in the order of adding.

        Writes to it are noticed, except through a numpy array of it.
        """
        return self._features[: self._size]

    @property
    def ids(self) -> Tensor:
        """(N,) or (N, c) int64, one for each row of ``features``."""
        return self._ids[: self._size]

    @property
    def radius(self) -> float | None:
        """Covering radius, a euclidean distance; None where it is not known.

        Every row that the bank held when ``coreset``, ``cover`` or ``merge`` set it, and every row
        given to the bank since, lies within this distance of a row of the bank. ``add`` keeps it,
        ``merge`` takes the larger one if both banks have one, and removing rows or writing to
        ``features`` forgets it.
        """
        self._notice_writes()
        return self._radius

    @overload
    def search(self, queries: Tensor, k: int = 1, *, mask: Tensor | None = None) -> Neighbours: ...
    @overload
    def search(
        self, queries: NDArray[Any], k: int = 1, *, mask: NDArray[np.bool_] | None = None
    ) -> NumpyNeighbours: ...
    def search(
        self,
        queries: Tensor | NDArray[Any],
        k: int = 1,
        *,
        mask: Tensor | NDArray[np.bool_] | None = None,
    ) -> Neighbours | NumpyNeighbours:
        """The k nearest rows of every query, as ``pyfeat.knn`` finds them.

        The first search, on a CPU or by the CUDA kernels, packs the bank; until it changes, others start
        at once. If on a CPU more than 1 in 8 queries, of at least 64, turn out to need more than the
        precision of the packed copy, the next search packs the bank in a finer one.

        Args:
            queries: (Q, D) of the bank's dtype, tensor or numpy array.
            k: 1 <= k <= len(bank).
            mask: (N,) or (Q, N) bool: the rows that may be returned, to all queries or to each. Where
                they run out, the index is -1 and the distance infinite.

        Returns:
            ``distances`` (Q, k) float32, float64 for float64 features, detached, and ``indices``
            (Q, k) int64 into ``features`` and ``ids``; numpy arrays for numpy queries.

        Raises:
            TypeError: If queries do not have the bank's dtype, or the mask is not bool.
            ValueError: As ``pyfeat.knn``.
        """
        op = "MemoryBank.search"
        check_k(op, k, len(self))
        asked, allowed = self._question(op, queries, mask)
        if _are_on_cpu(asked, self._features, allowed):
            self._notice_writes()
            found = self._packed.search(asked, self.features, k, self.metric, allowed)
        elif _is_for_cuda(asked, self._features, allowed, k=k):
            check_finite("knn", "queries", asked)
            self._notice_writes()
            found = self._packed.search_on_gpu(asked, self.features, k, self.metric, allowed)
        else:
            found = knn(asked, self.features, k, metric=self.metric, mask=allowed)
        if isinstance(queries, np.ndarray):
            return NumpyNeighbours(*(part.numpy() for part in found))
        return Neighbours(*found)

    @overload
    def range_search(
        self, queries: Tensor, radius: float, *, mask: Tensor | None = None
    ) -> RangeNeighbours: ...
    @overload
    def range_search(
        self, queries: NDArray[Any], radius: float, *, mask: NDArray[np.bool_] | None = None
    ) -> NumpyRangeNeighbours: ...
    def range_search(
        self,
        queries: Tensor | NDArray[Any],
        radius: float,
        *,
        mask: Tensor | NDArray[np.bool_] | None = None,
    ) -> RangeNeighbours | NumpyRangeNeighbours:
        """All rows within a radius of every query, as ``pyfeat.range_search`` finds them.

        Packs the bank as ``search`` does.

        Args:
            queries: As in ``search``; of any dtype and width if the bank is empty.
            radius: A number that is not NaN, in units of the distance; for inner_product, rows at
                least as similar are found.
            mask: As in ``search``.

        Returns:
            ``offsets`` (Q + 1,) int64, ``distances`` (R,) and ``indices`` (R,), those of query q from
            ``offsets[q]`` to ``offsets[q + 1]``, nearest first; numpy arrays for numpy queries.

        Raises:
            TypeError: As ``search``.
            ValueError: As ``pyfeat.range_search``.
        """
        op = "MemoryBank.range_search"
        radius = float(radius)
        if radius != radius:
            message = f"{op}: radius must be a number, got {radius}"
            raise ValueError(message)
        asked, allowed = self._question(op, queries, mask)
        if len(self) and _are_on_cpu(asked, self._features, allowed):
            self._notice_writes()
            found = self._packed.range_search(asked, self.features, radius, self.metric, allowed)
        else:
            rows = self.features if len(self) else asked[:0]
            found = range_search(asked, rows, radius, metric=self.metric, mask=allowed)
        if isinstance(queries, np.ndarray):
            return NumpyRangeNeighbours(*(part.numpy() for part in found))
        return RangeNeighbours(*found)

    def _question(
        self,
        op: str,
        queries: Tensor | NDArray[Any],
        mask: Tensor | NDArray[np.bool_] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries (Q, D) and mask as tensors that fit the rows."""
        asked = as_tensor(op, "queries", queries).detach()
        self._check_fit(op, "queries", asked)
        allowed = None if mask is None else as_tensor(op, "mask", mask)
        if allowed is not None:
            check_mask(op, allowed, asked.shape[0], len(self))
        return asked, allowed

    def _check_fit(self, op: str, name: str, features: Tensor) -> None:
        """Raise unless the features have the width and dtype of the rows; any, without rows."""
        dim, dtype = self._features.shape[1], self._features.dtype
        if len(self):
            check_features(op, name, features, dim=dim, dtype=dtype)
        else:
            check_features(op, name, features)

    def _rows_for(self, op: str, name: str, features: Tensor | NDArray[Any]) -> Tensor:
        """New rows (n, D) that fit those that are there."""
        rows = as_tensor(op, name, features).detach()
        self._check_fit(op, name, rows)
        check_finite(op, name, rows)
        return rows

    def _ids_for(self, op: str, count: int, ids: Tensor | NDArray[Any] | None) -> Tensor:
        """Ids of ``count`` new rows that fit those that are there."""
        if ids is None:
            if self._ids.ndim != 1:
                message = f"{op}: ids must have shape {shape_like(self._ids)}, got None"
                raise ValueError(message)
            return torch.arange(self._next_id, self._next_id + count)
        given = as_ids(op, ids)
        fits = given.ndim in (1, 2) and given.shape[0] == count
        if len(self):
            fits = fits and are_alike(given, self._ids)
        if not fits:
            like = shape_like(self._ids, count) if len(self) else f"({count},) or ({count}, c)"
            message = f"{op}: ids must have shape {like}, got {tuple(given.shape)}"
            raise ValueError(message)
        return given

    def _append(self, rows: Tensor, ids: Tensor, *, radius: float | None) -> None:
        features, held_ids = (self.features, self.ids) if len(self) else (rows[:0], ids[:0])
        end = self._size + rows.shape[0]
        if not len(self) or end > self._features.shape[0]:
            # Doubling makes the copies of a growing bank a constant cost for each row.
            capacity = max(end, 2 * self._size)
            features, held_ids = _grown(features, capacity), _grown(held_ids, capacity)
            self._features, self._ids = features, held_ids
        self._features[self._size : end] = rows
        self._ids[self._size : end] = ids
        self._size = end
        if ids.ndim == 1 and len(ids):
            self._next_id = max(self._next_id, int(ids.max()) + 1)
        self._changed(radius)

    def _keep(self, rows: Tensor, *, radius: float | None) -> None:
        """Keep the given rows, a mask or indices, in their order."""
        with _counting_writes():
            self._features, self._ids = self.features[rows], self.ids[rows]
        self._size = self._features.shape[0]
        self._packed = PackedCopy()  # what the bounds were too coarse for may be gone
        self._changed(radius)

    def _changed(self, radius: float | None) -> None:
        self._packed.drop()
        self._radius = radius
        self._version = self._features._version

    def _notice_writes(self) -> None:
        """Forget what is true no more if rows were written through ``features``."""
        # torch counts the writes to a tensor, also those through its views.
        if self._features._version != self._version:
            self._changed(radius=None)


def _grown(held: Tensor, capacity: int) -> Tensor:
    """A copy with room for ``capacity`` rows."""
    with _counting_writes():
        grown = held.new_empty((capacity, *held.shape[1:]))
    grown[: len(held)] = held
    return grown


def _counting_writes() -> AbstractContextManager[None]:
    """Where tensors are made whose writes torch counts, which it does not in inference mode."""
    return torch.inference_mode(mode=False)


def _is_for_cuda(queries: Tensor, *others: Tensor | None, k: int) -> bool:
    """Whether the CUDA kernels search, on the device of all tensors."""
    together = all(x is None or x.device == queries.device for x in others)
    return together and queries.is_cuda and select_backend("knn", None, queries, k=k) == "cuda"


def _are_on_cpu(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)
