"""The rival of EAR: reconstruction by inpainting of random grids, many passes an image."""

import torch
from torch import Tensor

from pyfeat.anomaly.reconstruction import (
    NormalResiduals,
    RebuildOptions,
    residual_maps,
    smooth,
    train_to_rebuild,
)
from pyfeat.anomaly.unet import UNet

SETS = 3  # each pixel is hidden in one of as many passes
CELLS = (2, 4, 8, 16)  # sides in pixels of what is hidden together


class Riad:
    """A U-Net that rebuilds a random third of the cells of a grid from the rest.

    Source: Zavrtanik et al., Reconstruction by inpainting for visual anomaly detection, Pattern
    Recognition 2021; its losses and its residual, the mean over sizes of cells. That is judged by
    the residuals of the images learned from, which is no part of it: as EAR does, for both to have
    the same.
    """

    def __init__(self, *, width: int, levels: int, training: RebuildOptions, window: int) -> None:
        self.network = UNet(width, levels)
        self.training, self.window = training, window
        self.normal: NormalResiduals | None = None

    def fit(self, images: Tensor, seed: int) -> "Riad":
        """Learn from (N, 3, H, W) in [0, 1]."""

        def shown(batch: Tensor, generator: torch.Generator) -> Tensor:
            cell = CELLS[int(torch.randint(len(CELLS), (), generator=generator))]
            return batch * (hidden_sets(batch.shape[2:], cell, generator) != 0)

        train_to_rebuild(self.network, images, shown, self.training, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        parts = torch.split(images, 16)
        self.normal = NormalResiduals.of(self._residuals(part, generator) for part in parts)
        return self

    def maps(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Smoothed residuals (B, H, W), with other grids each time."""
        residuals = self._residuals(images, generator)
        return smooth(residuals if self.normal is None else self.normal(residuals), self.window)

    def _residuals(self, images: Tensor, generator: torch.Generator) -> Tensor:
        residuals = []
        for cell in CELLS:
            sets = hidden_sets(images.shape[2:], cell, generator)
            whole = torch.zeros_like(images)
            for number in range(SETS):
                hidden = sets == number
                with torch.no_grad():
                    rebuilt = self.network(images * ~hidden)
                whole = torch.where(hidden, rebuilt, whole)
            residuals.append(residual_maps(images, whole, "msgms"))
        return torch.stack(residuals).mean(dim=0)

    def scores(self, images: Tensor, seed: int) -> Tensor:
        """Highest residuals (B,); the seed decides the grids."""
        generator = torch.Generator().manual_seed(seed)
        parts = [
            self.maps(images[i : i + 16], generator).flatten(1).amax(dim=1)
            for i in range(0, len(images), 16)
        ]
        return torch.cat(parts)


def hidden_sets(size: torch.Size, cell: int, generator: torch.Generator) -> Tensor:
    """(H, W) int64 in [0, 3): in which pass each pixel is hidden; sets of equal size, at random."""
    rows, columns = (-(-n // cell) for n in size)
    order = torch.randperm(rows * columns, generator=generator)
    sets = (order % SETS).view(rows, columns)
    whole = sets.repeat_interleave(cell, dim=0).repeat_interleave(cell, dim=1)
    return whole[: size[0], : size[1]]
