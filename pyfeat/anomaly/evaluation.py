"""Scoring into files: the page and the table that people look at."""

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pyfeat._storage import replaced_folder
from pyfeat.anomaly.gallery import Gallery
from pyfeat.anomaly.images import ImageInput
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.report import Report, write_report
from pyfeat.anomaly.scoring import SCORINGS

PAGE = "index.html"
RANKING = "ranking.csv"


def collect(
    model: PatchCore,
    images: ImageInput,
    *,
    root: Path | None = None,
    labels: Mapping[str, bool] | None = None,
    strict: bool = False,
) -> Gallery:
    """Score images one batch at a time and keep what a page shows; draws a progress bar.

    Args:
        model: Fitted.
        images: As ``PatchCore.score``.
        root: Folder that names are shown relative to.
        labels: Whether each image, by the name shown, is defective; None if nobody knows.
        strict: As ``PatchCore.score``.
    """
    gallery = Gallery()
    for image in model.stream(images, strict=strict, progress=True):
        name = image.name if root is None else os.path.relpath(image.name, root)
        label = None if labels is None else labels[name]
        gallery.add(name, image.score, image.pixels, image.heat_map, label, image.shape)
    return gallery


def write_ranking(
    model: PatchCore, images: Path, out: Path, *, strict: bool = False, force: bool = False
) -> int:
    """Score images and write ``index.html`` and ``ranking.csv`` to a folder.

    Args:
        model: Fitted.
        images: A folder, in which names are relative to it, or one file.
        out: Folder to write; it appears whole or not at all.
        strict: As ``PatchCore.score``.
        force: Replace a folder that an earlier call wrote.

    Returns:
        How many images were scored.

    Raises:
        FileExistsError: If ``out`` exists and may not be replaced.
        ValueError: If no image can be read.
    """
    with replaced_folder("pyfeat score", out, marker=RANKING, force=force) as folder:
        began = time.perf_counter()
        root = images if images.is_dir() else None
        gallery = collect(model, images, root=root, strict=strict)
        if not len(gallery):
            message = "".join(f"\n  {image.name}: {image.reason}" for image in model.skipped[:10])
            message = f"pyfeat score: images must hold at least one that can be read{message}"
            raise ValueError(message)
        seconds = {"Score": time.perf_counter() - began}
        write_csv(folder / RANKING, gallery, model.threshold)
        write_report(
            folder / PAGE,
            Report(
                title="Ranked by anomaly",
                gallery=gallery,
                subtitle=describe(model),
                threshold=model.threshold.value if model.threshold else None,
                threshold_text=describe_threshold(model.threshold),
                facts={"Training images": str(model.summary.num_images)},
                seconds=seconds,
                skipped=[(image.name, image.reason) for image in model.skipped],
                heat_unit=SCORINGS[model.scoring].unit,
                csv_name=RANKING,
            ),
        )
    return len(gallery)


def write_csv(path: Path, gallery: Gallery, threshold: Threshold | None) -> None:
    """Write rank, name, score and verdict, the most anomalous image first."""
    order = sorted(range(len(gallery)), key=lambda i: -gallery.scores[i])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "name", "score", "anomalous"])
        for rank, i in enumerate(order, start=1):
            score = gallery.scores[i]
            verdict = "" if threshold is None else int(score > threshold.value)
            writer.writerow([rank, gallery.names[i], repr(score), verdict])


def describe(model: PatchCore) -> str:
    """One sentence on the model, for the head of a page."""
    return (
        f"PatchCore on {model.backbone.name}, {model.summary.num_rows:,} of "
        f"{model.summary.num_patches:,} normal patches in memory, scores as in "
        f"{SCORINGS[model.scoring].source}."
    )


def describe_threshold(threshold: Threshold | None) -> str:
    """What a threshold promises, in words."""
    if threshold is None or threshold.false_alarm_rate is None:
        return "Not set: it takes at least two training images."
    return (
        f"About {threshold.false_alarm_rate:.0%} of unseen normal images score higher, judged from "
        f"{threshold.num_normal} normal images."
    )
