"""A memory of features that grows, shrinks, answers and is kept on disk."""

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat._backends import select_backend
from pyfeat._checks import check_choice, dtype_name
from pyfeat._ids import as_ids, which_are_among
from pyfeat._ops import search_cpu
from pyfeat._rows import RowStore
from pyfeat._storage import PathLike, load_tensors, save_tensors
from pyfeat.coreset import Coreset, cover, greedy_coreset
from pyfeat.search import METRICS, Metric

FORMAT_VERSION = 2  # 1 had no checksum and no radius


class MemoryBank(RowStore):
    """Rows of features with an id each, searched exactly.

    Rows keep the order in which they were added, so that of two rows at equal distance the older
    wins. An id is one integer or a fixed number of them, such as (image, y, x); rows may share one.

    Args:
        features: (N, D) float32, float64, float16 or bfloat16 rows to begin with, tensor or numpy
            array; they are copied. The dtype of the first rows is the bank's.
        metric: Distance of ``search`` and ``range_search``, as in ``pyfeat.knn``.
        ids: (N,) or (N, c) int64; None numbers the rows in the order in which they are added.

    Memory: the features, and room for up to as many again while the bank grows; from the first search
    on also a packed copy of 1 byte for each feature, or of 2 or 4 where rows lie too close together
    for that.

    Examples:
        >>> bank = MemoryBank(torch.eye(3), ids=torch.tensor([10, 11, 12]))
        >>> bank
        MemoryBank(3 x 3 float32, metric='euclidean', radius=None)
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
        super().__init__(metric)
        if features is not None:
            self.add(features, ids)
        elif ids is not None:
            message = f"MemoryBank: ids must be None without features, got {type(ids).__name__}"
            raise ValueError(message)

    def __repr__(self) -> str:
        kind = f"{len(self)} x {self._features.shape[1]} {dtype_name(self._features.dtype)}"
        return f"MemoryBank({kind}, metric={self.metric!r}, radius={self.radius})"

    def add(
        self, features: Tensor | NDArray[Any], ids: Tensor | NDArray[Any] | None = None
    ) -> None:
        """Append rows.

        Args:
            features: (n, D) of the bank's dtype, finite.
            ids: (n,) or (n, c) int64, of the shape of the bank's ids; None counts on from the
                highest id given so far (single ids only).

        Raises:
            TypeError: If features do not have the bank's dtype, or ids are not int64.
            ValueError: If shapes disagree with the bank, or a feature is NaN or infinite.
        """
        op = "MemoryBank.add"
        rows = self._rows_for(op, "features", features)
        self._append(rows, self._ids_for(op, rows.shape[0], ids), radius=self.radius)

    def merge(self, other: "MemoryBank") -> None:
        """Append the rows of another bank with their ids; ids that both have are shared by rows.

        Ids that are counted on later are new to both banks. An empty bank takes the dtype, width and
        shape of ids of the other.

        Raises:
            TypeError: If ``other`` is no memory bank, or has another dtype.
            ValueError: If it is this bank itself, has another metric, width or shape of ids, or
                holds NaN or infinity.
        """
        op = "MemoryBank.merge"
        if not isinstance(other, MemoryBank):
            message = f"{op}: other must be a MemoryBank, got {type(other).__name__}"
            raise TypeError(message)
        if other is self:
            message = f"{op}: other must be another bank, got the bank itself"
            raise ValueError(message)
        if other.metric != self.metric:
            message = f"{op}: other must have metric {self.metric!r}, got {other.metric!r}"
            raise ValueError(message)
        known = [radius for radius in (self.radius, other.radius) if radius is not None]
        if len(other):
            rows = self._rows_for(op, "other", other.features)
            ids = self._ids_for(op, len(other), other.ids)
            self._append(rows, ids, radius=max(known, default=None))
        self._next_id = max(self._next_id, other._next_id)

    def cover(
        self,
        features: Tensor | NDArray[Any],
        ids: Tensor | NDArray[Any] | None = None,
        *,
        radius: float | None = None,
    ) -> Tensor:
        """Append only as many rows as it takes to cover all of them.

        The row farthest from the bank is added, again and again, until each lies within ``radius`` of
        a row of the bank: a coreset grows without another look at the rows it was chosen from. Rows
        at equal distance come in their order; an empty bank begins with the first row.

        Args:
            features: As in ``add``.
            ids: As in ``add``, for all rows, added or not; None numbers those that are added.
            radius: Euclidean whatever the bank's metric, >= 0; None takes ``radius`` of the bank.

        Returns:
            (m,) int64: the rows added, as indices into ``features``, in the order of adding.

        Raises:
            TypeError: As ``add``.
            ValueError: As ``add``; if the radius is negative or not finite, or neither given nor known.
            NotImplementedError: If the rows or the bank are not on the CPU.

        Precision: distances by direct differences in float64.

        Examples:
            >>> bank = MemoryBank(torch.tensor([[0.0], [9.0]]))
            >>> bank.cover(torch.tensor([[1.0], [4.0], [5.0], [3.0]]), radius=2.0)
            tensor([1])
        """
        op = "MemoryBank.cover"
        rows = self._rows_for(op, "features", features)
        row_ids = self._ids_for(op, rows.shape[0], ids)
        known = self.radius
        radius = known if radius is None else float(radius)
        if radius is None or not 0.0 <= radius < math.inf:
            message = (
                f"{op}: radius must be finite and at least 0, and given where the bank has none, "
                f"got {radius}"
            )
            raise ValueError(message)
        for tensor in (rows, self._features):
            select_backend(op, "cpu", tensor)
        squared = torch.full((rows.shape[0],), math.inf, dtype=torch.float64)
        if len(self):
            exact = torch.float64
            found = search_cpu(rows, self.features, 1, "sqeuclidean", distance_dtype=exact)
            squared = found[0][:, 0]
        picks = cover(rows, squared, radius)
        self._append(
            rows[picks],
            row_ids[: len(picks)] if ids is None else row_ids[picks],
            radius=max(radius, known or 0.0),
        )
        return picks

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
        dropped = which_are_among(op, self.ids, as_ids(op, ids))
        count = int(dropped.sum())
        if count:
            self._keep(~dropped, radius=None)
        return count

    def coreset(
        self,
        *,
        ratio: float | None = None,
        size: int | None = None,
        radius: float | None = None,
        start: int | None = None,
        seed: int = 0,
        projection: int | None = None,
        progress: bool = False,
    ) -> Coreset:
        """Keep only a k-centre greedy coreset, in the order of picking.

        Arguments and errors are those of ``pyfeat.greedy_coreset``; distances are euclidean whatever
        the bank's metric.

        Returns:
            The rows kept, as indices into the bank before the call, and the covering radius, which
            ``radius`` of the bank remembers.
        """
        coreset = greedy_coreset(
            self.features,
            ratio=ratio,
            size=size,
            radius=radius,
            start=start,
            seed=seed,
            projection=projection,
            progress=progress,
        )
        self._keep(coreset.indices, radius=coreset.radius)
        return coreset

    def save(self, path: PathLike) -> None:
        """Write the bank to one safetensors file, aside first and then renamed.

        The file holds a checksum over all that it says; see ``load``.

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
            header={"metric": self.metric, "next_id": self._next_id, "radius": self.radius},
        )

    @classmethod
    def load(cls, path: PathLike) -> "MemoryBank":
        """Read a bank that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is cut off, damaged, no memory bank, or was written by a newer version.
            ImportError: If safetensors is not installed.
        """
        tensors, header = load_tensors(
            path, kind="MemoryBank", version=FORMAT_VERSION, first_with_checksum=2
        )
        try:
            bank = cls(tensors["features"], metric=header["metric"], ids=tensors["ids"])
            bank._next_id = int(header["next_id"])
            radius = header.get("radius")
            bank._radius = None if radius is None else float(radius)
        except (KeyError, TypeError, ValueError) as error:
            message = f"MemoryBank.load: path must hold a whole bank, got {path} ({error})"
            raise ValueError(message) from error
        return bank
