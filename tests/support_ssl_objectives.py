"""Runs of every objective that take no second; also run as ``python -m``, with views that are given."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pyfeat.ssl.metrics import MetricsFile
from pyfeat.ssl.objectives import mae
from pyfeat.ssl.parts import Masking, Views
from tests.support_ssl import SIDE, run_all, tiny_values

NAMES = ["clip", "dino", "mae", "moco_v3", "simclr", "supcon", "swav"]

_RESNET = {"name": "resnet", "width": 4, "blocks": [1, 1]}
_VIT = {"name": "vit", "image_size": SIDE, "patch_size": 2, "width": 8, "depth": 1, "heads": 2}
_SMALL = {"hidden_dim": 16, "out_dim": 8}
_CROPS = {"small_views": 2, "num_prototypes": 8, "frozen_epochs": 1.0}
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": {"out_dim": 8, "text_width": 8, "text_depth": 1, "text_heads": 2},
    "dino": {**_SMALL, **_CROPS, "koleo_weight": 0.1},
    "mae": {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2},
    "moco_v3": _SMALL,
    "simclr": _SMALL,
    "supcon": _SMALL,
    "swav": {**_SMALL, **_CROPS, "queue_size": 16, "queue_from": 1.0},
}


def write_pairs(images: Path) -> Path:
    """The images one by one, with captions that some share."""
    table = images.with_name("pairs.csv")
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i, pixels in enumerate(np.load(images)):
            Image.fromarray(pixels).save(images.with_name(f"{i}.png"))
            writer.writerow([f"{i}.png", f"caption {i % 13}"])
    return table


def objective_values(
    name: str, images: Path, out: Path, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A configuration of an objective on 40 images: batches of 8, 4 epochs of 5 steps, no looks."""
    values = tiny_values(images, out, optimiser={"name": "sgd", "lr": 0.002}, watch={"every": 0})
    values["network"] = _VIT if name == "mae" else _RESNET
    values["objective"] = {"name": name, **_OBJECTIVES[name]}
    if name == "clip":
        size = values["data"]["size"]
        values["data"] = {"name": "pairs", "path": str(images.with_name("pairs.csv")), "size": size}
    for section, changed in sections.items():
        values[section] = {**values[section], **changed}
    return values


def given_views(self: Views, samples: Tensor) -> list[Tensor]:
    """Views that a sample has in whatever process it is."""
    views = []
    for i, count in enumerate(self.counts):
        for j in range(count):
            view = samples.roll(i + 2 * j, dims=3).flip(2 + j % 2)
            small = i and self.counts[0] == 2  # of a multi-crop
            views.append(functional.avg_pool2d(view, 2) if small else view)
    return views


def given_masking(batch: int, num_patches: int, ratio: float, **_: Any) -> Masking:
    """Every other patch is seen."""
    patches = torch.arange(num_patches).expand(batch, -1)
    return Masking(patches[:, ::2], patches[:, 1::2])


def give_views(patch: pytest.MonkeyPatch) -> None:
    """Take chance out of this process."""
    patch.setattr(Views, "forward", given_views)
    patch.setattr(mae, "random_masking", given_masking)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave out the curves, which take longer than the steps."""
    patch.setattr(MetricsFile, "draw", lambda self: None)


if __name__ == "__main__":
    give_views(pytest.MonkeyPatch())
    draw_nothing(pytest.MonkeyPatch())
    run_all(json.loads(sys.argv[1]))
