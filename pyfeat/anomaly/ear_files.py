"""The folder of a saved EAR model: a manifest in JSON, the U-Net, and what the saliency has learned."""

import dataclasses
import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyfeat._storage import load_tensors, read_manifest, save_tensors
from pyfeat.anomaly.excision import Excision
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.reconstruction import NormalResiduals, RebuildOptions
from pyfeat.anomaly.saliency import (
    AttentionSaliency,
    EnergySaliency,
    MemorySaliency,
    Saliency,
)
from pyfeat.anomaly.unet import UNet

if TYPE_CHECKING:
    from pyfeat.anomaly.ear import EAR

FORMAT_VERSION = 2
MANIFEST = "ear.json"
_NETWORK, _NORMAL, _SALIENCY = "network.safetensors", "normal.safetensors", "saliency"

# Constructor arguments of EAR that the manifest keeps as they are.
_SETTINGS = (
    "width",
    "levels",
    "skips",
    "residual",
    "relative",
    "window",
    "weighting",
    "holdout",
    "false_alarm_rate",
    "seed",
)


@dataclass
class EARSummary:
    """What a fit saw and left behind.

    Attributes:
        num_images: Images that were learned from.
        num_held_out: Normal images that were not, for the threshold and the choice of the block.
        losses: Of the steps.
        block_errors: For each block tried by "auto", the squared error of held-out images inside
            the cut over that outside.
        seconds: Wall time by stage.
    """

    num_images: int = 0
    num_held_out: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    block_errors: dict[int, float] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def write_files(model: "EAR", folder: Path) -> None:
    """Write a fitted model into an existing folder."""
    saliency = model.saliency
    (folder / _SALIENCY).mkdir()
    saliency.write_into(folder / _SALIENCY)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "EAR",
        "image_size": list(model.image_size),
        **{name: getattr(model, name) for name in _SETTINGS},
        "chooses_block": model.chooses_block,
        "excision": dataclasses.asdict(model.excision),
        "training": dataclasses.asdict(model.training),
        "saliency": {
            "kind": saliency.kind,
            "fingerprint": saliency.fingerprint(),
            **saliency.settings(),
        },
        "normal": model.normal is not None,
        "threshold": dataclasses.asdict(model.threshold) if model.threshold else None,
        "summary": dataclasses.asdict(model.summary),
    }
    if model.network is not None:
        state = model.network.state_dict()
        save_tensors(folder / _NETWORK, state, kind="EAR", version=FORMAT_VERSION, header={})
    if model.normal is not None:
        state = {"mean": model.normal.mean, "spread": model.normal.spread}
        save_tensors(folder / _NORMAL, state, kind="EAR", version=FORMAT_VERSION, header={})
    # Arguments may have been NumPy scalars, which JSON does not know.
    text = json.dumps(manifest, indent=2, default=operator.methodcaller("item"))
    (folder / MANIFEST).write_text(text + "\n")


def read_files(
    factory: "type[EAR]",
    folder: Path,
    *,
    saliency: Any,
    batch_size: int,
    device: str | torch.device | None,
) -> "EAR":
    """Read what ``write_files`` wrote; arguments and errors as ``EAR.load``."""
    op = "EAR.load"
    path = folder / MANIFEST
    # Version 1 judged residuals as they are.
    manifest = {"relative": False, "normal": False} | read_manifest(op, path, FORMAT_VERSION)
    try:
        source = _read_saliency(op, folder / _SALIENCY, dict(manifest["saliency"]), saliency)
        model = factory(
            source,
            image_size=tuple(manifest["image_size"]),
            excision=Excision(**manifest["excision"]),
            training=RebuildOptions(**manifest["training"]),
            batch_size=batch_size,
            device=device,
            **{name: manifest[name] for name in _SETTINGS},
        )
        model.chooses_block = bool(manifest["chooses_block"])
        threshold = manifest["threshold"]
        model.threshold = Threshold(**threshold) if threshold else None
        model.summary = _read_summary(manifest["summary"])
        network = UNet(model.width, model.levels)
        tensors, _ = load_tensors(folder / _NETWORK, kind="EAR", version=FORMAT_VERSION)
        network.load_state_dict(tensors)
        if manifest["normal"]:
            tensors, _ = load_tensors(folder / _NORMAL, kind="EAR", version=FORMAT_VERSION)
            shape = model.image_size
            mean, spread = (tensors[name].view(shape) for name in ("mean", "spread"))
            model.normal = NormalResiduals(mean, spread)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        message = f"{op}: path must hold a whole model, got {path} ({error!r})"
        raise ValueError(message) from error
    model.network = network.to(model.device).eval()
    return model


def _read_summary(fields: dict[str, Any]) -> EARSummary:
    summary = EARSummary(**fields)
    summary.block_errors = {int(block): ratio for block, ratio in summary.block_errors.items()}
    return summary


def _read_saliency(op: str, folder: Path, noted: dict[str, Any], given: Any) -> Saliency:
    """The source of saliency that the manifest describes, or the one that is given."""
    kind, fingerprint = noted.pop("kind"), noted.pop("fingerprint")
    unnamed = kind == "" or (noted.get("backbone") or noted.get("network")) is None
    if given is None and unnamed:
        message = f"{op}: saliency must be given for a model with one of your own, got None"
        raise ValueError(message)
    source: Saliency
    if kind == "memory" and not isinstance(given, MemorySaliency):
        source = MemorySaliency.read_from(folder, given)
    elif isinstance(given, Saliency):
        source = given
    elif kind == "energy":
        backbone = noted["backbone"] if given is None else given
        layers = noted["layers"] if isinstance(backbone, str | torch.nn.Module) else None
        source = EnergySaliency(backbone, layers=layers)
    elif kind == "attention":
        network = noted["network"] if given is None else given
        source = AttentionSaliency(network, heads=noted["heads"])
    else:
        message = f"{op}: saliency must be a Saliency, got {type(given).__name__}"
        raise ValueError(message)
    if source.kind != kind or source.fingerprint() != fingerprint:
        message = (
            f"{op}: saliency must be the one that the model was fitted with, {kind or 'your own'} of "
            f"the same weights, got {type(source).__name__} of others"
        )
        raise ValueError(message)
    return source
