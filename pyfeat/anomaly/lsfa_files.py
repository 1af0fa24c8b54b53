"""The folder of a saved LSFA model: a manifest in JSON, banks, adaptors and memories in safetensors."""

import dataclasses
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyfeat._storage import load_tensors, read_manifest, save_tensors
from pyfeat.anomaly.adaptation import AdaptorSet
from pyfeat.anomaly.adaptors import Adaptation
from pyfeat.anomaly.category_banks import CategoryBanks
from pyfeat.anomaly.class_memories import ClassMemories
from pyfeat.anomaly.extractors import EXTRACTORS, PatchExtractor
from pyfeat.memory import MemoryBank

if TYPE_CHECKING:
    from pyfeat.anomaly.lsfa import LSFA

FORMAT_VERSION = 1
MANIFEST = "lsfa.json"
_ADAPTORS = "adaptors.safetensors"
_KIND = "LSFA adaptors"

# Constructor arguments that the manifest keeps as they are.
_SETTINGS = (
    "coreset_ratio",
    "candidates",
    "projection",
    "scoring",
    "fusion",
    "weights",
    "false_alarm_rate",
    "seed",
)


def write_files(model: "LSFA", folder: Path) -> None:
    """Write a fitted model into an existing folder."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": "LSFA",
        "extractors": {m: _described(e) for m, e in model.extractors.items()},
        "adaptation": dataclasses.asdict(model.adaptation) if model.adaptation else None,
        "image_size": list(model.image_size),
        **{name: getattr(model, name) for name in _SETTINGS},
        "grid": list(model.grid),
        "num_seen": model.num_seen,
        "seconds": model.seconds,
        "categories": {c: banks.state() for c, banks in model.banks.items()},
        "memories": list(model.memories),
        "adaptors": None,
    }
    if model.adaptors is not None:
        manifest["adaptors"] = model.adaptors.dims
        weights = model.adaptors.state_dict()
        save_tensors(folder / _ADAPTORS, weights, kind=_KIND, version=FORMAT_VERSION, header=None)
    for number, banks in enumerate(model.banks.values()):
        for modality, bank in banks.banks.items():
            bank.save(_bank_path(folder, number, modality))
    for number, memories in enumerate(model.memories.values()):
        memories.save(_memories_path(folder, number))
    # Arguments may have been NumPy scalars, which JSON does not know.
    text = json.dumps(manifest, indent=2, default=operator.methodcaller("item"))
    (folder / MANIFEST).write_text(text + "\n")


def read_files(
    factory: "type[LSFA]",
    folder: Path,
    *,
    given: Mapping[str, PatchExtractor | None],
    batch_size: int,
) -> "LSFA":
    """Read what ``write_files`` wrote; arguments and errors as ``LSFA.load``."""
    op = "LSFA.load"
    path = folder / MANIFEST
    manifest = read_manifest(op, path, FORMAT_VERSION)
    try:
        extractors = {
            modality: _made_again(op, modality, told, given.get(modality))
            for modality, told in manifest["extractors"].items()
        }
        told = manifest["adaptation"]
        model = factory(
            extractors.get("rgb"),
            extractors.get("xyz"),
            adaptation=None if told is None else Adaptation(**told),
            image_size=tuple(manifest["image_size"]),
            batch_size=batch_size,
            **{name: manifest[name] for name in _SETTINGS},
        )
        model.grid = (manifest["grid"][0], manifest["grid"][1])
        model.num_seen, model.seconds = int(manifest["num_seen"]), dict(manifest["seconds"])
        if manifest["adaptors"] is not None and model.adaptation is not None:
            model.adaptors = _adaptors(folder, manifest["adaptors"], model.adaptation.heads)
        for number, name in enumerate(manifest["memories"]):
            model.memories[name] = ClassMemories.load(_memories_path(folder, number))
        for number, (category, state) in enumerate(manifest["categories"].items()):
            banks = {m: MemoryBank.load(_bank_path(folder, number, m)) for m in extractors}
            model.banks[category] = CategoryBanks.from_state(state, banks)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        message = f"{op}: path must hold a whole model, got {path} ({error!r})"
        raise ValueError(message) from error
    return model


def _described(extractor: PatchExtractor) -> dict[str, Any]:
    kinds = [kind for kind, made in EXTRACTORS.items() if type(extractor) is made]
    # A module of the user's own is not found again by its name.
    settings = extractor.settings() if kinds else None  # type: ignore[attr-defined]
    if settings and str(settings.get("backbone", "")).startswith("module:"):
        settings = None
    return {
        "name": extractor.name,
        "kind": kinds[0] if kinds and settings is not None else None,
        "settings": settings,
        "fingerprint": extractor.fingerprint(),
    }


def _made_again(
    op: str, modality: str, told: dict[str, Any], given: PatchExtractor | None
) -> PatchExtractor:
    name, kind = told["name"], told["kind"]
    if given is None and kind is None:
        message = f"{op}: {modality} must be given for a model fitted with {name}, got None"
        raise ValueError(message)
    extractor: PatchExtractor = given or EXTRACTORS[kind](**told["settings"])
    if extractor.fingerprint() != told["fingerprint"]:
        message = (
            f"{op}: {modality} must give the features that the model was fitted with ({name}), got "
            f"another {extractor.name}"
        )
        raise ValueError(message)
    return extractor


def _adaptors(folder: Path, dims: dict[str, int], heads: int) -> AdaptorSet:
    adaptors = AdaptorSet({m: (torch.zeros(dim), 1.0) for m, dim in dims.items()}, heads)
    weights, _ = load_tensors(folder / _ADAPTORS, kind=_KIND, version=FORMAT_VERSION)
    try:
        adaptors.load_state_dict(weights)
    except RuntimeError as error:
        message = f"LSFA.load: path must hold a whole model, got other adaptors ({error})"
        raise ValueError(message) from error
    return adaptors.eval()


def _bank_path(folder: Path, number: int, modality: str) -> Path:
    return folder / f"bank-{number}-{modality}.safetensors"


def _memories_path(folder: Path, number: int) -> Path:
    return folder / f"memories-{number}.safetensors"
