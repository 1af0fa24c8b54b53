"""Connected regions of a mask: what is one defect, where it is and how large."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pyfeat._extras import require
from pyfeat.anomaly._values import BoolArray, check


class Box(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of an image, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Region:
    """One connected defect, in pixels of the image before it was resized.

    Attributes:
        box: Smallest box of whole pixels that holds it.
        area: Pixels, not a whole number where the image was resized.
        peak: Highest value of the heat map in it, in the unit of the map.
        centroid: Row and column of its centre; 0 is the centre of the first pixel.
    """

    box: Box
    area: float
    peak: float
    centroid: tuple[float, float]


def find_regions(
    heat_map: Tensor,
    threshold: float,
    *,
    shape: tuple[int, int] | None = None,
    min_area: float = 0.0,
) -> list[Region]:
    """Find the 8-connected regions of a heat map above a threshold, the hottest first.

    Args:
        heat_map: (h, w) floating point, finite.
        threshold: A pixel belongs to a region when its value is greater. Infinity finds nothing.
        shape: Height and width in pixels of the image that the map covers; None takes those of the
            map.
        min_area: Regions of fewer pixels, of ``shape``, are left out.

    Returns:
        Regions by descending peak, equal ones from top to bottom and left to right.

    Raises:
        ValueError: If the map has another shape or is not finite, or the threshold is NaN.
        ImportError: If SciPy is not installed.

    Examples:
        >>> import torch
        >>> heat = torch.tensor([[0.0, 9.0, 0.0], [8.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
        >>> for region in find_regions(heat, 4.0):
        ...     print(region.box, region.area, region.peak)
        Box(top=0, left=0, bottom=2, right=2) 2.0 9.0
        Box(top=2, left=2, bottom=3, right=3) 1.0 5.0
    """
    op = "find_regions"
    values = heat_map.detach().cpu().numpy()
    check(values.ndim == 2, f"{op}: heat_map must have shape (h, w), got {values.shape}")
    check(bool(np.isfinite(values).all()), f"{op}: heat_map must be finite, got NaN or infinity")
    check(not math.isnan(threshold), f"{op}: threshold must be a number, got nan")
    height, width = values.shape if shape is None else shape
    scales = (height / values.shape[0], width / values.shape[1])
    numbers = label_regions(values > threshold, op=op)
    regions = []
    for number, (rows, columns) in enumerate(_slices(numbers), start=1):
        inside = numbers[rows, columns] == number
        at = np.nonzero(inside)
        area = float(at[0].size * scales[0] * scales[1])
        if area < min_area:
            continue
        # The centre of pixel i lies at i + 1/2, in either size.
        centre = [
            (float(axis.mean()) + part.start + 0.5) * scale - 0.5
            for axis, part, scale in zip(at, (rows, columns), scales, strict=True)
        ]
        box = Box(
            math.floor(rows.start * scales[0]),
            math.floor(columns.start * scales[1]),
            math.ceil(rows.stop * scales[0]),
            math.ceil(columns.stop * scales[1]),
        )
        peak = float(values[rows, columns][inside].max())
        regions.append(Region(box, area, peak, (centre[0], centre[1])))
    return sorted(regions, key=lambda region: -region.peak)


def label_regions(mask: BoolArray, *, op: str) -> npt.NDArray[np.int32]:
    """Number the regions of a mask (H, W) from 1: at each pixel its region, 0 outside.

    Regions are 8-connected, as in the official evaluation code of MVTec AD.
    """
    ndimage = require("scipy.ndimage", extra="anomaly", op=op)
    numbers: npt.NDArray[np.int32] = ndimage.label(mask, structure=np.ones((3, 3), np.int32))[0]
    return numbers


def cell_box(cell: tuple[int, int], grid: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The pixels of an image of a shape (H, W) that a cell of a grid (h, w) over it covers."""
    (row, column), (rows, columns), (height, width) = cell, grid, shape
    return Box(
        row * height // rows,
        column * width // columns,
        -(-(row + 1) * height // rows),
        -(-(column + 1) * width // columns),
    )


def _slices(numbers: npt.NDArray[np.int32]) -> list[tuple[slice, slice]]:
    ndimage = require("scipy.ndimage", extra="anomaly", op="find_regions")
    found: list[tuple[slice, slice]] = ndimage.find_objects(numbers)
    return found
