"""Samples of inspection data, colour and organised points, and sets of them that load lazily."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, overload, runtime_checkable

import torch
from torch import Tensor

from pyfeat._checks import check_choice, dtype_name

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
GOOD = "good"  # kind of a sample without a defect


@dataclass(frozen=True, eq=False)
class Sample:
    """One part as the sensors saw it.

    Attributes:
        name: Unique in its set.
        category: Kind of product.
        split: What the sample is for.
        kind: "good", or the name of the defect.
        defective: Whether there is a defect; None if nobody knows.
        rgb: (3, H, W) float32 in [0, 1].
        xyz: (3, H, W) float32, finite: the point that each pixel sees, in units of the sensor;
            (0, 0, 0) where there is none. None without a depth sensor.
        mask: (H, W) bool, True on defects. None if nobody knows.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If a tensor has another shape, or a point is not finite.
    """

    name: str
    category: str
    split: Split
    kind: str
    defective: bool | None
    rgb: Tensor
    xyz: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        size = tuple(self.rgb.shape[-2:])
        self._check("rgb", self.rgb, (3, *size), torch.float32)
        if self.xyz is not None:
            self._check("xyz", self.xyz, (3, *size), torch.float32)
            if not self.xyz.isfinite().all():
                message = f"Sample: xyz must be finite, got NaN or infinity in {self.name}"
                raise ValueError(message)
        if self.mask is not None:
            self._check("mask", self.mask, size, torch.bool)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if tensor.dtype != dtype:
            message = (
                f"Sample: {name} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)} "
                f"in {self.name}"
            )
            raise TypeError(message)
        if tuple(tensor.shape) != shape:
            message = (
                f"Sample: {name} must have shape {shape}, got {tuple(tensor.shape)} in {self.name}"
            )
            raise ValueError(message)


@runtime_checkable
class Record(Protocol):
    """What is known of a sample before it is loaded."""

    @property
    def name(self) -> str:
        """Unique in its set."""

    @property
    def category(self) -> str:
        """Kind of product."""

    @property
    def split(self) -> Split:
        """What the sample is for."""

    @property
    def kind(self) -> str:
        """Name of the defect, "good" where there is none."""

    @property
    def defective(self) -> bool | None:
        """Whether there is a defect; None if nobody knows."""

    @property
    def has_mask(self) -> bool:
        """Whether it is known which pixels are defective; of good samples it is."""

    @property
    def has_points(self) -> bool:
        """Whether there was a depth sensor."""

    def load(self) -> Sample:
        """Read or render the sample."""


class Dataset(Sequence[Record]):
    """Records in a fixed order, of one or more categories.

    Args:
        records: In order.
        op: Public function on whose behalf records are checked; opens error messages.

    Raises:
        ValueError: If two records have one name, two categories differ in case alone, or some
            records of a category have points and others have none.

    Examples:
        >>> from pyfeat.anomaly import synthesise
        >>> plates = synthesise(train=2, good=1, defective=3, size=32)
        >>> len(plates), plates.categories
        (6, ['plate'])
        >>> [record.kind for record in plates.select(split="test")]
        ['good', 'dent', 'stain', 'scratch']
    """

    def __init__(self, records: Iterable[Record], *, op: str = "Dataset") -> None:
        self._records = tuple(records)
        names: set[str] = set()
        spelled: dict[str, str] = {}
        points: dict[str, Record] = {}
        for record in self._records:
            if record.name in names:
                message = f"{op}: names must be unique, got {record.name!r} twice"
                raise ValueError(message)
            names.add(record.name)
            known = spelled.setdefault(record.category.casefold(), record.category)
            if known != record.category:
                message = (
                    f"{op}: categories must differ in more than case, got {known!r} and "
                    f"{record.category!r}"
                )
                raise ValueError(message)
            first = points.setdefault(record.category, record)
            if first.has_points != record.has_points:
                with_points, without = sorted((first, record), key=lambda r: not r.has_points)
                message = (
                    f"{op}: samples of {record.category!r} must all have points or none, got "
                    f"{with_points.name!r} with and {without.name!r} without"
                )
                raise ValueError(message)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Dataset": ...
    def __getitem__(self, index: int | slice) -> "Record | Dataset":
        found = self._records[index]
        return Dataset(found) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.select(split=split))} {split}" for split in SPLITS)
        return f"Dataset({', '.join(self.categories)}: {counts})"

    @property
    def categories(self) -> list[str]:
        """In the order in which they first come."""
        return list(dict.fromkeys(record.category for record in self._records))

    @property
    def without_mask(self) -> list[str]:
        """Names of the records whose defective pixels nobody knows: they have image metrics only."""
        return [record.name for record in self._records if not record.has_mask]

    def select(
        self,
        *,
        category: str | None = None,
        split: Split | None = None,
        kind: str | None = None,
        defective: bool | None = None,
    ) -> "Dataset":
        """The records that have all of the values given, in order.

        Raises:
            ValueError: If there is no such category, or the split has another name.
        """
        check_choice("Dataset.select", "category", category, [None, *self.categories])
        check_choice("Dataset.select", "split", split, (None, *SPLITS))
        wanted = {"category": category, "split": split, "kind": kind, "defective": defective}
        held = {name: value for name, value in wanted.items() if value is not None}
        return Dataset(
            record
            for record in self._records
            if all(getattr(record, name) == value for name, value in held.items())
        )
