"""Inspection data sets in the layouts in which they are published, read lazily and written.

::

    read_dataset, write_dataset      which layout, checks over all categories
    mvtec_ad  visa  mvtec_3d_ad  eyecandies      where files lie, in each layout: list and write
    files      one sample in files      tiff      points of a sample
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

from pyfeat._checks import check_choice
from pyfeat._storage import PathLike
from pyfeat.anomaly.readers import eyecandies, mvtec_3d_ad, mvtec_ad, visa
from pyfeat.anomaly.samples import Dataset

Layout = Literal["mvtec_ad", "visa", "mvtec_3d_ad", "eyecandies"]
LAYOUTS: dict[Layout, ModuleType] = {
    "visa": visa,
    "mvtec_3d_ad": mvtec_3d_ad,
    "eyecandies": eyecandies,
    "mvtec_ad": mvtec_ad,
}


def read_dataset(
    *roots: PathLike, layout: Layout | None = None, categories: Sequence[str] | None = None
) -> Dataset:
    """List the samples in folders of inspection data; their files are read when they are loaded.

    Layouts, a folder for each category, names of defects as folders:

    - "mvtec_ad": ``<category>/train/good/000.png``, ``<category>/test/<kind>/000.png``, masks in
      ``<category>/ground_truth/<kind>/000_mask.png``.
    - "visa": a table ``split_csv/1cls.csv`` of object, split, label, image and mask.
    - "mvtec_3d_ad": ``<category>/<split>/<kind>/{rgb,xyz,gt}/000.{png,tiff,png}``.
    - "eyecandies": ``<category>/{train,val,test_public}/data/00_{image_0,depth,mask}.png`` with
      ``info_depth.yaml`` and ``metadata.yaml``; of the six lights the first, unless said otherwise
      by ``eyecandies.records``.

    Masks may be missing: such samples have image metrics only, and ``Dataset.without_mask`` names
    them. Without a mask, defects of Eyecandies' private test set are unknown too.

    Args:
        roots: Folders that hold categories, or are one. All in one layout.
        layout: None finds out.
        categories: Which to list; None: all.

    Returns:
        Records by category, in the order of training, validation and test, then by name.

    Raises:
        FileNotFoundError: If a root, or a file that a table names, does not exist.
        ValueError: If no layout fits, a category is unknown, or found in two roots, or under names
            that differ in case alone; or if samples lack one of their modalities.
        ImportError: If Pillow, or for Eyecandies PyYAML, is not installed.
    """
    op = "read_dataset"
    check_choice(op, "layout", layout, (None, *LAYOUTS))
    if not roots:
        message = f"{op}: roots must name at least one folder, got none"
        raise ValueError(message)
    records = []
    where: dict[str, Path] = {}
    for root in map(Path, roots):
        if not root.is_dir():
            message = f"{op}: roots must be existing folders, got {str(root)!r}"
            raise FileNotFoundError(message)
        found = LAYOUTS[layout or _layout_of(op, root)].records(op, root)
        for category in dict.fromkeys(record.category for record in found):
            other = where.setdefault(category.casefold(), root)
            if other != root:
                message = (
                    f"{op}: roots must not share categories, got {category!r} in {other} and {root}"
                )
                raise ValueError(message)
        records += found
    if categories is not None:
        known = sorted({record.category for record in records})
        for category in categories:
            check_choice(op, "categories", category, known)
        records = [record for record in records if record.category in categories]
    return Dataset(records, op=op)


def write_dataset(dataset: Dataset, folder: PathLike, *, layout: Layout) -> None:
    """Write samples as files in one of the layouts of ``read_dataset``.

    Colours are rounded to 8 bits; "eyecandies" rounds depths to 16 and keeps no validation names;
    "mvtec_ad" and "visa" keep no points. Samples are numbered anew.

    Args:
        dataset: With points for "mvtec_3d_ad" and "eyecandies".
        folder: Must not exist, or be empty.
        layout: See above.

    Raises:
        FileExistsError: If there is something in the folder.
        ValueError: If samples have no points and the layout needs them, or it has no place for a
            sample: for one that is not known to be good or defective, or, in "mvtec_ad" and "visa",
            for a validation sample.
        ImportError: If Pillow, or for Eyecandies PyYAML, is not installed.
    """
    op = "write_dataset"
    check_choice(op, "layout", layout, LAYOUTS)
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        message = f"{op}: folder must not exist or be empty, got {str(root)!r}"
        raise FileExistsError(message)
    root.mkdir(parents=True, exist_ok=True)
    LAYOUTS[layout].write(op, dataset, root)


def _layout_of(op: str, root: Path) -> Layout:
    for layout, module in LAYOUTS.items():
        if module.fits(root):
            return layout
    message = f"{op}: roots must have the layout of {', '.join(LAYOUTS)}, got {str(root)!r}"
    raise ValueError(message)


__all__ = ["LAYOUTS", "Layout", "read_dataset", "write_dataset"]
