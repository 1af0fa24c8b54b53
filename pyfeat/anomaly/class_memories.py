"""Memories of the latest features of every class, which a training run fills as it goes."""

import torch
from torch import Tensor

from pyfeat._checks import check_count
from pyfeat._storage import PathLike, load_tensors, save_tensors
from pyfeat.losses import FeatureQueue

_KIND = "ClassMemories"
_VERSION = 1


class ClassMemories:
    """A ring of features for each class: the latest ones, the oldest make room.

    Rings never mix. Every row knows the sample that it is of.

    Args:
        capacity: Rows of a ring, at least 1.
        dim: Features of a row, at least 1.

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is below 1.

    Memory: (4 dim + 8) bytes for each row of the capacity and class, taken as a ring fills.

    Examples:
        >>> memories = ClassMemories(2, 1)
        >>> memories.enqueue("disc", torch.tensor([[1.0], [2.0], [3.0]]), sample=7)
        >>> memories.rows("disc")
        tensor([[3.],
                [2.]])
        >>> memories.fill("plate")
        0.0
    """

    def __init__(self, capacity: int, dim: int) -> None:
        check_count(_KIND, "capacity", capacity)
        check_count(_KIND, "dim", dim)
        self.capacity, self.dim = capacity, dim
        self._rings: dict[str, FeatureQueue] = {}

    @property
    def categories(self) -> list[str]:
        """Classes of which anything was put in, in the order in which they first came."""
        return list(self._rings)

    def rows(self, category: str) -> Tensor:
        """(n, D) float32: a view of the ring of a class, n = 0 where nothing was put in."""
        ring = self._rings.get(category)
        return torch.empty(0, self.dim) if ring is None else ring.features

    def samples(self, category: str) -> Tensor:
        """(n,) int64: of every row of ``rows``, a view likewise."""
        ring = self._rings.get(category)
        return torch.empty(0, dtype=torch.int64) if ring is None else ring.ids

    def fill(self, category: str) -> float:
        """How much of the capacity of a class is taken, from 0 to 1."""
        ring = self._rings.get(category)
        return 0.0 if ring is None else len(ring) / self.capacity

    def enqueue(
        self, category: str, features: Tensor, *, sample: int, mask: Tensor | None = None
    ) -> None:
        """Put rows of a sample in the ring of its class, detached; errors as ``FeatureQueue``.

        Call it after the backward pass of what was compared with the ring.

        Args:
            category: The class.
            features: (n, D) float, finite.
            sample: A number of your own.
            mask: (n,) bool: which rows to put in; None: all.
        """
        ring = self._rings.get(category)
        if ring is None:
            ring = FeatureQueue(self.capacity, self.dim, with_ids=True)
        ring.enqueue(features, torch.full((len(features),), sample), mask=mask)
        self._rings[category] = ring

    def save(self, path: PathLike) -> None:
        """Write rows and the state of every ring to one safetensors file; errors as ``MemoryBank``."""
        rings = list(self._rings.items())
        save_tensors(
            path,
            {f"rows.{number}": ring.features for number, (_, ring) in enumerate(rings)}
            | {f"samples.{number}": ring.ids for number, (_, ring) in enumerate(rings)},
            kind=_KIND,
            version=_VERSION,
            header={
                "capacity": self.capacity,
                "dim": self.dim,
                "categories": [category for category, _ in rings],
                "num_enqueued": [int(ring.num_enqueued) for _, ring in rings],
            },
        )

    @classmethod
    def load(cls, path: PathLike) -> "ClassMemories":
        """Read memories that ``save`` wrote: they go on as if never interrupted.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is cut off, damaged, holds something else, or was written by a newer
                version.
            ImportError: If safetensors is not installed.
        """
        tensors, header = load_tensors(path, kind=_KIND, version=_VERSION)
        try:
            memories = cls(header["capacity"], header["dim"])
            told = zip(header["categories"], header["num_enqueued"], strict=True)
            for number, (category, num_enqueued) in enumerate(told):
                rows = tensors[f"rows.{number}"]
                ring = FeatureQueue(memories.capacity, memories.dim, with_ids=True)
                ring.rows[: len(rows)] = rows
                ring.num_enqueued.fill_(num_enqueued)
                ring.ids.copy_(tensors[f"samples.{number}"])
                memories._rings[category] = ring
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            message = f"{_KIND}.load: path must hold whole memories, got {path} ({error!r})"
            raise ValueError(message) from error
        return memories
