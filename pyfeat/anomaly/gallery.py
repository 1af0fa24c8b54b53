"""Which pictures a report shows, kept in bounded memory, and the one colour scale they share."""

import heapq
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pyfeat._extras import require
from pyfeat.anomaly.regions import Box, Region

_MAP_SIDE = 64  # a finer map would not show at thumbnail size
_COOLEST = 0.15  # the darkest blues of the colour map are lost on dark pictures
_MAX_OPACITY = 0.8  # the picture stays recognisable under the hottest colour
_JPEG_QUALITY = 80
_MAX_BOXES = 20  # drawn on a picture; more hide it


@dataclass(frozen=True, eq=False)
class Entry:
    """One picture that a report may show.

    Attributes:
        order: Position among all images added, from 0.
        name: Name of the image, unescaped.
        score: Anomaly score; higher is more anomalous.
        label: True for defective, False for good, None when unknown.
        jpeg: Thumbnail in colour, JPEG.
        size: Width and height of the thumbnail in pixels.
        heat_map: (h, w) float32, 1 <= h, w <= 64, in the unit of the scorer.
        height: Thumbnail of the heights, JPEG; None without a depth sensor.
        mask: Thumbnail of the true defects, JPEG, white on black; None if nobody knows.
        regions: What stands out in the heat map, the hottest first.
        shape: Height and width that boxes of regions are in.
    """

    order: int
    name: str
    score: float
    label: bool | None
    jpeg: bytes
    size: tuple[int, int]
    heat_map: NDArray[np.float32]
    height: bytes | None = None
    mask: bytes | None = None
    regions: tuple[Region, ...] = ()
    shape: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class HeatScale:
    """The colours of every heat map of a page: one value, one colour, in all pictures.

    Attributes:
        low: Value of a typical normal patch, drawn transparent; so is everything below it.
        high: Value drawn in the hottest colour; so is everything above it. ``high >= low``.
    """

    low: float
    high: float

    def colours(self, values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return (..., 4) RGBA in [0, 1] for ``values`` (...); the opacity grows with the value.

        A scale with ``low == high`` has nothing to tell apart and draws everything transparent.
        """
        span = self.high - self.low
        heat = np.zeros(values.shape)
        if span > 0:
            heat = np.clip((values.astype(np.float64) - self.low) / span, 0.0, 1.0)
        colormap = require("matplotlib", extra="anomaly", op="HeatScale").colormaps["plasma"]
        rgba: NDArray[np.float64] = np.array(
            colormap(_COOLEST + (1 - _COOLEST) * heat), dtype=np.float64
        )
        rgba[..., 3] = _MAX_OPACITY * heat
        return rgba


class Gallery:
    """Collects the scores of all images and the pictures of the few that a report shows.

    Four groups are kept: the highest scores, the lowest, the defective images with the lowest
    and the good images with the highest. Among equal scores the image added first is kept.

    Args:
        most: Pictures kept of the highest scores, >= 0.
        least: Pictures kept of the lowest scores, >= 0.
        wrong: Pictures kept of each kind of wrongly ranked image, >= 0; needs labels.
        thumbnail: Longest side of a kept picture in pixels, >= 1. Smaller ones keep their size.

    Raises:
        ValueError: If a number is out of range.

    Memory: at most ``most + least + 2 * wrong`` pictures of about 30 kB, whatever the number of
        images; of every image its name, score and label.
    """

    def __init__(
        self, *, most: int = 24, least: int = 12, wrong: int = 12, thumbnail: int = 300
    ) -> None:
        for argument, value in (("most", most), ("least", least), ("wrong", wrong)):
            if value < 0:
                message = f"Gallery: {argument} must be >= 0, got {value}"
                raise ValueError(message)
        if thumbnail < 1:
            message = f"Gallery: thumbnail must be >= 1, got {thumbnail}"
            raise ValueError(message)
        self.thumbnail = thumbnail
        self.names: list[str] = []
        self.scores: list[float] = []
        self.labels: list[bool] = []  # empty when the images have no labels
        self._most = _Best(most, sign=1)
        self._least = _Best(least, sign=-1)
        self._missed = _Best(wrong, sign=-1)
        self._alarms = _Best(wrong, sign=1)

    def __len__(self) -> int:
        """Return the number of images added."""
        return len(self.scores)

    @property
    def most(self) -> list[Entry]:
        """Entries with the highest scores, highest first."""
        return self._most.entries()

    @property
    def least(self) -> list[Entry]:
        """Entries with the lowest scores, lowest first."""
        return self._least.entries()

    @property
    def missed(self) -> list[Entry]:
        """Defective entries with the lowest scores, lowest first."""
        return self._missed.entries()

    @property
    def alarms(self) -> list[Entry]:
        """Good entries with the highest scores, highest first."""
        return self._alarms.entries()

    def add(
        self,
        name: str,
        score: float,
        image: Tensor,
        heat_map: Tensor,
        label: bool | None = None,
        shape: tuple[int, int] | None = None,
        *,
        height: Tensor | None = None,
        mask: Tensor | None = None,
        regions: Sequence[Region] = (),
    ) -> None:
        """Record a scored image; its picture is kept only if a group wants it.

        Args:
            name: What the report calls the image, such as its path.
            score: Anomaly score, finite; higher is more anomalous.
            image: (3, H, W) floating point RGB in [0, 1], any device; values outside are clipped.
            heat_map: (h, w) floating point, finite, covering the whole image; any size. Above
                64x64 it is reduced by maxima, so that a small hot spot keeps its value.
            label: True for defective, False for good; None, for all images alike, when unknown.
            shape: Height and width, in any unit, that the picture is stretched to fit; None keeps
                those of ``image``.
            height: (H, W) float, finite, of any scale; NaN where there is no point.
            mask: (H, W) bool, True on defects.
            regions: Their boxes, drawn on the heat map, are in pixels of ``shape``.

        Raises:
            ValueError: If a shape, dtype or value is not as above, or only some images have
                labels.
        """
        self._check(score, image, heat_map, label)
        order = len(self.scores)
        self.names.append(name)
        self.scores.append(float(score))
        groups = [self._most, self._least]
        if label is not None:
            self.labels.append(label)
            groups.append(self._missed if label else self._alarms)
        takers = [group for group in groups if group.wants(score)]
        if takers:
            jpeg, size = _thumbnail(image, self.thumbnail, shape)
            entry = Entry(
                order,
                name,
                float(score),
                label,
                jpeg,
                size,
                _reduced(heat_map),
                None if height is None else _picture(_coloured(height), size),
                None if mask is None else _picture(mask.float().expand(3, -1, -1), size),
                tuple(regions),
                shape or (image.shape[1], image.shape[2]),
            )
            for group in takers:
                group.push(entry)

    def scale(self) -> HeatScale:
        """Return the colour scale shared by all pictures.

        ``low`` is the median of the maps with the lowest scores. ``high`` is the largest peak
        of the maps with the highest scores, but at most twice as far from ``low`` as their
        median peak, lest one extreme image leaves all others without colour.

        Returns:
            The scale; ``HeatScale(0, 0)`` when no picture was kept.
        """
        hottest = self.most or self.alarms or self.least or self.missed
        if not hottest:
            return HeatScale(0.0, 0.0)
        coolest = self.least or hottest
        low = float(np.median(np.concatenate([entry.heat_map.ravel() for entry in coolest])))
        peaks = [float(entry.heat_map.max()) for entry in hottest]
        high = max(low, *peaks)
        limit = low + 2 * (float(np.median(peaks)) - low)
        return HeatScale(low, min(high, limit) if limit > low else high)

    def _check(self, score: float, image: Tensor, heat_map: Tensor, label: bool | None) -> None:
        """Refuse what a report could not show, whether or not the picture would be kept."""
        message = ""
        if not math.isfinite(score):
            message = f"score must be finite, got {score}"
        elif image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            message = f"image must have shape (3, H, W), got {tuple(image.shape)}"
        elif not image.is_floating_point():
            message = f"image must be floating point in [0, 1], got {image.dtype}"
        elif heat_map.ndim != 2 or heat_map.numel() == 0:
            message = f"heat_map must have shape (h, w), got {tuple(heat_map.shape)}"
        elif not heat_map.is_floating_point():
            message = f"heat_map must be floating point, got {heat_map.dtype}"
        elif not heat_map.isfinite().all():
            message = "heat_map must be finite, got NaN or infinity"
        elif self.scores and (label is None) == bool(self.labels):
            message = f"label must be given for all images or for none, got {label}"
        if message:
            message = f"Gallery.add: {message}"
            raise ValueError(message)


class _Best:
    """The ``size`` entries with the largest ``sign * score``; ties go to the first come."""

    def __init__(self, size: int, *, sign: int) -> None:
        self._size = size
        self._sign = sign
        # The root is the first to go: the worst score, and of equals the latest. The order is
        # unique, so entries themselves are never compared.
        self._heap: list[tuple[float, int, Entry]] = []

    def wants(self, score: float) -> bool:
        if len(self._heap) < self._size:
            return True
        return self._size > 0 and self._sign * score > self._heap[0][0]

    def push(self, entry: Entry) -> None:
        item = (self._sign * entry.score, -entry.order, entry)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, item)
        else:
            heapq.heapreplace(self._heap, item)

    def entries(self) -> list[Entry]:
        return [entry for _, _, entry in sorted(self._heap, reverse=True)]


def overlay(entry: Entry, scale: HeatScale) -> bytes:
    """Draw the heat map of ``entry`` over its grey picture, and boxes around what stands out.

    Args:
        entry: Picture and map; the map is enlarged bilinearly to the picture.
        scale: Colours, shared by all pictures of a page.

    Returns:
        JPEG of the size of the thumbnail.
    """
    pil = require("PIL.Image", extra="anomaly", op="overlay")
    with pil.open(io.BytesIO(entry.jpeg)) as picture:
        grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255  # [H, W, 1]
    heat = functional.interpolate(
        torch.from_numpy(entry.heat_map)[None, None], size=grey.shape[:2], mode="bilinear"
    )
    rgba = scale.colours(heat[0, 0].numpy())  # [H, W, 4]
    opacity = rgba[..., 3:]
    pixels = _to_uint8((1 - opacity) * grey + opacity * rgba[..., :3])
    for region in entry.regions[:_MAX_BOXES]:
        _draw_box(pixels, region.box, entry.shape)
    return _jpeg(pil.fromarray(pixels))


def _draw_box(pixels: NDArray[np.uint8], box: Box, shape: tuple[int, int]) -> None:
    """Draw a white line, edged in black, around a box of an image of another shape (H, W)."""
    height, width = pixels.shape[:2]
    scales = (height / shape[0], width / shape[1])
    top, bottom = (round(row * scales[0]) for row in (box.top, box.bottom))
    left, right = (round(column * scales[1]) for column in (box.left, box.right))
    for margin, level in ((2, 0), (1, 255)):
        above, before = max(top - margin, 0), max(left - margin, 0)
        below, after = min(bottom + margin, height) - 1, min(right + margin, width) - 1
        pixels[[above, below], before : after + 1] = level
        pixels[above : below + 1, [before, after]] = level


def _thumbnail(
    image: Tensor, side: int, shape: tuple[int, int] | None
) -> tuple[bytes, tuple[int, int]]:
    height, width = shape or (image.shape[1], image.shape[2])
    if shape is None:
        side = min(side, max(height, width))
    longest = max(height, width)
    size = (max(1, round(side * width / longest)), max(1, round(side * height / longest)))
    return _picture(image, size), size


def _picture(image: Tensor, size: tuple[int, int]) -> bytes:
    """JPEG of an image (3, H, W) in [0, 1] at a size (width, height)."""
    pil = require("PIL.Image", extra="anomaly", op="Gallery.add")
    pixels = image.detach().to("cpu", torch.float32).permute(1, 2, 0).nan_to_num().numpy()
    picture = pil.fromarray(_to_uint8(pixels))
    if size != picture.size:
        picture = picture.resize(size, pil.Resampling.LANCZOS)
    return _jpeg(picture)


def _coloured(height: Tensor) -> Tensor:
    """(3, H, W): heights (H, W) from dark to bright, 1 % cut off at either end; grey where NaN."""
    values = height.detach().cpu().numpy().astype(np.float64)
    known = np.isfinite(values)
    levels = np.zeros(values.shape)
    if known.any():
        low, high = np.quantile(values[known], (0.01, 0.99))
        levels[known] = np.clip((values[known] - low) / ((high - low) or 1.0), 0, 1)
    colormap = require("matplotlib", extra="anomaly", op="Gallery.add").colormaps["viridis"]
    rgb = np.where(known[..., None], colormap(levels)[..., :3], 0.5)
    return torch.from_numpy(rgb).permute(2, 0, 1)


def _reduced(heat_map: Tensor) -> NDArray[np.float32]:
    values = heat_map.detach().to("cpu", torch.float32)
    height, width = values.shape
    size = (min(height, _MAP_SIDE), min(width, _MAP_SIDE))
    reduced: NDArray[np.float32] = (
        functional.adaptive_max_pool2d(values[None], size)[0].numpy().copy()
    )
    return reduced


def _to_uint8(pixels: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = np.rint(np.clip(pixels, 0.0, 1.0) * 255).astype(np.uint8)
    return levels


def _jpeg(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return buffer.getvalue()
