"""Every kind of model by one face: what scores images, loaded by its folder."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pyfeat._storage import PathLike
from pyfeat.anomaly import ear_files, lsfa_files, model_files
from pyfeat.anomaly.ear import EAR
from pyfeat.anomaly.images import SkippedImage
from pyfeat.anomaly.lsfa import LSFA
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.results import ScoredImage
from pyfeat.anomaly.samples import Record
from pyfeat.anomaly.scoring import SCORINGS


class Detector(Protocol):
    """What all kinds of models share, once they are fitted."""

    skipped: list[SkippedImage]  # of the latest fit or score

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the model sees, and of its maps."""

    @property
    def threshold(self) -> Threshold | None:
        """An image is anomalous when its score is greater; None where it takes more to set one."""

    def stream(self, images: Any, *, strict: bool, progress: bool) -> Iterator[ScoredImage]:
        """Score one batch at a time, in order: images, or records and samples of a data set."""


@dataclass(frozen=True)
class About:
    """What a page says of a model.

    Attributes:
        sentence: On the model, for the head of the page.
        num_learned: Images learned from.
        heat_unit: What a value of a heat map is.
        map_threshold: Of pixels: what is above is a region, of which normal images have none, as it
            promises; None where the model sets none.
    """

    sentence: str
    num_learned: int
    heat_unit: str
    map_threshold: Threshold | None


def about(model: Detector) -> About:
    """Describe a fitted model of any kind."""
    if isinstance(model, PatchCore):
        scoring, summary = SCORINGS[model.scoring], model.summary
        scale = ", on the scale of their kind" if model.scales else ""
        sentence = (
            f"PatchCore on {model.backbone.name}, {summary.num_rows:,} of {summary.num_patches:,} "
            f"normal patches in memory, scores as in {scoring.source}{scale}."
        )
        return About(sentence, summary.num_images, scoring.unit, model.map_threshold)
    if isinstance(model, EAR):
        sentence = (
            f"EAR, excision by {model.saliency.kind or 'a saliency of your own'}, mosaics of "
            f"{model.excision.block} pixels, {model.residual} residuals{', relative' if model.normal else ''}."
        )
        # The score of an image is the peak of its map.
        unit = "residual of what was rebuilt"
        if model.normal:
            unit += ", in spreads above that of normal images"
        return About(sentence, model.summary.num_images, unit, model.threshold)
    if isinstance(model, LSFA):
        names = " and ".join(extractor.name for extractor in model.extractors.values())
        sentence = (
            f"LSFA on {names}, {'adapted' if model.adaptation else 'not adapted'}, of "
            f"{', '.join(model.categories)}."
        )
        unit = "fused distance to the nearest normal patches"
        return About(sentence, model.num_seen, unit, model.map_threshold)
    return About(f"{type(model).__name__}.", 0, "anomaly of the pixel", None)


def threshold_of(model: Detector, category: str) -> Threshold | None:
    """The threshold of image scores for a category: its own, of models with memories for each."""
    if isinstance(model, LSFA):
        banks = model.banks.get(category)
        return banks.threshold if banks else None
    return model.threshold


def _load_lsfa(path: Path, batch_size: int, device: str | torch.device) -> LSFA:
    if torch.device(device).type != "cpu":
        message = f"load_model: device must be 'cpu' for LSFA, got {str(device)!r}"
        raise ValueError(message)
    return LSFA.load(path, batch_size=batch_size)


# By the file that a model of the kind has in its folder.
LOADERS: Mapping[str, Callable[[Path, int, str | torch.device], Detector]] = {
    model_files.MANIFEST: lambda path, batch_size, device: PatchCore.load(
        path, batch_size=batch_size, device=device
    ),
    ear_files.MANIFEST: lambda path, batch_size, device: EAR.load(
        path, batch_size=batch_size, device=device
    ),
    lsfa_files.MANIFEST: _load_lsfa,
}


def load_model(
    path: PathLike, *, batch_size: int = 16, device: str | torch.device = "cpu"
) -> Detector:
    """Read a model of any kind that scores images, by its folder alone.

    ``FeatureOutlier`` scores features, not images, and has a ``load`` of its own; so have models of
    networks of your own, to be given there.

    Args:
        path: Folder that ``save`` wrote, or ``pyfeat fit``.
        batch_size: Images per pass.
        device: Of the network; LSFA runs on the CPU.

    Raises:
        FileNotFoundError: If there is no model at ``path``.
        ValueError: As the ``load`` of the kind, or if there are models of several kinds.
    """
    folder = Path(path)
    found = [name for name in LOADERS if (folder / name).is_file()]
    if not found:
        message = (
            f"load_model: path must be the folder of a saved model (with one of "
            f"{', '.join(LOADERS)}), got {str(folder)!r}"
        )
        raise FileNotFoundError(message)
    if len(found) > 1:
        message = f"load_model: path must hold one model, got {' and '.join(found)} in {folder}"
        raise ValueError(message)
    return LOADERS[found[0]](folder, batch_size, device)


def load_models(
    path: PathLike,
    categories: Iterable[str],
    *,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
) -> "Detector | dict[str, Detector]":
    """Read the model at ``path`` or, where that is none, one in its subfolder of every category.

    Arguments and errors are those of ``load_model``.
    """
    folder = Path(path)
    names = list(categories)
    each = all(any((folder / c / name).is_file() for name in LOADERS) for c in names)
    if each and names and not any((folder / name).is_file() for name in LOADERS):
        return {c: load_model(folder / c, batch_size=batch_size, device=device) for c in names}
    return load_model(folder, batch_size=batch_size, device=device)


def models_by_category(
    model: Detector | Mapping[str, Detector], records: Iterable[Record]
) -> dict[str, Detector]:
    """Which model scores which category of the records.

    Raises:
        ValueError: If a category has no model.
    """
    categories = list(dict.fromkeys(record.category for record in records))
    if not isinstance(model, Mapping):
        return dict.fromkeys(categories, model)
    missing = [category for category in categories if category not in model]
    if missing:
        message = f"evaluate: models must hold one for each category, got none for {missing}"
        raise ValueError(message)
    return {category: model[category] for category in categories}
