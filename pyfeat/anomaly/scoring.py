"""From distances between patches to image scores and pixel maps: the published definitions.

"PatchCore" names at least four incompatible scores; each is here under the name of its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat.memory import MemoryBank

ScoringName = Literal["paper", "official", "anomalib", "m3dm", "anomalydino"]


@dataclass(frozen=True)
class Scoring:
    """One published definition of image score and pixel map.

    Attributes:
        source: Where it is defined.
        unit_length: Features are scaled to unit length before they are stored and compared.
        exponent: Patch score is distance ** exponent * factor.
        factor: See ``exponent``.
        top_fraction: Image score is the mean over this fraction of the patches with the highest
            scores, at least one; 0 takes the highest alone.
        neighbours: Rows near the nearest one that re-weight the image score; 0 leaves it as it is.
        counts_nearest: Whether the nearest row itself is among those neighbours.
        scales_exponent: Distances are divided by sqrt(D) inside the exponential.
        upsampling: How patch scores become pixels.
        sigma: Of the Gaussian that smooths the pixel map, in pixels of the model's input.
        unit: What the scores measure.
    """

    source: str
    unit_length: bool = False
    exponent: int = 1
    factor: float = 1.0
    top_fraction: float = 0.0
    neighbours: int = 0
    counts_nearest: bool = True
    scales_exponent: bool = False
    upsampling: Literal["bilinear", "nearest"] = "bilinear"
    sigma: float = 4.0
    unit: str = "distance to the nearest normal patch"

    def patch_scores(self, distances: Tensor) -> Tensor:
        """Scores of patches from their euclidean distances to the nearest row; any shape."""
        return distances**self.exponent * self.factor

    def judge(
        self, patches: Tensor, bank: MemoryBank, grid: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Scores (B,) and pixel maps (B, H, W) of images.

        Args:
            patches: (B, P, D) features of a grid of patches, row by row.
            bank: The memory to search them in.
            grid: Rows and columns of the patches.
            size: H and W.
        """
        found = bank.search(patches.flatten(0, 1))
        distances = found.distances.view(len(patches), -1)  # [B, P]
        indices = found.indices.view(len(patches), -1)
        scores = self.image_scores(distances, indices, patches, bank)
        return scores, self.pixel_maps(self.patch_scores(distances).view(-1, *grid), size)

    def image_scores(
        self, distances: Tensor, indices: Tensor, patches: Tensor, bank: MemoryBank
    ) -> Tensor:
        """Scores (B,) of images.

        Args:
            distances: (B, P) euclidean distances of the patches to their nearest rows.
            indices: (B, P) int64, those rows.
            patches: (B, P, D) features.
            bank: The memory they were searched in.
        """
        scores = self.patch_scores(distances)
        if self.top_fraction:
            count = max(1, int(scores.shape[1] * self.top_fraction))
            return scores.topk(count, dim=1).values.mean(dim=1)
        if not self.neighbours:
            return scores.amax(dim=1)
        worst = scores.argmax(dim=1)  # [B]
        images = torch.arange(len(worst), device=worst.device)
        weights = self._weights(indices[images, worst], patches[images, worst], bank)
        return scores[images, worst] * weights.to(scores)

    def _weights(self, rows: Tensor, patches: Tensor, bank: MemoryBank) -> Tensor:
        """(B,): w = 1 - exp(d*) / sum of exp(d(patch, m)) over the neighbours m of the nearest row.

        In the published form the exponentials overflow; dividing both by exp(d*) does not. In
        float64, because a rounding error of the distances is a relative one of the exponentials.
        """
        count = min(self.neighbours, len(bank))
        nearby = bank.search(bank.features[rows], count).indices  # [B, b], the row itself first
        if not self.counts_nearest and count > 1:
            nearby = nearby[:, 1:]
        compared = torch.cat([rows[:, None], nearby], dim=1)  # [B, 1 + b]
        to_rows = (patches[:, None].double() - bank.features[compared]).norm(dim=-1)
        excess = to_rows[:, 1:] - to_rows[:, :1]
        if self.scales_exponent:
            excess = excess / patches.shape[-1] ** 0.5
        weights: Tensor = 1.0 - 1.0 / excess.exp().sum(dim=1)
        return weights

    def pixel_maps(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Smooth pixel maps (B, H, W) from patch scores (B, h, w)."""
        up = [
            _to_pixels(patches, pixels, self.upsampling, self.sigma).to(scores)
            for patches, pixels in zip(scores.shape[1:], size, strict=True)
        ]
        return up[0] @ scores @ up[1].T


# Formulas and constants: Roth et al., arXiv:2106.08265, section 3.3, and the code of the projects.
SCORINGS: Mapping[ScoringName, Scoring] = {
    "paper": Scoring(
        source="Roth et al., PatchCore, CVPR 2022, arXiv:2106.08265, equations 6 and 7",
        neighbours=9,
    ),
    "official": Scoring(
        source="amazon-science/patchcore-inspection",
        exponent=2,
        unit="squared distance to the nearest normal patch",
    ),
    "anomalib": Scoring(
        source="open-edge-platform/anomalib 2.6",
        neighbours=9,
        upsampling="nearest",
    ),
    "m3dm": Scoring(
        source="Wang et al., M3DM, CVPR 2023",
        neighbours=3,
        counts_nearest=False,
        scales_exponent=True,
    ),
    "anomalydino": Scoring(
        source="Damm et al., AnomalyDINO, WACV 2025",
        unit_length=True,
        exponent=2,
        factor=0.5,
        top_fraction=0.01,
        unit="cosine distance to the nearest normal patch",
    ),
}


@lru_cache(maxsize=16)
def _to_pixels(patches: int, pixels: int, upsampling: str, sigma: float) -> Tensor:
    """(pixels, patches) matrix: interpolation along one axis, then the Gaussian along it.

    Both are linear and separable, so one small matrix for each axis does them exactly.
    """
    identity = torch.eye(patches)[None]  # [1, patches, patches], one channel for each patch
    if upsampling == "bilinear":
        up = functional.interpolate(identity, size=pixels, mode="linear", align_corners=False)
    else:
        up = functional.interpolate(identity, size=pixels, mode="nearest")
    # Mirrored at the borders, and cut off at 4 sigma, as scipy.ndimage.gaussian_filter does.
    radius = int(4.0 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    at = (torch.arange(pixels)[:, None] + offsets) % (2 * pixels)  # [pixels, taps]
    at = torch.where(at < pixels, at, 2 * pixels - 1 - at)
    blur = torch.zeros(pixels, pixels).scatter_add_(1, at, kernel.expand(pixels, -1))
    return blur @ up[0].T
