"""How good a model is on a data set whose defects are known: the usual table."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat.anomaly.images import SkippedImage
from pyfeat.anomaly.metrics import PixelMetrics, f1_optimal_threshold, image_auroc
from pyfeat.anomaly.models import Detector, models_by_category, threshold_of
from pyfeat.anomaly.results import ScoredImage
from pyfeat.anomaly.samples import Dataset, Record, Sample, Split

MEAN, ALL = "mean", "all together"
TABLE = "evaluation.csv"


@dataclass(frozen=True)
class Row:
    """Figures of one category, in [0, 1]; None where the data do not define one.

    Attributes:
        category: Its name, or ``MEAN`` or ``ALL``.
        num_good: Good images scored.
        num_defective: Defective images scored.
        image_auroc: Chance that a defective image scores higher than a good one.
        pixel_auroc: The same of pixels.
        aupro: Area under the per-region-overlap curve up to 30 % false positives.
        f1: Highest F1 of images that any threshold has, as is usually reported; optimistic.
        recall: Share of the defective images above the threshold of the model.
        false_alarms: Share of the good images above it.
    """

    category: str
    num_good: int
    num_defective: int
    image_auroc: float | None = None
    pixel_auroc: float | None = None
    aupro: float | None = None
    f1: float | None = None
    recall: float | None = None
    false_alarms: float | None = None


FIGURES: dict[str, str] = {
    "image_auroc": "I-AUROC",
    "pixel_auroc": "P-AUROC",
    "aupro": "AUPRO",
    "f1": "F1",
    "recall": "recall",
    "false_alarms": "false alarms",
}


@dataclass
class Evaluation:
    """The table of a model on a data set.

    Attributes:
        rows: A category each, then their mean where there are several and, where one model serves
            all of them, the images of all categories in one ranking.
        notes: What the table leaves out, and why.
        skipped: Samples that could not be scored.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, and below it the notes."""
        head = ["category", "good", "defective", *FIGURES.values()]
        lines = [
            [row.category, str(row.num_good), str(row.num_defective)]
            + [_shown(getattr(row, name)) for name in FIGURES]
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        table = [
            "| "
            + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            + " |"
            for line in (head, ruler, *lines)
        ]
        return "\n".join([*table, *(f"\n{note}" for note in self.notes), ""])

    def write(self, folder: Path) -> None:
        """Write ``evaluation.md`` and ``evaluation.csv``, its figures unrounded, to a folder."""
        (folder / "evaluation.md").write_text(self.markdown(), encoding="utf-8")
        with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = ["category", "num_good", "num_defective", *FIGURES]
            writer.writerow(names)
            for row in self.rows:
                values = [getattr(row, name) for name in names]
                writer.writerow(["" if value is None else value for value in values])


def evaluate(
    model: Detector | Mapping[str, Detector],
    dataset: Dataset,
    *,
    split: Split = "test",
    strict: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Score the samples of a data set and compare with what is known of them.

    Pixel figures are at the size of the model's input, where masks keep the nearest of their pixels;
    a defect smaller than that may vanish. They are left out of a category where the mask of a
    defective sample is missing. Samples of which nobody knows whether they are defective are not
    scored.

    Args:
        model: Fitted; or models by category.
        dataset: See ``pyfeat.anomaly.readers.read_dataset``.
        split: Which samples to score.
        strict: Raise at the first sample that cannot be read instead of skipping it.
        progress: Show a progress bar for each category.

    Raises:
        ValueError: If the split holds no sample that is known to be good or defective, none can be
            read, or a category has no model.
    """
    op = "evaluate"
    chosen = dataset.select(split=split)
    known = [record for record in chosen if record.defective is not None]
    if not known:
        message = f"{op}: dataset must hold {split} samples known to be good or defective, got none"
        raise ValueError(message)
    result = Evaluation()
    if len(known) < len(chosen):
        result.notes.append(
            f"{len(chosen) - len(known)} samples are not known to be good or defective and were not "
            f"scored."
        )
    scores: list[_Scores] = []
    for category, detector in models_by_category(model, known).items():
        records = [record for record in known if record.category == category]
        found = _Scores(category, detector)
        without = sum(not record.has_mask for record in records)
        pixels = None if without else PixelMetrics()
        if without:
            result.notes.append(f"{category}: no pixel figures, {without} samples have no mask.")
        for sample, scored in score_records(detector, records, strict=strict, progress=progress):
            found.add(sample, scored)
            if pixels is not None and sample.mask is not None:
                pixels.update(scored.heat_map[None], _at_size(sample.mask, scored.heat_map))
        result.skipped += detector.skipped
        if found.labels:
            scores.append(found)
            result.rows.append(found.row(pixels))
    if not scores:
        reasons = "".join(f"\n  {image.name}: {image.reason}" for image in result.skipped[:10])
        message = f"{op}: dataset must hold samples that can be read, got none{reasons}"
        raise ValueError(message)
    if len(scores) > 1:
        result.rows.append(_mean(result.rows))
        if len({id(found.detector) for found in scores}) == 1:
            result.rows.append(_Scores.joined(scores).row(None))
    return result


def score_records(
    model: Detector, records: Iterable[Record], *, strict: bool = False, progress: bool = False
) -> Iterator[tuple[Sample, ScoredImage]]:
    """Score records one batch at a time, and yield each with what was loaded of it, once."""
    loaded: dict[str, Sample] = {}
    wrapped = [_Loading(record, loaded) for record in records]
    for scored in model.stream(wrapped, strict=strict, progress=progress):
        for name in list(loaded):  # those before it were skipped by the model
            sample = loaded.pop(name)
            if name == scored.name:
                yield sample, scored
                break


class _Loading:
    """A record that leaves what it loads for others to see."""

    def __init__(self, record: Record, loaded: dict[str, Sample]) -> None:
        self._record, self._loaded = record, loaded

    def __getattr__(self, name: str) -> object:
        return getattr(self._record, name)

    def load(self) -> Sample:
        sample = self._record.load()
        self._loaded[sample.name] = sample
        return sample


class _Scores:
    """Scores of the samples of a category, and what is true of them."""

    def __init__(self, category: str, detector: Detector) -> None:
        self.category, self.detector = category, detector
        self.scores: list[float] = []
        self.labels: list[bool] = []
        self.above: list[bool] = []  # the threshold of the model, if it has one

    def add(self, sample: Sample, scored: ScoredImage) -> None:
        self.scores.append(scored.score)
        self.labels.append(bool(sample.defective))
        threshold = threshold_of(self.detector, sample.category)
        if threshold is not None:
            self.above.append(scored.score > threshold.value)

    @classmethod
    def joined(cls, parts: "Sequence[_Scores]") -> "_Scores":
        whole = cls(ALL, parts[0].detector)
        for part in parts:
            whole.scores += part.scores
            whole.labels += part.labels
            whole.above += part.above
        return whole

    def row(self, pixels: PixelMetrics | None) -> Row:
        labels = torch.tensor(self.labels)
        bad = int(labels.sum())
        good = len(labels) - bad
        figures: dict[str, float] = {}
        if bad and good:
            # Scores are float32 numbers, and a threshold between them is chosen in that dtype.
            scores = torch.tensor(self.scores, dtype=torch.float32)
            figures["image_auroc"] = image_auroc(labels, scores)
            figures["f1"] = cast(float, f1_optimal_threshold(labels, scores).f1)
        if len(self.above) == len(labels):
            above = torch.tensor(self.above)
            if bad:
                figures["recall"] = float(above[labels].double().mean())
            if good:
                figures["false_alarms"] = float(above[~labels].double().mean())
        if pixels is not None and bad:
            figures["pixel_auroc"], figures["aupro"] = pixels.compute()
        return Row(self.category, good, bad, **figures)


def _mean(rows: Sequence[Row]) -> Row:
    """Means over the categories that have a figure; images are counted."""
    figures: dict[str, float | None] = {}
    for name in FIGURES:
        held = [value for row in rows if (value := getattr(row, name)) is not None]
        figures[name] = sum(held) / len(held) if held else None
    good, bad = sum(row.num_good for row in rows), sum(row.num_defective for row in rows)
    return Row(MEAN, good, bad, **figures)


def _at_size(mask: Tensor, heat_map: Tensor) -> Tensor:
    """(1, h, w) bool: the mask (H, W) at the size of a heat map, the nearest pixels."""
    size = (heat_map.shape[0], heat_map.shape[1])
    nearest: Tensor = functional.interpolate(mask[None, None].float(), size, mode="nearest-exact")
    return nearest[0] > 0.5


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
