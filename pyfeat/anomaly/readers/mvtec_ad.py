"""The layout of MVTec AD: Bergmann et al., CVPR 2019."""

from pathlib import Path

from pyfeat.anomaly.readers.files import (
    FileRecord,
    categories_in,
    folder_of,
    folders_in,
    images_in,
    numbered,
    write_image,
)
from pyfeat.anomaly.samples import GOOD, Dataset, Split

_FOLDERS: dict[Split, str] = {"train": "train", "test": "test"}
_MARKER = "train/good"


def fits(root: Path) -> bool:
    """Whether the folder has this layout."""
    return any(images_in(folder / _MARKER) for folder in categories_in(root, _MARKER))


def records(op: str, root: Path) -> list[FileRecord]:
    """All samples; see ``pyfeat.anomaly.readers.read_dataset``.

    Raises:
        ValueError: If a mask belongs to no image.
    """
    found = []
    for category in categories_in(root, _MARKER):
        for split, folder in _FOLDERS.items():
            for kind in folders_in(category / folder):
                images = images_in(kind)
                truth = category / "ground_truth" / kind.name
                masks = images_in(truth, ending="_mask") if split == "test" else {}
                astray = sorted(masks.keys() - images.keys())
                if astray:
                    message = f"{op}: every mask must have an image, got {astray[:3]} in {truth}"
                    raise ValueError(message)
                found += [
                    FileRecord(
                        f"{category.name}/{folder}/{kind.name}/{image.name}",
                        category.name,
                        split,
                        kind.name,
                        kind.name != GOOD,
                        image,
                        mask=masks.get(stem),
                    )
                    for stem, image in images.items()
                ]
    return found


def write(op: str, dataset: Dataset, root: Path) -> None:
    """Write samples; see ``pyfeat.anomaly.readers.write_dataset``."""
    for number, record in numbered(dataset):
        folder = folder_of(op, record, _FOLDERS)
        sample = record.load()
        place = root / record.category
        write_image(place / folder / record.kind / f"{number}.png", sample.rgb)
        if record.defective and sample.mask is not None:
            write_image(place / "ground_truth" / record.kind / f"{number}_mask.png", sample.mask)
