"""The folder of a saved PatchCore model: a manifest in JSON and the bank in safetensors."""

import dataclasses
import json
import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pyfeat._storage import read_manifest
from pyfeat.anomaly.calibration import NormalScores
from pyfeat.anomaly.image_kinds import ImageKinds
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.results import LearnedImage
from pyfeat.features import Backbone, load_backbone
from pyfeat.memory import MemoryBank

if TYPE_CHECKING:
    from pyfeat.anomaly.patchcore import PatchCore

FORMAT_VERSION = 2  # 1 had neither names of images nor scores of normal ones
MANIFEST = "patchcore.json"
_BANK, _IMAGES = "bank.safetensors", "images.json"

# Constructor arguments of PatchCore that the manifest keeps as they are.
_SETTINGS = (
    "neighbourhood",
    "coreset_ratio",
    "candidates",
    "scoring",
    "kinds",
    "false_alarm_rate",
    "seed",
)


@dataclass
class FitSummary:
    """What a fit saw and left behind.

    Attributes:
        num_images: Images learned from.
        num_patches: Patches they have.
        num_rows: Patches kept in the bank.
        radius: Largest distance of any candidate patch to its nearest row of the bank.
        seconds: Wall time by stage.
    """

    num_images: int = 0
    num_patches: int = 0
    num_rows: int = 0
    radius: float = 0.0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note how long a stage takes."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began


def write_files(model: "PatchCore", folder: Path) -> None:
    """Write a fitted model into an existing folder."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "PatchCore",
        "backbone": model.backbone.name,
        "layers": list(model.backbone.layers),
        "fingerprint": model.backbone.fingerprint(),
        "image_size": list(model.image_size),
        **{name: getattr(model, name) for name in _SETTINGS},
        "grid": list(model.grid),
        "threshold": _as_fields(model.threshold),
        "map_threshold": _as_fields(model.map_threshold),
        "summary": dataclasses.asdict(model.summary),
    }
    model.bank.save(folder / _BANK)
    known = {
        "learned": model.learned,  # as [name, [height, width]]
        "normal_scores": dataclasses.asdict(model.normal_scores),
        "scales": model.scales.state() if model.scales else None,
    }
    (folder / _IMAGES).write_text(json.dumps(known) + "\n", encoding="utf-8")
    # Arguments may have been NumPy scalars, which JSON does not know.
    text = json.dumps(manifest, indent=2, default=operator.methodcaller("item"))
    (folder / MANIFEST).write_text(text + "\n")


def read_files(
    factory: "type[PatchCore]",
    folder: Path,
    *,
    backbone: nn.Module | Backbone | None,
    batch_size: int,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    compile: bool,
) -> "PatchCore":
    """Read what ``write_files`` wrote; arguments and errors as ``PatchCore.load``."""
    op = "PatchCore.load"
    manifest = _read_manifest(op, folder)
    ready = _matching_backbone(op, manifest, backbone, device, dtype, compile)
    try:
        model = factory(
            ready,
            image_size=tuple(manifest["image_size"]),
            batch_size=batch_size,
            **{name: manifest[name] for name in _SETTINGS},
        )
        model.grid = (manifest["grid"][0], manifest["grid"][1])
        model.threshold = _as_threshold(manifest["threshold"])
        model.map_threshold = _as_threshold(manifest["map_threshold"])
        model.summary = FitSummary(**manifest["summary"])
        known = json.loads((folder / _IMAGES).read_text(encoding="utf-8"))
        model.learned = [LearnedImage(name, (h, w)) for name, (h, w) in known["learned"]]
        model.normal_scores = NormalScores(**known["normal_scores"])
        scales = known["scales"]
        model.scales = ImageKinds.from_state(scales) if scales else None
    except (KeyError, TypeError, IndexError, OSError, ValueError) as error:
        message = f"{op}: path must hold a whole model, got {folder / MANIFEST} ({error!r})"
        raise ValueError(message) from error
    model.bank = MemoryBank.load(folder / _BANK)
    num_learned = int(model.bank.ids[:, 0].max()) + 1
    if max(num_learned, model.summary.num_images) > len(model.learned):
        message = (
            f"{op}: path must name all {max(num_learned, model.summary.num_images)} images that were "
            f"learned, got {len(model.learned)} in {folder / _IMAGES}"
        )
        raise ValueError(message)
    if len(model.bank) != model.summary.num_rows:
        message = (
            f"{op}: path must hold a bank of {model.summary.num_rows} rows, got "
            f"{len(model.bank)} in {folder / _BANK}"
        )
        raise ValueError(message)
    return model


def _as_fields(threshold: Threshold | None) -> dict[str, Any] | None:
    return dataclasses.asdict(threshold) if threshold else None


def _as_threshold(fields: dict[str, Any] | None) -> Threshold | None:
    return Threshold(**fields) if fields else None


def _matching_backbone(
    op: str,
    manifest: dict[str, Any],
    backbone: nn.Module | Backbone | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    compile: bool,
) -> Backbone:
    name = str(manifest["backbone"])
    if backbone is None and name.startswith("module:"):
        message = f"{op}: backbone must be given for a model fitted with {name}, got None"
        raise ValueError(message)
    ready = load_backbone(
        name if backbone is None else backbone,
        layers=None if isinstance(backbone, Backbone) else manifest["layers"],
        device=device,
        dtype=dtype,
        compile=compile,
    )
    if list(ready.layers) != manifest["layers"]:
        message = (
            f"{op}: backbone must have the layers {manifest['layers']}, got {list(ready.layers)}"
        )
        raise ValueError(message)
    if ready.fingerprint() != manifest["fingerprint"]:
        message = (
            f"{op}: backbone must have the weights that the model was fitted with, got another "
            f"{ready.name}"
        )
        raise ValueError(message)
    return ready


def _read_manifest(op: str, folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_manifest(op, path, FORMAT_VERSION)
    for field in ("backbone", "layers", "fingerprint"):
        if field not in manifest:
            message = f"{op}: path must hold a whole model, got {path} without {field}"
            raise ValueError(message)
    return manifest
