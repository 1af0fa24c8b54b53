"""Images: a folder, or one array in a file."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyfeat._extras import require
from pyfeat.anomaly.images import ImageStream, Item, find_images
from pyfeat.ssl.data.source import OP, Sample, Source, label_codes
from pyfeat.ssl.options import AT_LEAST_ONE, NOT_NEGATIVE
from pyfeat.ssl.registry import SOURCES


@dataclass(frozen=True)
class ImageOptions:
    """Images of a folder, of its folders, or of an array."""

    path: Annotated[
        str, "Folder with images, or .npy file of (N, H, W) or (N, H, W, C), uint8 or in [0, 1]."
    ]
    size: Annotated[tuple[int, int], "Height and width to resize to.", AT_LEAST_ONE] = (64, 64)
    channels: Annotated[Literal["rgb", "grey"], "Three channels, or their mean."] = "rgb"
    labels: Annotated[
        str | None,
        "For probes: 'folders' takes the name of an image's folder; else a CSV file with the columns "
        "file (relative to path) and label, or a .npy file of N whole numbers.",
    ] = None
    cache_mb: Annotated[
        int, "Images kept in memory once read, by each process that reads.", NOT_NEGATIVE
    ] = 1024


@SOURCES.register("images", ImageOptions)
class ImageSource(Source):
    """Images as ``images`` (C, H, W) float32 in [0, 1].

    Args:
        options: As a configuration has them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are no images, one is of no known format, or labels do not fit.
    """

    def __init__(self, options: ImageOptions) -> None:
        self._options = options
        height, width = options.size
        self.sample_shape = (3 if options.channels == "rgb" else 1, height, width)
        self._array = self._paths = None
        path = Path(options.path)
        if path.suffix == ".npy" and path.is_file():
            self._array = _open_array(path)
        else:
            self._paths = find_images(path, OP)
            check_formats(self._paths)
        if len(self) == 0:
            message = f"{OP}: data.path must hold images, got {path} with none"
            raise ValueError(message)
        self.labels = self._read_labels()
        self._cache: dict[int, Tensor] = {}
        self._most = options.cache_mb * (1 << 20) // (4 * self.sample_shape[0] * height * width)

    def __len__(self) -> int:
        """Return N."""
        return len(self._paths if self._paths is not None else self._array)  # type: ignore[arg-type]

    def read(self, index: int, generator: torch.Generator) -> Sample:
        """Return one image."""
        pixels = self._cache.get(index)
        if pixels is None:
            item = self._paths[index] if self._paths is not None else self._array[index]  # type: ignore[index]
            pixels = read_pixels(item, self._options.size, self.name(index))
            if self._options.channels == "grey":
                pixels = pixels.mean(dim=0, keepdim=True)
            if len(self._cache) < self._most:
                self._cache[index] = pixels
        return {"images": pixels}

    def name(self, index: int) -> str:
        """Return the path of an image, or its place in the array."""
        return self._paths[index] if self._paths is not None else f"image {index:05d}"

    def __getstate__(self) -> dict[str, object]:
        """Leave out what each process has of its own: read images, and the open array."""
        return {**self.__dict__, "_cache": {}, "_array": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the array again."""
        self.__dict__.update(state)
        if self._paths is None:
            self._array = _open_array(Path(self._options.path))

    def _read_labels(self) -> Tensor | None:
        where = self._options.labels
        if where is None:
            return None
        if where == "folders":
            if self._paths is None:
                message = f"{OP}: data.labels must be a file for an array, got 'folders'"
                raise ValueError(message)
            return label_codes([Path(path).parent.name for path in self._paths])
        if not Path(where).is_file():
            message = f"{OP}: data.labels must be 'folders' or an existing file, got {where!r}"
            raise FileNotFoundError(message)
        if where.endswith(".npy"):
            labels = np.load(where, allow_pickle=False)
            if labels.shape != (len(self),) or labels.dtype.kind not in "biu":
                message = (
                    f"{OP}: data.labels must be {len(self)} whole numbers, got {labels.dtype} "
                    f"{labels.shape}"
                )
                raise ValueError(message)
            return torch.from_numpy(labels.astype(np.int64))
        return self._labels_of_table(Path(where))

    def _labels_of_table(self, table: Path) -> Tensor:
        by_file = {row["file"]: row["label"] for row in read_table(table, ("file", "label"))}
        folder = Path(self._options.path)
        names = [Path(p).relative_to(folder).as_posix() for p in self._paths or ()]
        found = [by_file.get(name) for name in names]
        if all(label is None for label in found):
            message = f"{OP}: data.labels must name files below {folder}, got {table} with none"
            raise ValueError(message)
        return label_codes(found)


def read_pixels(item: Item, size: tuple[int, int], name: str) -> Tensor:
    """Return a path or array as (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: If it cannot be read to its last row; names it.
    """
    try:
        # An iterator: of lists of paths, some would be read ahead in a thread.
        stream = ImageStream(iter([item]), op=OP, size=size, strict=True)
        return next(iter(stream)).pixels
    except ValueError as error:
        message = f"{OP}: data must be readable, got {name}: {error}"
        raise ValueError(message) from error


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing, or there are no rows.
    """
    if not path.is_file():
        message = f"{OP}: table must be an existing CSV file, got {path}"
        raise FileNotFoundError(message)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing or not rows:
        found = f"columns {reader.fieldnames} and {len(rows)} rows"
        message = f"{OP}: {path} must have the columns {', '.join(columns)} and rows, got {found}"
        raise ValueError(message)
    return rows


def check_formats(paths: list[str]) -> None:
    """Raise ValueError naming files that are empty or of no known format; reads their heads only."""
    pil = require("PIL.Image", extra="train", op=OP)
    bad = []
    for path in paths:
        try:
            with Path(path).open("rb") as file, pil.open(file):
                pass
        except Exception as error:  # noqa: BLE001, RUF100 - decoders raise nearly anything
            bad.append(f"{path} ({type(error).__name__})")
    if bad:
        shown = ", ".join(bad[:5])
        message = f"{OP}: data must be readable images, got {len(bad)} that are not: {shown}"
        raise ValueError(message)


def _open_array(path: Path) -> "np.memmap[tuple[int, ...], np.dtype[np.generic]]":
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        message = f"{OP}: data.path must be a whole .npy file, got {path} ({error})"
        raise ValueError(message) from error
    if array.ndim not in (3, 4):
        message = f"{OP}: data.path must have shape (N, H, W) or (N, H, W, C), got {array.shape}"
        raise ValueError(message)
    return array  # type: ignore[no-any-return]
