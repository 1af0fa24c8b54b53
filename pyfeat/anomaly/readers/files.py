"""One sample in files: what all layouts share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyfeat._extras import require
from pyfeat.anomaly.images import SUFFIXES, ImageStream
from pyfeat.anomaly.samples import GOOD, Dataset, Record, Sample, Split

Files = dict[str, Path]  # by the names they have in common, such as "000"


@dataclass(frozen=True)
class FileRecord:
    """Record of a sample in files; see ``pyfeat.anomaly.samples.Sample`` for the fields.

    Attributes:
        image: File in colour.
        points: Reads (3, H, W) points; None without a depth sensor.
        mask: File, white on defects; None if there is none.
    """

    name: str
    category: str
    split: Split
    kind: str
    defective: bool | None
    image: Path
    points: Callable[[], Tensor] | None = None
    mask: Path | None = None

    @property
    def has_mask(self) -> bool:
        """Whether it is known which pixels are defective; of good samples it is."""
        return self.mask is not None or self.defective is False

    @property
    def has_points(self) -> bool:
        """Whether there was a depth sensor."""
        return self.points is not None

    def load(self) -> Sample:
        """Read the files.

        Raises:
            FileNotFoundError: If a file is gone.
            ValueError: If one cannot be decoded, or sizes differ between them.
        """
        rgb = read_image(self.image)
        mask = None
        if self.mask is not None:
            mask = read_image(self.mask)[0] > 0.5
        elif self.defective is False:
            mask = torch.zeros(rgb.shape[1:], dtype=torch.bool)
        points = None if self.points is None else self.points()
        sizes = {"image": rgb, "points": points, "mask": mask}
        held = {name: tuple(t.shape[-2:]) for name, t in sizes.items() if t is not None}
        if len(set(held.values())) > 1:
            shown = ", ".join(f"{name} of {size}" for name, size in held.items())
            message = f"read_dataset: files of {self.name} must be of one size, got {shown}"
            raise ValueError(message)
        return Sample(
            self.name, self.category, self.split, self.kind, self.defective, rgb, points, mask
        )


def read_image(path: Path) -> Tensor:
    """(3, H, W) float32 in [0, 1], at the size it has."""
    (image,) = ImageStream([path], op="read_dataset", size=None, strict=True)
    return image.pixels


def write_image(path: Path, values: Tensor) -> None:
    """Write (3, H, W) or (H, W) in [0, 1] or bool with 8 bits for each value."""
    images = require("PIL.Image", extra="anomaly", op="write_dataset")
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (values.float() * 255).round().to(torch.uint8).numpy()
    images.fromarray(levels if levels.ndim == 2 else np.moveaxis(levels, 0, -1).copy()).save(path)


def images_in(folder: Path, *, ending: str = "") -> Files:
    """Image files right in a folder that end so, without the ending, in the order of names."""
    if not folder.is_dir():
        return {}
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES.split() and not path.name.startswith(".")
    )
    return {p.stem.removesuffix(ending): p for p in files if p.stem.endswith(ending)}


def paired(op: str, images: Files, others: Files, *, what: str, folder: Path) -> Files:
    """The others, if there is one for each image and none too many."""
    lacking, extra = sorted(images.keys() - others.keys()), sorted(others.keys() - images.keys())
    if lacking or extra:
        message = (
            f"{op}: every image must have one file of {what}, got {len(images)} images and "
            f"{len(others)} files in {folder}: without {what} {lacking[:3]}, without image {extra[:3]}"
        )
        raise ValueError(message)
    return others


def categories_in(root: Path, marker: str) -> list[Path]:
    """Folders of categories that hold ``marker``, a path; the root itself if it holds that."""
    if (root / marker).is_dir():
        return [root]
    return sorted(folder for folder in root.iterdir() if (folder / marker).is_dir())


def folders_in(folder: Path) -> list[Path]:
    """Folders right in a folder in the order of names, good samples first; none if there is none."""
    found = [path for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")]
    return sorted(found, key=lambda path: (path.name != GOOD, path.name))


def numbered(dataset: Dataset) -> Iterator[tuple[str, Record]]:
    """Every record and its number, such as "007", in its category, split and kind."""
    counts: dict[tuple[str, str, str], int] = {}
    for record in dataset:
        key = (record.category, record.split, record.kind)
        counts[key] = counts.get(key, -1) + 1
        yield f"{counts[key]:03d}", record


def folder_of(op: str, record: Record, folders: Mapping[Split, str]) -> str:
    """The folder of the record's split, in a layout that has a place for it.

    Raises:
        ValueError: If there is none.
    """
    if record.split not in folders or record.defective is None:
        message = (
            f"{op}: samples must be known to be good or defective and of {' or '.join(folders)}, "
            f"got {record.name!r} of {record.split}"
        )
        raise ValueError(message)
    return folders[record.split]


def points_of(op: str, sample: Sample) -> Tensor:
    """(3, H, W), if there are any."""
    if sample.xyz is None:
        message = f"{op}: samples must have points in this layout, got {sample.name!r} without"
        raise ValueError(message)
    return sample.xyz
