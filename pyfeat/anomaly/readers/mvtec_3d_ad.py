"""The layout of MVTec 3D-AD, colour and organised points: Bergmann et al., VISAPP 2022."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyfeat.anomaly.readers.files import (
    FileRecord,
    categories_in,
    folder_of,
    folders_in,
    images_in,
    numbered,
    paired,
    points_of,
    write_image,
)
from pyfeat.anomaly.readers.tiff import read_tiff, write_tiff
from pyfeat.anomaly.samples import GOOD, Dataset, Split

_FOLDERS: dict[Split, str] = {"train": "train", "validation": "validation", "test": "test"}
_MARKER = "train/good/rgb"


def fits(root: Path) -> bool:
    """Whether the folder has this layout."""
    return bool(categories_in(root, _MARKER))


def records(op: str, root: Path) -> list[FileRecord]:
    """All samples; see ``pyfeat.anomaly.readers.read_dataset``.

    Raises:
        ValueError: If an image has no points or points no image, or a mask has no image.
    """
    found = []
    for category in categories_in(root, _MARKER):
        for split, folder in _FOLDERS.items():
            for kind in folders_in(category / folder):
                images = images_in(kind / "rgb")
                points = paired(
                    op, images, images_in(kind / "xyz"), what="points", folder=kind / "xyz"
                )
                masks = images_in(kind / "gt")
                if masks.keys() - images.keys():
                    paired(op, images, masks, what="masks", folder=kind / "gt")
                found += [
                    FileRecord(
                        f"{category.name}/{folder}/{kind.name}/{stem}",
                        category.name,
                        split,
                        kind.name,
                        kind.name != GOOD,
                        image,
                        points=partial(_read_points, points[stem]),
                        mask=masks.get(stem),
                    )
                    for stem, image in images.items()
                ]
    return found


def write(op: str, dataset: Dataset, root: Path) -> None:
    """Write samples; see ``pyfeat.anomaly.readers.write_dataset``."""
    for number, record in numbered(dataset):
        sample = record.load()
        place = root / record.category / folder_of(op, record, _FOLDERS) / record.kind
        write_image(place / "rgb" / f"{number}.png", sample.rgb)
        points = points_of(op, sample)
        write_tiff(place / "xyz" / f"{number}.tiff", points.permute(1, 2, 0).numpy())
        if sample.mask is not None:
            write_image(place / "gt" / f"{number}.png", sample.mask)


def _read_points(path: Path) -> Tensor:
    points = torch.from_numpy(read_tiff(path)).permute(2, 0, 1)
    if len(points) != 3:
        message = f"read_dataset: points must have 3 coordinates, got {len(points)} in {path}"
        raise ValueError(message)
    # Where the sensor has no answer, some exports have NaN.
    seen = points.isfinite().all(dim=0)
    return points.where(seen, 0.0).contiguous()
