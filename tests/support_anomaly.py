"""Images with a planted defect and small backbones, shared by the tests of PatchCore."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.anomaly.patchcore import PatchCore

Images = npt.NDArray[np.uint8]
CELL = 8  # pixels of a side of a patch of Means


class Means:
    """A Backbone whose only map is the mean colour of cells: exact, whatever the batch."""

    name = "means"
    layers = ("rgb",)

    def __call__(self, images: Tensor) -> list[Tensor]:
        return [functional.avg_pool2d(images, CELL)]

    def fingerprint(self) -> str:
        return "0" * 64


class Poisoned(Means):
    """NaN for images whose first pixel is black."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        (cells,) = super().__call__(images)
        cells[images[:, 0, 0, 0] == 0, :, 3, 5] = float("nan")
        return [cells]


def network(seed: int = 0) -> nn.Module:
    """Two stages, of stride 4 and 8, with fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )


LAYERS = ("1", "3")


def model(backbone: Any = None, **options: Any) -> PatchCore:
    """PatchCore on small images, with ``network`` if no backbone is given."""
    if backbone is None:
        backbone, options["layers"] = network(), LAYERS
    return PatchCore(backbone, **{"image_size": 64, **options})


def plates(count: int, seed: int, size: tuple[int, int] = (64, 64)) -> Images:
    """(count, H, W, 3) uint8: grey plates with grain, each of a brightness of its own."""
    random = np.random.default_rng(seed)
    grain = random.normal(0, 10, (count, *size, 1)) + random.normal(0, 3, (count, *size, 3))
    light = random.uniform(110, 140, (count, 1, 1, 1))
    return (grain + light).clip(0, 255).astype(np.uint8)


def scratched(images: Images, rows: slice, columns: slice) -> Images:
    """The same plates with a dark square on each."""
    images = images.copy()
    images[:, rows, columns] //= 3
    return images
