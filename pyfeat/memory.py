"""A memory of features that grows, shrinks, answers and is kept on disk."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import (
    as_matrix,
    as_tensor,
    check_choice,
    check_features,
    check_finite,
    check_k,
)
from pyfeat._ops import search_cpu
from pyfeat._storage import PathLike, load_tensors, save_tensors
from pyfeat.coreset import Coreset, greedy_coreset
from pyfeat.search import METRICS, Metric, Neighbours, knn

FORMAT_VERSION = 1


class MemoryBank:
    """Rows of features with an id each, searched exactly.

    Rows keep the order in which they were added, so that of two rows at equal distance the older
    wins. An id is one integer or a fixed number of them, such as (image, y, x).

    Args:
        features: (N, D) float32 rows to begin with; they are copied.
        metric: Distance of ``search``, as in ``pyfeat.knn``.
        ids: (N,) or (N, c) int64; None numbers the rows in the order in which they are added.

    Memory: the features, and room for up to as many again while the bank grows; from the first search
    on also a packed copy, of the same size, or half where the processor multiplies bfloat16.

    Examples:
        >>> bank = MemoryBank(torch.eye(3), ids=torch.tensor([10, 11, 12]))
        >>> bank.ids[bank.search(torch.tensor([[0.0, 0.9, 0.0]])).indices[:, 0]]
        tensor([11])
    """

    def __init__(
        self,
        features: Tensor | NDArray[Any] | None = None,
        *,
        metric: Metric = "euclidean",
        ids: Tensor | NDArray[Any] | None = None,
    ) -> None:
        check_choice("MemoryBank", "metric", metric, METRICS)
        self.metric: Metric = metric
        self._features = torch.empty((0, 0))  # [capacity, D]
        self._ids = torch.empty((0,), dtype=torch.int64)  # [capacity] or [capacity, c]
        self._size = 0
        self._next_id = 0
        self._packed: _C.PackedMemory | None = None
        self._packed_version = -1  # of the features that were packed
        if features is not None:
            self.add(features, ids)
        elif ids is not None:
            message = f"MemoryBank: ids must be None without features, got {type(ids).__name__}"
            raise ValueError(message)

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies and pickles pack again

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} x {self.features.shape[1]}, metric={self.metric!r})"

    @property
    def features(self) -> Tensor:
        """(N, D) float32, a view of the stored rows in the order of adding."""
        return self._features[: self._size]

    @property
    def ids(self) -> Tensor:
        """(N,) or (N, c) int64, one for each row of ``features``."""
        return self._ids[: self._size]

    def add(
        self, features: Tensor | NDArray[Any], ids: Tensor | NDArray[Any] | None = None
    ) -> None:
        """Append rows.

        Args:
            features: (n, D) float32, finite.
            ids: (n,) or (n, c) int64, of the shape of the bank's ids; None counts on from the
                highest id given so far (single ids only).

        Raises:
            TypeError: If features are not float32 or ids not int64.
            ValueError: If shapes disagree with the bank, or a feature is NaN or infinite.
        """
        op = "MemoryBank.add"
        rows = as_tensor(op, "features", features).detach()
        check_features(op, "features", rows, dim=self._features.shape[1] if len(self) else None)
        check_finite(op, "features", rows)
        row_ids = self._ids_for(op, rows.shape[0], ids)
        if not len(self):
            self._features = rows.new_empty((0, rows.shape[1]))
            self._ids = row_ids.new_empty((0, *row_ids.shape[1:]))
        end = self._size + rows.shape[0]
        if end > self._features.shape[0]:
            # Doubling makes the copies of a growing bank a constant cost for each row.
            capacity = end if not len(self) else max(end, 2 * self._size)
            self._features = _grown(self._features, self._size, capacity)
            self._ids = _grown(self._ids, self._size, capacity)
        self._features[self._size : end] = rows
        self._ids[self._size : end] = row_ids
        self._size = end
        self._packed = None
        if row_ids.ndim == 1 and len(row_ids):
            self._next_id = max(self._next_id, int(row_ids.max()) + 1)

    def remove(self, ids: Tensor | NDArray[Any]) -> int:
        """Drop every row that has one of ``ids``; the others keep their order.

        Args:
            ids: (n,) or (n, c) int64, as the bank's.

        Returns:
            How many rows were dropped.

        Raises:
            TypeError: If ids are not int64.
            ValueError: If their shape does not fit the bank's.
            KeyError: If an id is not in the bank; nothing is dropped then.
        """
        op = "MemoryBank.remove"
        wanted = _as_ids(op, ids)
        if wanted.ndim != self._ids.ndim or wanted.shape[1:] != self._ids.shape[1:]:
            message = (
                f"{op}: ids must have shape {_shape_like(self._ids)}, got {tuple(wanted.shape)}"
            )
            raise ValueError(message)
        both = torch.cat([self.ids, wanted.to(self._ids.device)])
        key = torch.unique(both, dim=0, return_inverse=True)[1]  # [N + n]
        held, asked = key[: len(self)], key[len(self) :]
        missing = ~torch.isin(asked, held)
        if missing.any():
            message = f"{op}: ids must be in the bank, got {wanted[missing.cpu()][0].tolist()}"
            raise KeyError(message)
        keep = ~torch.isin(held, asked)
        removed = len(self) - int(keep.sum())
        self._keep(keep)
        return removed

    def search(self, queries: Tensor, k: int = 1) -> Neighbours:
        """The k nearest rows of every query, as ``pyfeat.knn`` finds them.

        The first search packs the bank; until it changes, others start at once.

        Args:
            queries: (Q, D) float32.
            k: 1 <= k <= len(bank).

        Returns:
            ``distances`` (Q, k) float32, detached, and ``indices`` (Q, k) int64 into ``features`` and
            ``ids``.

        Raises:
            TypeError: If queries are not float32.
            ValueError: As ``pyfeat.knn``.
        """
        op = "MemoryBank.search"
        check_k(op, k, len(self))
        check_features(op, "queries", queries, dim=self._features.shape[1])
        if queries.device.type != "cpu" or self._features.device.type != "cpu":
            return knn(queries, self.features, k, metric=self.metric)
        # The version of a tensor counts the writes to it, also those through a view of ``features``.
        if self._packed is None or self._packed_version != self._features._version:
            self._packed = _C.PackedMemory(
                as_matrix(self.features),
                getattr(_C.Metric, self.metric),
                _C.NonFinite.refuse,
                torch.get_num_threads(),
            )
            self._packed_version = self._features._version
        found = search_cpu(queries.detach(), self.features, k, self.metric, packed=self._packed)
        return Neighbours(*found)

    def coreset(
        self,
        *,
        ratio: float | None = None,
        size: int | None = None,
        radius: float | None = None,
        start: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Coreset:
        """Keep only a k-centre greedy coreset, in the order of picking.

        Arguments and errors are those of ``pyfeat.greedy_coreset``; distances are euclidean whatever
        the bank's metric.

        Returns:
            The rows kept, as indices into the bank before the call, and the covering radius.
        """
        coreset = greedy_coreset(
            self.features,
            ratio=ratio,
            size=size,
            radius=radius,
            start=start,
            seed=seed,
            progress=progress,
        )
        self._keep(coreset.indices)
        return coreset

    def save(self, path: PathLike) -> None:
        """Write the bank to one safetensors file, aside first and then renamed.

        Raises:
            FileNotFoundError: If the folder of ``path`` does not exist.
            IsADirectoryError: If ``path`` is a folder.
            ImportError: If safetensors is not installed.
        """
        save_tensors(
            path,
            {"features": self.features, "ids": self.ids},
            kind="MemoryBank",
            version=FORMAT_VERSION,
            header={"metric": self.metric, "next_id": self._next_id},
        )

    @classmethod
    def load(cls, path: PathLike) -> "MemoryBank":
        """Read a bank that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is cut off, is no memory bank, or was written by a newer version.
            ImportError: If safetensors is not installed.
        """
        tensors, header = load_tensors(path, kind="MemoryBank", version=FORMAT_VERSION)
        metric = header["metric"]
        check_choice("MemoryBank.load", "metric", metric, METRICS)
        bank = cls(tensors["features"], metric=metric, ids=tensors["ids"])  # type: ignore[arg-type]
        bank._next_id = int(str(header["next_id"]))
        return bank

    def _keep(self, rows: Tensor) -> None:
        """Keep the given rows, a mask or indices, in their order."""
        self._features, self._ids = self.features[rows], self.ids[rows]
        self._size = self._features.shape[0]
        self._packed = None

    def _ids_for(self, op: str, count: int, ids: Tensor | NDArray[Any] | None) -> Tensor:
        if ids is None:
            if self._ids.ndim != 1:
                message = f"{op}: ids must have shape {_shape_like(self._ids)}, got None"
                raise ValueError(message)
            return torch.arange(self._next_id, self._next_id + count)
        given = _as_ids(op, ids)
        fits = given.ndim in (1, 2) and given.shape[0] == count
        if len(self):
            fits = fits and given.shape[1:] == self._ids.shape[1:]
        if not fits:
            like = _shape_like(self._ids, count) if len(self) else f"({count},) or ({count}, c)"
            message = f"{op}: ids must have shape {like}, got {tuple(given.shape)}"
            raise ValueError(message)
        return given


def _as_ids(op: str, ids: Tensor | NDArray[Any]) -> Tensor:
    given = as_tensor(op, "ids", ids)
    if given.dtype != torch.int64:
        message = f"{op}: ids must be int64, got {str(given.dtype).removeprefix('torch.')}"
        raise TypeError(message)
    return given


def _shape_like(ids: Tensor, count: int | str = "n") -> str:
    return f"({count},)" if ids.ndim == 1 else f"({count}, {ids.shape[1]})"


def _grown(tensor: Tensor, size: int, capacity: int) -> Tensor:
    grown = tensor.new_empty((capacity, *tensor.shape[1:]))
    grown[:size] = tensor[:size]
    return grown
