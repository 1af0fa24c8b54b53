"""Volumes: NIfTI files and arrays, maybe with images beside them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pyfeat._extras import require
from pyfeat.ssl.data.images import ImageOptions, ImageSource
from pyfeat.ssl.data.source import OP, Sample, Source, label_codes
from pyfeat.ssl.options import AT_LEAST_ONE, Range
from pyfeat.ssl.registry import SOURCES

_SUFFIXES = (".nii", ".nii.gz", ".npy")


@dataclass(frozen=True)
class VolumeOptions:
    """Volumes of one kind of intensity."""

    path: Annotated[
        str, "Folder with .nii, .nii.gz and .npy files of three axes, or one such file."
    ]
    size: Annotated[
        tuple[int, int, int] | None,
        "Cells along each axis to resize to, trilinear; null takes volumes of one shape as they are.",
        AT_LEAST_ONE,
    ] = None
    clip: Annotated[tuple[float, float], "Quantiles that become 0 and 1.", Range(low=0, high=1)] = (
        0.0,
        1.0,
    )
    channels: Annotated[Literal[1, 3], "3 repeats the cells, for networks of coloured images."] = 1
    labels: Annotated[str | None, "For probes: 'folders' takes the name of a file's folder."] = None
    images: Annotated[
        str | None,
        "Images for objectives of both, such as image_volume: a folder, or a .npy file as in the data "
        "images; they are resized to a slice.",
    ] = None
    images_per_volume: Annotated[int, "Images drawn with each volume.", AT_LEAST_ONE] = 8

    def __post_init__(self) -> None:
        if self.clip[0] >= self.clip[1]:
            message = f"clip must rise, got {list(self.clip)}"
            raise ValueError(message)
        if self.labels not in (None, "folders"):
            message = f"labels must be 'folders' or null, got {self.labels!r}"
            raise ValueError(message)


@SOURCES.register("volumes", VolumeOptions)
class VolumeSource(Source):
    """Volumes as ``volumes`` (C, D, H, W) float32 in [0, 1].

    The axes are those of the file; a NIfTI volume is not turned. With images come ``images`` (M, C, H,
    W), drawn without repetition while there are enough, and ``image_index`` (M,) int64.

    Args:
        options: As a configuration has them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are no volumes or images, one cannot be read or has other than three axes, or, without
            ``size``, their shapes differ.
        ImportError: If nibabel is missing and a NIfTI file is there.
    """

    def __init__(self, options: VolumeOptions) -> None:
        self._options = options
        self._paths = _find_volumes(Path(options.path))
        shapes = {path: _shape(path) for path in self._paths}
        if options.size is None and len(set(shapes.values())) > 1:
            first, other = (
                self._paths[0],
                next(p for p in self._paths if shapes[p] != shapes[self._paths[0]]),
            )
            message = (
                f"{OP}: volumes must have one shape unless data.size is given, got "
                f"{shapes[first]} in {first} and {shapes[other]} in {other}"
            )
            raise ValueError(message)
        self.sample_shape = (options.channels, *(options.size or shapes[self._paths[0]]))
        self._images: ImageSource | None = None
        if options.images is not None:
            _, _, height, width = self.sample_shape
            kind: Literal["grey", "rgb"] = "grey" if options.channels == 1 else "rgb"
            self._images = ImageSource(ImageOptions(options.images, (height, width), kind))
            self.num_images = len(self._images)
        if options.labels is not None:
            self.labels = label_codes([path.parent.name for path in self._paths])

    def __len__(self) -> int:
        """Return N."""
        return len(self._paths)

    def read(self, index: int, generator: torch.Generator) -> Sample:
        """Return one volume, and images drawn for it."""
        path = self._paths[index]
        cells = _cells(path)
        if not np.isfinite(cells).all():
            message = f"{OP}: volumes must be finite, got NaN or infinity in {path}"
            raise ValueError(message)
        low, high = np.quantile(cells, self._options.clip)
        scaled = torch.from_numpy((cells - low) / max(float(high - low), 1e-12)).clamp_(0, 1)
        volume = _resized(scaled.float()[None], self.sample_shape[1:])
        sample: Sample = {"volumes": volume.expand(self.sample_shape)}
        if self._images is not None:
            wanted = self._options.images_per_volume
            repeats = -(-wanted // self.num_images)
            order = [torch.randperm(self.num_images, generator=generator) for _ in range(repeats)]
            drawn = torch.cat(order)[:wanted]
            images = [self._images.read(i, generator)["images"] for i in drawn.tolist()]
            sample |= {"images": torch.stack(images), "image_index": drawn}
        return sample

    def name(self, index: int) -> str:
        """Return the path of a volume."""
        return str(self._paths[index])


def _find_volumes(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        message = f"{OP}: data.path must be an existing folder or file, got {path}"
        raise FileNotFoundError(message)
    found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(_SUFFIXES))
    if not found:
        message = f"{OP}: data.path must hold volumes ({' '.join(_SUFFIXES)}), got {path} with none"
        raise ValueError(message)
    return found


def _shape(path: Path) -> tuple[int, ...]:
    shape = tuple(int(n) for n in _opened(path).shape)
    if len(shape) != 3 or 0 in shape:
        message = f"{OP}: volumes must have three axes, none 0, got {shape} in {path}"
        raise ValueError(message)
    return shape


def _cells(path: Path) -> npt.NDArray[np.float64]:
    volume = _opened(path)
    try:
        return np.asarray(getattr(volume, "dataobj", volume), dtype=np.float64)
    except Exception as error:
        message = f"{OP}: volumes must be readable, got {path} ({error})"
        raise ValueError(message) from error


def _opened(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Return what has a shape, and cells once they are asked for."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        nibabel = require("nibabel", extra="train", op=OP)
        return nibabel.load(path)  # type: ignore[no-any-return]
    except ImportError:
        raise
    except Exception as error:
        message = f"{OP}: volumes must be readable, got {path} ({error})"
        raise ValueError(message) from error


def _resized(volume: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(volume.shape[1:]) == size:
        return volume
    return functional.interpolate(volume[None], size, mode="trilinear", align_corners=False)[0]
