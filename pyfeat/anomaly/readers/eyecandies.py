"""The layout of Eyecandies, rendered sweets: Bonfiglioli et al., ACCV 2022, arXiv:2210.04570."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfeat._extras import require
from pyfeat.anomaly.readers.files import (
    FileRecord,
    categories_in,
    folder_of,
    images_in,
    paired,
    points_of,
    read_image,
    write_image,
)
from pyfeat.anomaly.samples import GOOD, Dataset, Split

_FOLDERS: dict[Split, str] = {"train": "train", "validation": "val", "test": "test_public"}
_PRIVATE = "test_private"  # neither labels nor masks are published
_MARKER = "train/data"
_KINDS = ("bumps", "dents", "colors", "normals")  # a mask of each, and one of all
_DEFECTIVE = "anomaly"
FOCAL_LENGTH = 711.11  # of the published camera, in pixels


def fits(root: Path) -> bool:
    """Whether the folder has this layout."""
    return bool(categories_in(root, _MARKER))


def records(op: str, root: Path, *, light: int = 0, private: bool = False) -> list[FileRecord]:
    """All samples; see ``pyfeat.anomaly.readers.read_dataset``.

    A sample has one image for each light. Points are depths, along the axis of a camera with
    ``FOCAL_LENGTH``, seen from it. A sample whose masks name one kind of defect has that kind, every
    other defective one is an "anomaly".

    Args:
        op: Opens error messages.
        root: Folder of categories, or of one.
        light: From 0 to 5.
        private: List samples of the private test set, of which nobody knows whether they are
            defective, in place of the public ones.

    Raises:
        ValueError: If a sample lacks a file.
    """
    found = []
    folders = _FOLDERS | ({"test": _PRIVATE} if private else {})
    for category in categories_in(root, _MARKER):
        for split, folder in folders.items():
            place = category / folder / "data"
            images = images_in(place, ending=f"_image_{light}")
            depths = paired(
                op, images, images_in(place, ending="_depth"), what="depth", folder=place
            )
            masks = images_in(place, ending="_mask")
            for number, image in images.items():
                defective, kind = _truth(op, place, number, masks, unknown=folder == _PRIVATE)
                found.append(
                    FileRecord(
                        f"{category.name}/{folder}/{number}",
                        category.name,
                        split,
                        kind,
                        defective,
                        image,
                        points=partial(
                            _read_points, depths[number], place / f"{number}_info_depth.yaml"
                        ),
                        mask=masks.get(number),
                    )
                )
    return found


def write(op: str, dataset: Dataset, root: Path) -> None:
    """Write samples; see ``pyfeat.anomaly.readers.write_dataset``.

    Depths are z of the points, in 16 bits between the least and the greatest; where there is no
    point, the greatest. All images have one light.
    """
    yaml = require("yaml", extra="anomaly", op=op)
    images = require("PIL.Image", extra="anomaly", op=op)
    counts: dict[Path, int] = {}
    for record in dataset:
        place = root / record.category / folder_of(op, record, _FOLDERS) / "data"
        counts[place] = counts.get(place, -1) + 1
        number = f"{counts[place]:03d}"
        sample = record.load()
        write_image(place / f"{number}_image_0.png", sample.rgb)
        depth = points_of(op, sample)[2]
        seen = depth[depth > 0]
        least, greatest = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
        span = max(greatest - least, 1e-6)
        levels = ((depth.where(depth > 0, greatest) - least) / span * 65535).round()
        images.fromarray(levels.numpy().astype(np.uint16)).save(place / f"{number}_depth.png")
        about = {"normalization": {"min": least, "max": least + span}}
        (place / f"{number}_info_depth.yaml").write_text(yaml.safe_dump(about))
        (place / f"{number}_metadata.yaml").write_text(
            yaml.safe_dump({"anomalous": int(bool(record.defective))})
        )
        if sample.mask is not None:
            write_image(place / f"{number}_mask.png", sample.mask)


def _truth(
    op: str, place: Path, number: str, masks: dict[str, Path], *, unknown: bool
) -> tuple[bool | None, str]:
    """Whether a sample is defective, and its kind."""
    if unknown:
        return None, "unknown"
    about = _read_yaml(op, place / f"{number}_metadata.yaml")
    anomalous = about.get("anomalous")
    if anomalous not in (0, 1):
        message = (
            f"{op}: anomalous must be 0 or 1, got {anomalous!r} in {place}/{number}_metadata.yaml"
        )
        raise ValueError(message)
    if not anomalous:
        return False, GOOD
    named = [kind for kind in _KINDS if f"{number}_{kind}" in masks and _any(masks, number, kind)]
    return True, named[0] if len(named) == 1 else _DEFECTIVE


def _any(masks: dict[str, Path], number: str, kind: str) -> bool:
    return bool((read_image(masks[f"{number}_{kind}"]) > 0.5).any())


def _read_yaml(op: str, path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="anomaly", op=op)
    if not path.is_file():
        message = f"{op}: every image must have a file {path.name}, got none in {path.parent}"
        raise ValueError(message)
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = f"{op}: files of YAML must be readable, got {path} ({error})"
        raise ValueError(message) from error
    if not isinstance(about, dict):
        message = f"{op}: files of YAML must hold fields, got {about!r} in {path}"
        raise ValueError(message)
    return about


def _read_points(depth: Path, info: Path) -> Tensor:
    op = "read_dataset"
    about = _read_yaml(op, info).get("normalization")
    try:
        least, greatest = float(about["min"]), float(about["max"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        message = f"{op}: normalization must hold min and max, got {about!r} in {info}"
        raise ValueError(message) from error
    z = read_image(depth)[0] * (greatest - least) + least  # [H, W]
    height, width = z.shape
    x = (torch.arange(width) - width / 2) / FOCAL_LENGTH
    y = (torch.arange(height) - height / 2) / FOCAL_LENGTH
    return torch.stack([x[None] * z, y[:, None] * z, z])
