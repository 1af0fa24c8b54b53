"""What scoring gives, whichever model does it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat.anomaly.regions import Box, Region, cell_box, find_regions
from pyfeat.memory import MemoryBank


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """One image as it comes out of the ``stream`` of a model."""

    name: str
    pixels: Tensor  # (3, H, W) float32 in [0, 1], at the size of the model's input
    score: float
    heat_map: Tensor  # (H, W) float32
    shape: tuple[int, int]  # height and width in pixels before it was resized

    def regions(self, threshold: float, *, min_area: float = 0.0) -> list[Region]:
        """Find the connected defects: where the heat map is above a threshold, the hottest first.

        Args:
            threshold: In the unit of the heat map, such as ``map_threshold.value`` of the model.
            min_area: Smaller regions are left out, in pixels of the image before it was resized.

        Raises:
            ValueError: As ``pyfeat.anomaly.regions.find_regions``.
        """
        return find_regions(self.heat_map, threshold, shape=self.shape, min_area=min_area)


class AnomalyScores(NamedTuple):
    """Scores of a set of images, in their order."""

    scores: Tensor  # (B,) float32, higher is more anomalous
    maps: Tensor  # (B, H, W) float32, one value per pixel of the model's input
    names: list[str]  # (B,), the images that were scored

    @classmethod
    def of(cls, results: Iterable[ScoredImage], size: tuple[int, int]) -> "AnomalyScores":
        """Gather what a model streams; ``size`` is that of its maps, should there be none."""
        scores: list[float] = []
        maps: list[Tensor] = []
        names: list[str] = []
        for result in results:
            scores.append(result.score)
            maps.append(result.heat_map)
            names.append(result.name)
        stacked = torch.stack(maps) if maps else torch.empty((0, *size))
        return cls(torch.tensor(scores), stacked, names)


class LearnedImage(NamedTuple):
    """An image that a model has learned from."""

    name: str
    shape: tuple[int, int]  # height and width in pixels before it was resized


class NearestPatch(NamedTuple):
    """The patch in memory that a patch of an image is closest to."""

    image: str  # name of the image that was learned from
    box: Box  # in that image, before it was resized
    distance: float  # euclidean, between features
    asked: Box  # the patch of the image asked about, before it was resized

    @classmethod
    def found(
        cls,
        bank: MemoryBank,
        learned: Sequence[LearnedImage],
        patches: Tensor,
        grid: tuple[int, int],
        shape: tuple[int, int],
        pixel: tuple[int, int],
    ) -> "NearestPatch":
        """Search for the patch at a pixel.

        Args:
            bank: Its ids are image, row and column of a patch.
            learned: The images, by the first of these.
            patches: (P, D) of the image asked about, P = h w.
            grid: (h, w), of every image.
            shape: (H, W) of the image asked about.
            pixel: Row and column in it.
        """
        cell = (pixel[0] * grid[0] // shape[0], pixel[1] * grid[1] // shape[1])
        at = cell[0] * grid[1] + cell[1]
        distance, index = (part[0, 0] for part in bank.search(patches[at : at + 1]))
        number, row, column = bank.ids[index].tolist()
        name, learned_shape = learned[number]
        box = cell_box((row, column), grid, learned_shape)
        return cls(name, box, float(distance), cell_box(cell, grid, shape))
