"""The demonstration: real solar cells, good ones to learn from and defective ones to find.

Electroluminescence images of the ELPV set: Buerhop-Lutz et al., A Benchmark for Visual
Identification of Defective Solar Cells in Electroluminescence Imagery, EU PVSEC 2018; from the
package elpv-dataset, CC BY-NC-SA 4.0, which is not part of this distribution.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyfeat._extras import require
from pyfeat._storage import replaced_folder
from pyfeat.anomaly import samples
from pyfeat.anomaly.evaluation import PAGE, collect, describe_threshold
from pyfeat.anomaly.metrics import average_precision, f1_optimal_threshold, image_auroc
from pyfeat.anomaly.models import about
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.readers.files import FileRecord
from pyfeat.anomaly.report import Report, write_report
from pyfeat.anomaly.samples import Dataset
from pyfeat.anomaly.scoring import SCORINGS

METRICS = "metrics.json"

# Cells are lit unevenly: features of unit length leave the brightness out of a comparison. Poly cells have
# grains and mono cells none: learned together, each has its own scale. See benchmarks/methods/prove_cells.py.
CELLS: Mapping[str, Any] = {"scoring": "anomalydino", "kinds": 2}


class Split(NamedTuple):
    """Paths of the cells to learn from and to rank."""

    folder: Path
    train: list[Path]
    test: list[Path]
    defective: list[bool]  # of ``test``


def elpv_split(cells: str, *, seed: int = 0) -> Split:
    """Divide the cells of one type, or of "all": 70 % of the good ones are learned from.

    Good are the cells of defect probability 0, defective those of probability 1; the unsure ones
    between are left out.

    Args:
        cells: "mono", "poly" or "all".
        seed: Decides which good cells are learned from.

    Raises:
        ImportError: If elpv-dataset is not installed.
    """
    folder, names, probability, kind = _labels()
    chosen = np.ones(len(names), bool) if cells == "all" else kind == cells
    good = np.flatnonzero(chosen & (probability == 0))
    defective = np.flatnonzero(chosen & (probability == 1))
    np.random.default_rng(seed).shuffle(good)
    count = int(0.7 * len(good))
    paths = [folder / name for name in names]
    test = [*good[count:], *defective]
    return Split(
        folder,
        [paths[i] for i in good[:count]],
        [paths[i] for i in test],
        [False] * (len(good) - count) + [True] * len(defective),
    )


def unsure_cells() -> list[Path]:
    """The cells of which raters were unsure, in no part of ``elpv_split``."""
    folder, names, probability, _ = _labels()
    unsure = (probability > 0) & (probability < 1)
    return [folder / name for name in names[unsure]]


def solar_cells(*, seed: int = 0) -> Dataset:
    """All cells as a data set with the categories "mono" and "poly", without masks.

    Both are divided as one, as by ``elpv_split("all")``; arguments and errors as there.
    """
    split = elpv_split("all", seed=seed)
    folder, names, _, kinds = _labels()
    kind_of = {folder / name: str(kind) for name, kind in zip(names, kinds, strict=True)}
    parts: tuple[tuple[samples.Split, Path, bool], ...] = (
        *(("train", path, False) for path in split.train),
        *(("test", path, bad) for path, bad in zip(split.test, split.defective, strict=True)),
    )
    records = []
    for part, path, defective in parts:
        category, kind = kind_of[path], "defective" if defective else samples.GOOD
        name = f"{category}/{part}/{kind}/{path.stem}"
        records.append(FileRecord(name, category, part, kind, defective, path))
    return Dataset(sorted(records, key=lambda record: record.category), op="solar_cells")


def _labels() -> tuple[Path, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Folder of the package, and of each cell its file, defect probability and type."""
    package = require("elpv_dataset", extra="demo", op="pyfeat demo")
    folder = Path(package.__path__[0]) / "data"
    table = np.genfromtxt(folder / "labels.csv", dtype=None, encoding="ascii")
    return folder, table["f0"], table["f1"], table["f2"]


def run_demo(cells: str, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Learn good cells, rank the rest, write ``metrics.json``, ``model/`` and ``index.html``.

    Args:
        cells: "mono", "poly" or "all".
        out: Folder to write; it appears whole or not at all.
        force: Replace a folder that an earlier run wrote.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FileExistsError: If ``out`` exists and may not be replaced.
        ImportError: If an extra is missing.
    """
    with replaced_folder("pyfeat demo", out, marker=METRICS, force=force) as folder:
        began = time.perf_counter()
        split = elpv_split(cells)
        model = PatchCore(**{**CELLS, "kinds": CELLS["kinds"] if cells == "all" else 1})
        model.fit(split.train, strict=True, progress=True)
        fitted = time.perf_counter()
        shown = [str(path.relative_to(split.folder)) for path in split.test]
        labels = dict(zip(shown, split.defective, strict=True))
        gallery, _ = collect(model, split.test, root=split.folder, labels=labels, strict=True)
        seconds = {**model.summary.seconds, "score": time.perf_counter() - fitted}
        threshold = model.threshold
        metrics: dict[str, Any] = {
            "cells": cells,
            "image_auroc": image_auroc(gallery.labels, gallery.scores),
            "average_precision": average_precision(gallery.labels, gallery.scores),
            "num_train": len(split.train),
            "num_test": len(split.test),
            "threshold": threshold.value if threshold else None,
            "false_alarm_rate": threshold.false_alarm_rate if threshold else None,
            "f1_optimal": dataclasses.asdict(f1_optimal_threshold(gallery.labels, gallery.scores)),
            "seconds": {**seconds, "total": time.perf_counter() - began},
        }
        model.save(folder / "model")
        (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
        write_report(
            folder / PAGE,
            Report(
                title=f"Solar cells ({cells})",
                gallery=gallery,
                subtitle=about(model).sentence,
                threshold=metrics["threshold"],
                threshold_text=describe_threshold(threshold),
                facts={
                    "Image AUROC": f"{metrics['image_auroc']:.3f}",
                    "Average precision": f"{metrics['average_precision']:.3f}",
                    "Training images": str(metrics["num_train"]),
                },
                seconds={name.capitalize(): value for name, value in seconds.items()},
                heat_unit=SCORINGS[model.scoring].unit,
            ),
        )
    return metrics
