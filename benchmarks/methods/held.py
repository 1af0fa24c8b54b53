"""Samples that a proof holds in memory, and runs of ``pyfeat train`` on them."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pyfeat.ssl.config import make_config
from pyfeat.ssl.data.source import Sample, Source
from pyfeat.ssl.registry import SOURCES
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit

_HELD: dict[str, "Held"] = {}


@dataclass(frozen=True)
class Held:
    """Images, and captions of each if there are any.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        texts: Of each image its captions, as ``pairs`` reads them.
    """

    images: Tensor
    texts: list[list[str]] | None = None


@dataclass(frozen=True)
class HeldOptions:
    """Options of ``HeldSource``."""

    key: Annotated[str, "Under which samples are held."]
    captions: Annotated[Literal["one", "all"], "As in pairs."] = "one"


@SOURCES.register("held", HeldOptions)
class HeldSource(Source):
    """What ``train`` was given."""

    def __init__(self, options: HeldOptions) -> None:
        self._held, self._captions = _HELD[options.key], options.captions
        self.sample_shape = tuple(self._held.images.shape[1:])

    def __len__(self) -> int:
        return len(self._held.images)

    def read(self, index: int, generator: torch.Generator) -> Sample:
        sample: Sample = {"images": self._held.images[index]}
        if self._held.texts is not None:
            texts = self._held.texts[index]
            drawn = int(torch.randint(len(texts), (), generator=generator))
            sample["texts"] = texts[drawn] if self._captions == "one" else list(texts)
        return sample

    def name(self, index: int) -> str:
        return f"sample {index}"


def train(
    held: Held,
    *,
    network: Mapping[str, Any],
    objective: Mapping[str, Any],
    steps: int,
    batch_size: int,
    seed: int,
    captions: str = "one",
    optimiser: Mapping[str, Any] | None = None,
) -> Any:
    """The objective after about so many steps, whole epochs, in evaluation mode."""
    epochs = max(1, round(steps / (len(held.images) // batch_size)))
    with tempfile.TemporaryDirectory() as folder:
        _HELD[folder] = held
        try:
            values = {
                "out": str(Path(folder) / "run"),
                "data": {"name": "held", "key": folder, "captions": captions},
                "network": dict(network),
                "objective": dict(objective),
                "optimiser": {"warmup_epochs": 0.1 * epochs, **(optimiser or {})},
                "training": {
                    "epochs": epochs,
                    "batch_size": batch_size,
                    "seed": seed,
                    "checkpoint_every": epochs,
                    "progress": False,
                },
                "watch": {"every": 0},
            }
            run: Run = fit(make_config(values))
            return run.objective()
        finally:
            del _HELD[folder]
