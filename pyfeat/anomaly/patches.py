"""Patches of maps: features averaged over neighbourhoods, on one grid; what they are called."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Patches(NamedTuple):
    """Features of the cells of a grid, for a batch."""

    features: Tensor  # (B, N, C) float32, N = h w, row by row
    grid: tuple[int, int]  # (h, w)


def patches_of_maps(maps: Sequence[Tensor], neighbourhood: int) -> Patches:
    """Average every map over a square of cells, and put all on the grid of the first.

    Args:
        maps: (B, C_i, h_i, w_i) each.
        neighbourhood: Side of the square in cells of a map; odd.

    Returns:
        Patches on the CPU with the channels of all maps, in their order.
    """
    side = neighbourhood
    pooled = [functional.avg_pool2d(m, side, stride=1, padding=side // 2) for m in maps]
    grid = (pooled[0].shape[2], pooled[0].shape[3])
    pooled = [
        m
        if m.shape[2:] == pooled[0].shape[2:]
        else functional.interpolate(m, size=grid, mode="bilinear", align_corners=False)
        for m in pooled
    ]
    patches = torch.cat(pooled, dim=1).flatten(2).transpose(1, 2).float().cpu()
    return Patches(patches.contiguous(), grid)


def patches_of_points(values: Tensor, seen: Tensor, grid: tuple[int, int], reach: int) -> Tensor:
    """Average what points have over the cells of a grid and those around them.

    Args:
        values: (C, H, W) float, 0 where there is no point.
        seen: (H, W) bool: where there is one.
        grid: (h, w).
        reach: Cells to each side, at least 0.

    Returns:
        (h w, C): 0 for a cell without a point of its own.
    """
    side = 2 * reach + 1
    weighted = torch.cat([values * seen, seen[None].to(values)])  # [C + 1, H, W]
    cells = functional.adaptive_avg_pool2d(weighted, grid)
    # Sums over points up to a factor, which the division takes out: nothing is padded but zeros.
    spread = functional.avg_pool2d(cells, side, stride=1, padding=reach)
    own = cells[-1] > 0
    mean = spread[:-1] / spread[-1].where(own, 1.0)
    return (mean * own).flatten(1).T.contiguous()


def patch_ids(first_image: int, num_images: int, grid: tuple[int, int]) -> Tensor:
    """(B h w, 3) int64: image, row and column of every patch."""
    axes = [torch.arange(first_image, first_image + num_images), *map(torch.arange, grid)]
    return torch.cartesian_prod(*axes)


def check_patches(op: str, names: Sequence[str], patches: Tensor) -> None:
    """Refuse NaN and infinity in the patches (B, P, D) of images, by the name of the first one."""
    finite = torch.isfinite(patches).flatten(1).all(dim=1)
    if not finite.all():
        name = names[int(finite.int().argmin())]
        message = f"{op}: backbone must give finite features, got NaN or infinity for {name}"
        raise ValueError(message)


class Moments:
    """Mean and spread of rows that come in parts.

    Args:
        dim: Features of a row.
    """

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._total, self._squares = torch.zeros(2, dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, D)."""
        rows = rows.double()
        self._count += len(rows)
        self._total += rows.sum(dim=0)
        self._squares += rows.square().sum(dim=0)

    def centre(self) -> Tensor:
        """(D,) float32: the mean; at least one row was taken in."""
        mean: Tensor = self._total / self._count
        return mean.float()

    def spread(self) -> float:
        """Root mean square of the features less the mean; 1 where all rows are equal."""
        mean_squares = self._squares / self._count
        variance = float((mean_squares - (self._total / self._count).square()).mean())
        rounding = 1e-12 * float(mean_squares.mean())
        return variance**0.5 if variance > rounding else 1.0
