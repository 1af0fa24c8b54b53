"""Samples in, patches of all modalities out, one batch at a time."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat.anomaly.extractors import PatchExtractor, as_patches
from pyfeat.anomaly.images import SkippedImage
from pyfeat.anomaly.samples import Record, Sample

Samples = Iterable[Record | Sample]


class SampleBatch(NamedTuple):
    """Samples and their patches."""

    samples: list[Sample]  # (B,)
    features: dict[str, Tensor]  # (B, N, C) float32, by modality
    valid: Tensor  # (B, N) bool: which patches have a point; all do where there is no depth sensor
    grid: tuple[int, int]  # (h, w), N = h w


class SampleFeatures:
    """Loads samples, brings them to one size and describes their patches.

    Colours are resized with antialiasing; of points, the nearest is taken, so that none is invented. A
    sample is skipped, and named in ``skipped``, if its files cannot be read, or no patch has a point.

    Args:
        extractors: By modality, "rgb" and "xyz".
        size: (height, width) in pixels.
        batch_size: Samples per pass through the extractors.
        op: Public function on whose behalf samples are read; opens error messages.
        strict: Raise ValueError at the first sample that would be skipped.
    """

    def __init__(
        self,
        extractors: Mapping[str, PatchExtractor],
        size: tuple[int, int],
        batch_size: int,
        *,
        op: str,
        strict: bool,
    ) -> None:
        self._extractors, self._size, self._batch_size = extractors, size, batch_size
        self._op, self._strict = op, strict
        self.skipped: list[SkippedImage] = []

    def __call__(self, samples: Samples) -> Iterator[SampleBatch]:
        """Yield batches in order.

        Raises:
            TypeError: If an item is neither a record nor a sample.
            ValueError: If a sample lacks a modality, or extractors give patches of other numbers.
        """
        if not isinstance(samples, Iterable):
            message = (
                f"{self._op}: samples must be records or samples, such as a Dataset, got "
                f"{type(samples).__name__}"
            )
            raise TypeError(message)
        usable = filter(None, map(self._load, samples))
        while group := list(islice(usable, self._batch_size)):
            batch = self._describe(group)
            kept = batch.valid.any(dim=1)
            for sample, has_points in zip(group, kept.tolist(), strict=True):
                if not has_points:
                    self._skip(sample.name, "it has no points")
            if kept.any():
                yield SampleBatch(
                    [s for s, has_points in zip(group, kept.tolist(), strict=True) if has_points],
                    {m: rows[kept] for m, rows in batch.features.items()},
                    batch.valid[kept],
                    batch.grid,
                )

    def _load(self, item: object) -> Sample | None:
        if isinstance(item, Sample):
            return item
        if not isinstance(item, Record):
            message = f"{self._op}: samples must hold records or samples, got {type(item).__name__}"
            raise TypeError(message)
        try:
            return item.load()
        except (OSError, ValueError) as error:
            self._skip(item.name, str(error))
            return None

    def _skip(self, name: str, reason: str) -> None:
        if self._strict:
            message = f"{self._op}: samples must all be usable, got {name}: {reason}"
            raise ValueError(message)
        self.skipped.append(SkippedImage(name, reason))

    def _describe(self, samples: list[Sample]) -> SampleBatch:
        features: dict[str, Tensor] = {}
        grids: dict[str, tuple[int, int]] = {}
        for modality, extractor in self._extractors.items():
            values = torch.stack([self._values(sample, modality) for sample in samples])
            features[modality], grids[modality] = as_patches(self._op, extractor, values)
        if len(set(grids.values())) > 1:
            shown = " and ".join(f"{h} x {w} of {m}" for m, (h, w) in grids.items())
            message = f"{self._op}: extractors must give patches of one grid, got {shown}"
            raise ValueError(message)
        grid = next(iter(grids.values()))
        valid = torch.ones(len(samples), grid[0] * grid[1], dtype=torch.bool)
        if "xyz" in features:
            valid = (features["xyz"] != 0).any(dim=2)
        return SampleBatch(samples, features, valid, grid)

    def _values(self, sample: Sample, modality: str) -> Tensor:
        """(3, H, W) of one modality, at the size of the model."""
        if modality == "rgb":
            return resized(sample.rgb[None], self._size)[0]
        if sample.xyz is None:
            message = f"{self._op}: samples must have points, got {sample.name!r} without"
            raise ValueError(message)
        if tuple(sample.xyz.shape[1:]) == self._size:
            return sample.xyz
        nearest: Tensor = functional.interpolate(sample.xyz[None], self._size, mode="nearest-exact")
        return nearest[0]


def resized(colours: Tensor, size: tuple[int, int]) -> Tensor:
    """Colours (B, 3, H, W) at another size, antialiased, within [0, 1]."""
    if tuple(colours.shape[2:]) == size:
        return colours
    smooth: Tensor = functional.interpolate(
        colours, size, mode="bilinear", align_corners=False, antialias=True
    )
    return smooth.clamp(0, 1)
