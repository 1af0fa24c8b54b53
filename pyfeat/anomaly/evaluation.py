"""Scoring into files: the page and the tables that people look at."""

import csv
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pyfeat._storage import replaced_folder
from pyfeat.anomaly.gallery import Gallery
from pyfeat.anomaly.images import ImageInput
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.models import Detector, about
from pyfeat.anomaly.regions import Region
from pyfeat.anomaly.report import Report, write_report
from pyfeat.anomaly.results import ScoredImage
from pyfeat.anomaly.samples import Dataset, Sample
from pyfeat.anomaly.tables import score_records

PAGE = "index.html"
RANKING = "ranking.csv"
REGIONS = "regions.csv"


def collect(
    model: Detector,
    images: ImageInput,
    *,
    root: Path | None = None,
    labels: Mapping[str, bool] | None = None,
    strict: bool = False,
) -> tuple[Gallery, list[list[Region]]]:
    """Score images one batch at a time and keep what a page shows; draws a progress bar.

    Args:
        model: Fitted.
        images: As ``PatchCore.score``. Of a data set the page shows heights and masks too.
        root: Folder that names are shown relative to.
        labels: Whether each image, by the name shown, is defective; None if nobody knows. A data set
            knows by itself, if it does of all samples.
        strict: As ``PatchCore.score``.

    Returns:
        What the page shows, and the regions of every image.
    """
    gallery = Gallery()
    regions: list[list[Region]] = []
    limit = about(model).map_threshold
    for image, sample in _scored(model, images, strict):
        name = image.name if root is None else os.path.relpath(image.name, root)
        label = None if labels is None else labels[name]
        if sample is not None and isinstance(images, Dataset):
            unsure = any(record.defective is None for record in images)
            label = None if unsure else sample.defective
        regions.append([] if limit is None else image.regions(limit.value))
        gallery.add(
            name,
            image.score,
            image.pixels,
            image.heat_map,
            label,
            image.shape,
            height=heights(sample),
            mask=None if sample is None else sample.mask,
            regions=regions[-1],
        )
    return gallery, regions


def _scored(
    model: Detector, images: ImageInput, strict: bool
) -> Iterator[tuple[ScoredImage, Sample | None]]:
    if isinstance(images, Dataset):
        for sample, image in score_records(model, images, strict=strict, progress=True):
            yield image, sample
    else:
        for image in model.stream(images, strict=strict, progress=True):
            yield image, None


def heights(sample: Sample | None) -> Tensor | None:
    """(H, W): the third coordinate of the points, NaN where there is none."""
    if sample is None or sample.xyz is None:
        return None
    return sample.xyz[2].where((sample.xyz != 0).any(dim=0), float("nan"))


def write_ranking(
    model: Detector,
    images: Path | Dataset,
    out: Path,
    *,
    strict: bool = False,
    force: bool = False,
) -> int:
    """Score images and write ``index.html``, ``ranking.csv`` and ``regions.csv`` to a folder.

    Args:
        model: Fitted.
        images: A folder, in which names are relative to it, one file, or a data set.
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
        root = images if isinstance(images, Path) and images.is_dir() else None
        gallery, regions = collect(model, images, root=root, strict=strict)
        if not len(gallery):
            message = "".join(f"\n  {image.name}: {image.reason}" for image in model.skipped[:10])
            message = f"pyfeat score: images must hold at least one that can be read{message}"
            raise ValueError(message)
        seconds = {"Score": time.perf_counter() - began}
        told = about(model)
        write_csv(folder / RANKING, gallery, regions, model.threshold)
        write_regions(folder / REGIONS, gallery, regions)
        facts = {"Training images": str(told.num_learned)}
        if told.map_threshold is not None:
            facts["Images with regions"] = f"{sum(map(bool, regions)):,}"
        write_report(
            folder / PAGE,
            Report(
                title="Ranked by anomaly",
                gallery=gallery,
                subtitle=told.sentence,
                threshold=model.threshold.value if model.threshold else None,
                threshold_text=describe_threshold(model.threshold),
                facts=facts,
                seconds=seconds,
                skipped=[(image.name, image.reason) for image in model.skipped],
                heat_unit=told.heat_unit,
                csv_name=RANKING,
            ),
        )
    return len(gallery)


def write_csv(
    path: Path,
    gallery: Gallery,
    regions: Sequence[Sequence[Region]],
    threshold: Threshold | None,
) -> None:
    """Write rank, name, score, verdict and what the regions come to, most anomalous image first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "name", "score", "anomalous", "regions", "area"])
        for rank, i in enumerate(_ranked(gallery), start=1):
            score = gallery.scores[i]
            verdict = "" if threshold is None else int(score > threshold.value)
            area = sum(region.area for region in regions[i])
            writer.writerow(
                [rank, gallery.names[i], repr(score), verdict, len(regions[i]), f"{area:g}"]
            )


def write_regions(path: Path, gallery: Gallery, regions: Sequence[Sequence[Region]]) -> None:
    """Write a line for each region, in pixels of the image before it was resized, in that order."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["name", "region", "top", "left", "bottom", "right", "area", "peak", "row", "column"]
        writer.writerow(head)
        for i in _ranked(gallery):
            for number, region in enumerate(regions[i], start=1):
                size = (f"{region.area:g}", repr(region.peak))
                centre = [f"{axis:.1f}" for axis in region.centroid]
                writer.writerow([gallery.names[i], number, *region.box, *size, *centre])


def _ranked(gallery: Gallery) -> list[int]:
    return sorted(range(len(gallery)), key=lambda i: -gallery.scores[i])


def describe_threshold(threshold: Threshold | None) -> str:
    """What a threshold promises, in words."""
    if threshold is None or threshold.false_alarm_rate is None:
        return "Not set: it takes at least two training images."
    return (
        f"About {threshold.false_alarm_rate:.0%} of unseen normal images score higher, judged from "
        f"{threshold.num_normal} normal images."
    )
