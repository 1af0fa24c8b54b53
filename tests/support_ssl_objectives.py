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
from pyfeat.ssl.objectives import dreamlip, image_volume, mae
from pyfeat.ssl.objectives.season_contrast import SeasonContrast
from pyfeat.ssl.objectives.sit import SiT
from pyfeat.ssl.parts import Corruption, Masking, Views
from tests.support_ssl import SIDE, run_all, tiny_values

NAMES = [
    "clip",
    "dino",
    "dreamlip",
    "image_volume",
    "mae",
    "moco_v3",
    "season_contrast",
    "simclr",
    "sit",
    "supcon",
    "swav",
]

_RESNET = {"name": "resnet", "width": 4, "blocks": [1, 1]}
_VIT = {"name": "vit", "image_size": SIDE, "patch_size": 2, "width": 8, "depth": 1, "heads": 2}
_SMALL = {"hidden_dim": 16, "out_dim": 8}
_CROPS = {"small_views": 2, "num_prototypes": 8, "frozen_epochs": 1.0}
_CAPTIONS = {"out_dim": 8, "text_width": 8, "text_depth": 1, "text_heads": 2}
_NETWORKS: dict[str, dict[str, Any]] = {
    "image_volume": {**_RESNET, "in_channels": 1},
    "mae": _VIT,
    "season_contrast": {**_RESNET, "norm": "group"},
    "sit": {**_VIT, "width": 16},
}
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip": _CAPTIONS,
    # Weights of patches are cosines over their range, which makes much of a rounding; 2 of that less.
    "dreamlip": {**_CAPTIONS, "sub_captions": 2, "logit_scale": 2.0},
    "image_volume": {
        **_SMALL,
        "dim": 16,
        "layers": 1,
        "heads": 2,
        "head_dim": 8,
        "ffn_dim": 16,
        "dropout": 0.0,
        "slices": SIDE,
        "intra_clusters": [6],
        "inter_clusters": [3, 2],
    },
    "season_contrast": {**_SMALL, "queue_size": 16, "momentum": 0.9},
    # Class tokens of images lie close together at first: few features make much of a rounding.
    "sit": {"hidden_dim": 64, "out_dim": 32},
    "dino": {**_SMALL, **_CROPS, "koleo_weight": 0.1},
    "mae": {"decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2},
    "moco_v3": _SMALL,
    "simclr": _SMALL,
    "supcon": _SMALL,
    "swav": {**_SMALL, **_CROPS, "queue_size": 16, "queue_from": 1.0},
}


def write_other_data(images: Path) -> None:
    """The images one by one, with captions that some share; as dates of places; as volumes."""
    folder = images.parent
    (folder / "volumes").mkdir()
    pixels = np.load(images)
    pairs, dates = [("image", "caption")], [("place", "day", "image")]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
        pairs.append((f"{i}.png", f"caption {i % 13}"))
        pairs.append((f"{i}.png", f"it is number {i}. it is {i % 3} of 3. it is dark"))
        dates += [(f"{i}", f"{45 + 90 * j}", f"{(i + j) % len(pixels)}.png") for j in range(3)]
        np.save(
            folder / "volumes" / f"{i}.npy", image.transpose(0, 2, 1).repeat(3, axis=1)[:, :SIDE]
        )
    for name, rows in (("pairs", pairs), ("dates", dates)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def objective_values(
    name: str, images: Path, out: Path, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A configuration of an objective on 40 images: batches of 8, 4 epochs of 5 steps, no looks."""
    # Steps of SiT in the directions that make much of a rounding must be short for it not to grow.
    optimiser = {"name": "sgd", "lr": 0.0002 if name == "sit" else 0.002}
    values = tiny_values(images, out, optimiser=optimiser, watch={"every": 0})
    values["network"] = _NETWORKS.get(name, _RESNET)
    values["objective"] = {"name": name, **_OBJECTIVES[name]}
    size, folder = values["data"]["size"], images.parent
    if name in ("clip", "dreamlip"):
        captions = "one" if name == "clip" else "all"
        path = str(folder / "pairs.csv")
        values["data"] = {"name": "pairs", "path": path, "size": size, "captions": captions}
    elif name == "season_contrast":
        values["data"] = {"name": "seasons", "path": str(folder / "dates.csv"), "size": size}
    elif name == "image_volume":
        values["data"] = {"name": "volumes", "path": str(folder / "volumes")}
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


def given_dates(self: SeasonContrast, dates: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A query and the keys of each space, as they are but for flips."""
    return dates[:, 0], [dates[:, 1].flip(3), dates[:, 2], dates[:, 0].flip(2)]


def given_corruption(self: SiT, images: Tensor) -> Corruption:
    """Every other row of patches is lost."""
    mask = (torch.arange(SIDE) // 2 % 2 == 0)[:, None].expand(len(images), SIDE, SIDE)
    return Corruption(images * ~mask[:, None], mask)


def given_captions(captions: list[str], count: int, **_: Any) -> list[str]:
    """The first sentences."""
    return [captions[0], *captions[1].split(". ")[:count]]


def give_views(patch: pytest.MonkeyPatch) -> None:
    """Take chance out of this process."""
    patch.setattr(Views, "forward", given_views)
    patch.setattr(mae, "random_masking", given_masking)
    patch.setattr(image_volume, "random_masking", given_masking)
    patch.setattr(SeasonContrast, "views", given_dates)
    patch.setattr(SiT, "corrupt", given_corruption)
    patch.setattr(dreamlip, "draw_captions", given_captions)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Leave out the curves, which take longer than the steps."""
    patch.setattr(MetricsFile, "draw", lambda self: None)


if __name__ == "__main__":
    give_views(pytest.MonkeyPatch())
    draw_nothing(pytest.MonkeyPatch())
    run_all(json.loads(sys.argv[1]))
