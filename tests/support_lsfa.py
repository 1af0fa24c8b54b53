"""Cheap extractors and small models of LSFA, shared by its tests."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat.anomaly import LSFA, Dataset, Sample, synthesise
from pyfeat.anomaly.adaptors import Adaptation
from pyfeat.anomaly.patches import Patches

SIZE, CELL = 32, 4
GRID = (SIZE // CELL, SIZE // CELL)


class Cells:
    """Mean and spread of what pixels of a cell have; 0 for cells without any."""

    def __init__(self, name: str = "cells", cell: int = CELL) -> None:
        self.name, self.cell = name, cell

    def __call__(self, values: Tensor) -> Patches:
        seen = (values != 0).any(dim=1, keepdim=True).float()
        share = functional.avg_pool2d(seen, self.cell)
        mean = functional.avg_pool2d(values, self.cell) / share.clamp_min(1e-6)
        square = functional.avg_pool2d(values.square(), self.cell) / share.clamp_min(1e-6)
        spread = (square - mean.square()).clamp_min(0).sqrt()
        level = mean - mean.mean(dim=(2, 3), keepdim=True)
        features = torch.cat([level, spread], dim=1) * (share > 0)
        return Patches(features.flatten(2).transpose(1, 2).contiguous(), share.shape[2:])  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        return f"{self.name} {self.cell}"


QUICK = Adaptation(epochs=2, batch_size=4, projection=8, start_step=1, start_fill=0.3, heads=3)


def plates(**options: Any) -> Dataset:
    counts = {"train": 8, "good": 3, "defective": 3, "severity": 2.0}
    return synthesise(**{"size": SIZE, **counts, **options})


def loaded(dataset: Dataset) -> list[Sample]:
    return [record.load() for record in dataset]


def model(**options: Any) -> LSFA:
    given = {"rgb": Cells(), "xyz": Cells(), "image_size": SIZE, "adaptation": QUICK}
    return LSFA(**{**given, "coreset_ratio": 0.5, **options})
