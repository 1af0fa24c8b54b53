"""A queue of features of earlier batches: further keys for a loss."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyfeat._checks import DTYPES, check_count, check_features, check_finite, dtype_name
from pyfeat._ids import as_ids
from pyfeat._ranks import Columns, over_all_columns
from pyfeat.losses._arguments import check_shape
from pyfeat.losses._group import Meeting, outside_graphs

_OP = "FeatureQueue.enqueue"


class FeatureQueue(nn.Module):
    """Features of the latest batches, as many as fit; the oldest make room for new ones.

    All that the queue knows is in its buffers, so that a checkpoint resumes where it was saved. Row t
    of all rows ever enqueued lies at index ``t % size``: the order is that of a ring. Further keys of
    ``info_nce`` are ``extra_keys=queue.features``, and ``queue.ids`` the ids that follow those of the
    batch.

    Enqueue after the backward pass. Before it, torch raises a ``RuntimeError`` wherever a loss has
    kept rows of the queue itself for its gradient; it never computes with overwritten rows.

    Args:
        size: Rows that fit, at least 1.
        dim: Features of a row, at least 1.
        dtype: float32, float64, float16 or bfloat16; that of the queries they will be keys of.
        with_ids: Keep an id with every row.

    Raises:
        TypeError: If ``size`` or ``dim`` is no integer, or ``dtype`` not one of the above.
        ValueError: If ``size`` or ``dim`` is below 1.

    Memory: size * dim features, and 8 bytes for each id.
    Source: He et al., Momentum contrast for unsupervised visual representation learning, CVPR 2020,
    arXiv:1911.05722; with labels as ids: Wang et al., Cross-batch memory for embedding learning, CVPR
    2020, arXiv:1912.06798.

    Examples:
        >>> queue = FeatureQueue(3, 2)
        >>> queue.enqueue(torch.eye(2))
        >>> queue.features
        tensor([[1., 0.],
                [0., 1.]])
        >>> queue.enqueue(2 * torch.eye(2))
        >>> queue.features
        tensor([[0., 2.],
                [0., 1.],
                [2., 0.]])
    """

    rows: Tensor  # (size, D)
    row_ids: Tensor | None  # (size,) int64
    num_enqueued: Tensor  # () int64, ever

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, with_ids: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            check_count("FeatureQueue", name, value)
        if dtype not in DTYPES:
            wanted = " or ".join(map(dtype_name, DTYPES))
            message = f"FeatureQueue: dtype must be {wanted}, got {dtype!r}"
            raise TypeError(message)
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        ids = torch.zeros(size, dtype=torch.int64) if with_ids else None
        self.register_buffer("row_ids", ids)
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))

    @property
    def size(self) -> int:
        """Rows that fit."""
        return self.rows.shape[0]

    @property
    def features(self) -> Tensor:
        """(len, D): the rows enqueued, a view of the queue that later ones overwrite."""
        return self.rows[: len(self)]

    @property
    def ids(self) -> Tensor:
        """(len,) int64: of every row of ``features``, a view likewise.

        Raises:
            ValueError: If the queue keeps none.
        """
        if self.row_ids is None:
            message = "FeatureQueue.ids: with_ids must be True, got False"
            raise ValueError(message)
        return self.row_ids[: len(self)]

    def __len__(self) -> int:
        return min(int(self.num_enqueued), self.size)

    def extra_repr(self) -> str:
        """Of the repr, what stands between the brackets."""
        size, dim = self.rows.shape
        options = f"dtype={dtype_name(self.rows.dtype)}, with_ids={self.row_ids is not None}"
        return f"{size}, {dim}, {options}, filled={len(self)}"

    def reset(self) -> None:
        """Empty the queue."""
        self.num_enqueued.zero_()

    @outside_graphs
    @torch.no_grad()
    def enqueue(
        self,
        features: Tensor,
        ids: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        """Put rows in, in their order, over the oldest where the queue is full.

        Of more rows than fit, the last ones stay. Rows are detached, and rounded to the dtype of the
        queue.

        Args:
            features: (n, D) float, finite also when rounded, on the device of the queue.
            ids: (n,) int64, if the queue keeps ids.
            mask: (n,) bool: which rows to put in; None: all of them.
            group: Put in the rows of all its ranks, in their order; each may have another number. All
                of them enqueue, and their queues stay the same.

        Raises:
            TypeError: If features are not float, ids not int64, or the mask not bool.
            ValueError: If shapes or devices disagree, ids are missing or not kept, or a feature is NaN
                or infinite; or if the queues of a group differ. The queue stays as it was.
            RuntimeError: If another rank of the group has raised.

        Memory: a copy of the batch at most, of all ranks; the queue is never copied.
        """
        if group is None:
            self._write(*self._checked(features, ids, mask))
            return
        with Meeting(_OP, group, "gather") as meeting:
            rows, row_ids = self._checked(features, ids, mask)
            state = {"size": self.size, "num_enqueued": int(self.num_enqueued)}
            meeting.tell(rows, rows, torch.ones(()), ids=row_ids is not None, **state)
        own = {"features": rows} | ({} if row_ids is None else {"ids": row_ids})
        over_all_columns(meeting.ranks, own, self._write_columns, [])

    def _checked(
        self, features: Tensor, ids: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What to put in, of the dtype of the queue."""
        check_features(_OP, "features", features)
        check_shape(_OP, "features", features, (len(features), self.rows.shape[1]), self.rows)
        if (ids is None) != (self.row_ids is None):
            wanted = "None for a queue without ids" if self.row_ids is None else "given"
            message = f"{_OP}: ids must be {wanted}, got {type(ids).__name__}"
            raise ValueError(message)
        if ids is not None:
            ids = as_ids(_OP, ids)
            check_shape(_OP, "ids", ids, (len(features),), self.rows)
        if mask is not None:
            if mask.dtype != torch.bool:
                message = f"{_OP}: mask must be bool, got {dtype_name(mask.dtype)}"
                raise TypeError(message)
            check_shape(_OP, "mask", mask, (len(features),), self.rows)
            features, ids = features[mask], None if ids is None else ids[mask]
        features = features.detach().to(self.rows.dtype)
        check_finite(_OP, "features", features)
        return features, ids

    def _write_columns(self, columns: Columns) -> list[Tensor]:
        self._write(columns["features"], columns.get("ids"))
        return []

    def _write(self, features: Tensor, ids: Tensor | None) -> None:
        num_enqueued = int(self.num_enqueued) + len(features)
        features = features[-self.size :]
        start = (num_enqueued - len(features)) % self.size
        first = min(len(features), self.size - start)  # rows before the end of the ring
        for held, new in ((self.rows, features), (self.row_ids, ids)):
            if held is not None and new is not None:
                new = new[-self.size :]
                held[start : start + first] = new[:first]
                held[: len(new) - first] = new[first:]
        self.num_enqueued.fill_(num_enqueued)
