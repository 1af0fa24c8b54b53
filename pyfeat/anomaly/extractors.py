"""Frozen features of one modality: colours or organised points in, patches out."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyfeat._checks import check_count
from pyfeat.anomaly.geometry import FPFH_DIM, estimate_normals, fpfh, neighbourhoods
from pyfeat.anomaly.patches import Patches, patches_of_maps, patches_of_points
from pyfeat.features import Backbone, load_backbone


@runtime_checkable
class PatchExtractor(Protocol):
    """Anything that describes the patches of a batch by features.

    Attributes:
        name: Shown to people, and compared when a model is loaded.
    """

    name: str

    def __call__(self, values: Tensor) -> Patches | Tensor:
        """Describe patches.

        Args:
            values: (B, 3, H, W) float32: colours in [0, 1], or points, 0 where there is none.

        Returns:
            Patches, or their features (B, N, C) alone for a square grid. Of points, features that are
            all 0 mark a patch without any.
        """

    def fingerprint(self) -> str:
        """A digest of everything that decides the features, as 64 hex digits."""


class BackbonePatches:
    """Patches of the maps of a backbone, of colours.

    Args:
        backbone: As ``pyfeat.features.load_backbone``.
        layers: As there.
        neighbourhood: Side of the square, in cells of a map, over which features are averaged; odd.
        device: As there.
        dtype: As there.

    Raises:
        ValueError: If the neighbourhood is even or not positive, or the backbone is unknown.
    """

    def __init__(
        self,
        backbone: str | nn.Module | Backbone = "efficientnet_lite0",
        *,
        layers: Sequence[str] | None = None,
        neighbourhood: int = 3,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_odd("BackbonePatches", neighbourhood)
        self.backbone = load_backbone(backbone, layers=layers, device=device, dtype=dtype)
        self.neighbourhood = neighbourhood
        self.name = f"backbone {self.backbone.name}"

    def __call__(self, values: Tensor) -> Patches:
        """See ``PatchExtractor``."""
        return patches_of_maps(self.backbone(values), self.neighbourhood)

    def fingerprint(self) -> str:
        """See ``PatchExtractor``."""
        settings = [self.name, list(self.backbone.layers), self.neighbourhood]
        return _digest(settings, self.backbone.fingerprint())

    def settings(self) -> dict[str, Any]:
        """Arguments that make it again, for JSON."""
        return {
            "backbone": self.backbone.name,
            "layers": list(self.backbone.layers),
            "neighbourhood": self.neighbourhood,
        }


class NormalPatches(BackbonePatches):
    """Patches of the maps of a backbone, of surface normals drawn as colours.

    A normal n is the colour ``(n + 1) / 2``; where there is no point it is that of a surface that faces
    the sensor. Patches without a point are 0.

    Args:
        backbone: As ``BackbonePatches``, like the arguments that follow.
        layers: See above.
        neighbourhood: See above.
        neighbours: Points that a normal is estimated from.
        device: See above.
        dtype: See above.
    """

    def __init__(
        self,
        backbone: str | nn.Module | Backbone = "efficientnet_lite0",
        *,
        layers: Sequence[str] | None = None,
        neighbourhood: int = 3,
        neighbours: int = 20,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("NormalPatches", "neighbours", neighbours)
        super().__init__(
            backbone, layers=layers, neighbourhood=neighbourhood, device=device, dtype=dtype
        )
        self.neighbours = neighbours
        self.name = f"normals, {self.name}"

    def __call__(self, values: Tensor) -> Patches:
        """See ``PatchExtractor``."""
        seen = (values != 0).any(dim=1)  # [B, H, W]
        drawn = values.new_zeros(values.shape)
        drawn[:, 2] = -1.0
        for xyz, mask, normals in zip(values, seen, drawn, strict=True):
            points = xyz[:, mask].T.contiguous()
            around = neighbourhoods(points, k=self.neighbours)
            normals[:, mask] = estimate_normals(points, around).T
        patches, grid = super().__call__((drawn + 1) / 2)
        cells = nn.functional.adaptive_max_pool2d(seen[:, None].float(), grid).flatten(1)
        return Patches(patches * cells[:, :, None], grid)

    def fingerprint(self) -> str:
        """See ``PatchExtractor``."""
        return _digest([self.neighbours], super().fingerprint())

    def settings(self) -> dict[str, Any]:
        """Arguments that make it again, for JSON."""
        return super().settings() | {"neighbours": self.neighbours}


class GeometryPatches:
    """Patches of fast point feature histograms: what a surface is like, whatever its pose.

    Histograms of points (see ``pyfeat.anomaly.geometry.fpfh``) are averaged over cells and those around
    them, and scaled to [0, 1]. Patches without a point are 0.

    Args:
        cell: Side of a patch in pixels.
        stride: Of the pixels whose points are taken, one in so many along each axis.
        neighbours: Points that a normal and a histogram are made from.
        radius: Of the neighbourhood, in the unit of the points; None leaves it to the number.
        reach: Cells to each side over which histograms are averaged, at least 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "fpfh"
    dim = FPFH_DIM

    def __init__(
        self,
        *,
        cell: int = 8,
        stride: int = 2,
        neighbours: int = 40,
        radius: float | None = None,
        reach: int = 1,
    ) -> None:
        op = "GeometryPatches"
        for name, value in (("cell", cell), ("stride", stride), ("neighbours", neighbours)):
            check_count(op, name, value)
        if not (radius is None or radius > 0) or reach < 0 or stride > cell:
            message = (
                f"{op}: radius must be positive, reach at least 0 and stride at most cell, got "
                f"{radius}, {reach}, {stride} and {cell}"
            )
            raise ValueError(message)
        self.cell, self.stride, self.neighbours = cell, stride, neighbours
        self.radius, self.reach = radius, reach

    def __call__(self, values: Tensor) -> Patches:
        """See ``PatchExtractor``."""
        height, width = values.shape[-2:]
        grid = (-(-height // self.cell), -(-width // self.cell))
        first = (self.stride - 1) // 2
        taken = values[:, :, first :: self.stride, first :: self.stride]
        return Patches(torch.stack([self._describe(xyz, grid) for xyz in taken]), grid)

    def _describe(self, xyz: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, 33) of points (3, H, W)."""
        seen = (xyz != 0).any(dim=0)  # [H, W]
        points = xyz[:, seen].T.contiguous()  # [P, 3]
        around = neighbourhoods(points, k=self.neighbours, radius=self.radius or math.inf)
        histograms = fpfh(points, estimate_normals(points, around), around)
        spread = xyz.new_zeros((FPFH_DIM, *seen.shape))
        spread[:, seen] = histograms.T / 200.0
        return patches_of_points(spread, seen, grid, self.reach)

    def fingerprint(self) -> str:
        """See ``PatchExtractor``."""
        return _digest([self.name, self.settings()])

    def settings(self) -> dict[str, Any]:
        """Arguments that make it again, for JSON."""
        names = ("cell", "stride", "neighbours", "radius", "reach")
        return {name: getattr(self, name) for name in names}


# Those that a saved model can be made again from, by the names that its manifest has for them.
EXTRACTORS: Mapping[str, type[BackbonePatches] | type[GeometryPatches]] = {
    "backbone": BackbonePatches,
    "normals": NormalPatches,
    "fpfh": GeometryPatches,
}


def as_patches(op: str, extractor: PatchExtractor, values: Tensor) -> Patches:
    """What an extractor makes of a batch (B, 3, H, W), checked.

    Raises:
        ValueError: If it is not (B, N, C) float32, finite, and N the number of cells of the grid.
    """
    found = extractor(values)
    features = found if isinstance(found, Tensor) else found.features
    shape = tuple(features.shape)
    if features.ndim != 3 or shape[0] != len(values) or features.dtype != torch.float32:
        message = (
            f"{op}: features of {extractor.name} must be float32 of shape ({len(values)}, N, C), got "
            f"{features.dtype} of {shape}"
        )
        raise ValueError(message)
    side = round(shape[1] ** 0.5)
    grid = (side, side) if isinstance(found, Tensor) else found.grid
    if grid[0] * grid[1] != shape[1]:
        message = (
            f"{op}: patches of {extractor.name} must fill a grid of {grid[0]} x {grid[1]}, got "
            f"{shape[1]} of them"
        )
        raise ValueError(message)
    if not features.isfinite().all():
        message = f"{op}: features of {extractor.name} must be finite, got NaN or infinity"
        raise ValueError(message)
    return Patches(features, grid)


def _check_odd(op: str, neighbourhood: int) -> None:
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        message = f"{op}: neighbourhood must be odd and positive, got {neighbourhood!r}"
        raise ValueError(message)


def _digest(settings: object, *more: str) -> str:
    return hashlib.sha256(json.dumps([settings, *more]).encode()).hexdigest()
