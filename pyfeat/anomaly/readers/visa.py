"""The layout of VisA, a table of all samples: Zou et al., ECCV 2022, arXiv:2207.14315."""

import csv
from pathlib import Path

from pyfeat.anomaly.readers.files import FileRecord, folder_of, numbered, write_image
from pyfeat.anomaly.samples import GOOD, Dataset, Split

_TABLE = Path("split_csv", "1cls.csv")
_COLUMNS = ("object", "split", "label", "image", "mask")
_FOLDERS: dict[Split, str] = {"train": "train", "test": "test"}
_LABELS = {"normal": False, "anomaly": True}


def fits(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / _TABLE).is_file()


def records(op: str, root: Path) -> list[FileRecord]:
    """All samples; see ``pyfeat.anomaly.readers.read_dataset``.

    The table has one label for all defects: their kind is "anomaly".

    Raises:
        FileNotFoundError: If there is no table, or a file that it names does not exist.
        ValueError: If the table lacks a column, or holds an unknown split or label.
    """
    path = root / _TABLE
    if not path.is_file():
        message = f"{op}: roots must hold {_TABLE.as_posix()}, got {str(root)!r}"
        raise FileNotFoundError(message)
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not set(_COLUMNS) <= set(table.fieldnames or ()):
            message = f"{op}: {path} must have columns {_COLUMNS}, got {table.fieldnames}"
            raise ValueError(message)
        found = [_record(op, root, path, row) for row in table]
    order = list(_FOLDERS)
    return sorted(found, key=lambda r: (r.category, order.index(r.split), bool(r.defective)))


def _record(op: str, root: Path, table: Path, row: dict[str, str | None]) -> FileRecord:
    values = {name: (row[name] or "").strip() for name in _COLUMNS}
    split = next((split for split in _FOLDERS if split == values["split"]), None)
    if split is None or values["label"] not in _LABELS or not values["object"]:
        message = (
            f"{op}: {table} must hold splits {tuple(_FOLDERS)} and labels {tuple(_LABELS)}, "
            f"got {values}"
        )
        raise ValueError(message)
    image = root / values["image"]
    mask = root / values["mask"] if values["mask"] else None
    for path in (image, mask):
        if path is not None and not path.is_file():
            message = f"{op}: files named in {table} must exist, got {path}"
            raise FileNotFoundError(message)
    defective = _LABELS[values["label"]]
    kind = values["label"] if defective else GOOD
    return FileRecord(values["image"], values["object"], split, kind, defective, image, mask=mask)


def write(op: str, dataset: Dataset, root: Path) -> None:
    """Write samples; see ``pyfeat.anomaly.readers.write_dataset``."""
    rows = [_COLUMNS]
    for number, record in numbered(dataset):
        split = folder_of(op, record, _FOLDERS)
        sample = record.load()
        label = "anomaly" if record.defective else "normal"
        place = Path(record.category, "Data")
        file = f"{record.split}_{record.kind}_{number}.png"
        image = place / "Images" / label.capitalize() / file
        write_image(root / image, sample.rgb)
        mask = ""
        if record.defective and sample.mask is not None:
            mask = (place / "Masks" / "Anomaly" / file).as_posix()
            write_image(root / mask, sample.mask)
        rows.append((record.category, split, label, image.as_posix(), mask))
    (root / _TABLE).parent.mkdir(exist_ok=True)
    with (root / _TABLE).open("w", newline="", encoding="utf-8") as file_:
        csv.writer(file_).writerows(rows)
