"""Whatever holds images, read one at a time: a folder, files, arrays, tensors, a dataset."""

import inspect
import itertools
import os
import re
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pyfeat._extras import require
from pyfeat.anomaly.decoding import Array, UnusableError, decode
from pyfeat.anomaly.samples import Record, Sample

if TYPE_CHECKING:
    import PIL.Image

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp"
_AHEAD_BYTES = 64 << 20  # of resized images that wait for the consumer

Item: TypeAlias = "str | os.PathLike[str] | PIL.Image.Image | Array | Tensor | tuple[object, ...] | Record | Sample"


@runtime_checkable
class MapDataset(Protocol):
    """A map-style dataset: items by index, the first at 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...


ImageInput: TypeAlias = "str | os.PathLike[str] | Array | Tensor | Iterable[Item] | MapDataset"


@dataclass(frozen=True, eq=False)
class NamedImage:
    """One image, on the CPU."""

    name: str  # path as given, or "image 00012" for the item at index 12
    pixels: Tensor  # [3, H, W] float32 RGB in [0, 1]
    shape: tuple[int, int]  # height and width in pixels before it was resized


@dataclass(frozen=True)
class SkippedImage:
    """One image that could not be used, and why."""

    name: str
    reason: str


def nothing_left(op: str, skipped: Sequence[SkippedImage], what: str = "images") -> str:
    """Say that nothing could be read, and why."""
    reasons = "".join(f"\n  {image.name}: {image.reason}" for image in skipped[:10])
    return (
        f"{op}: {what} must hold at least one that can be read, got none ({len(skipped)} skipped)"
        f"{reasons}"
    )


class ImageStream:
    """Images of any source as RGB tensors, one at a time and in order.

    ``images`` is one of:

    - A folder: every file below it with one of ``SUFFIXES``, in natural order (``2`` before
      ``10``). Hidden files and folders are left out; links to folders are not followed.
    - A file, whatever its suffix.
    - A batch, array or tensor: (B, H, W) grey, (B, H, W, C) or (B, C, H, W), C = 1, 3 or 4. Where
      both layouts fit, an array has its channels last and a tensor first. (3, H, W) is three
      grey images; (H, W, 3) and (H, W, 4) with W > 4, one image in all likelihood, are refused.
    - An iterable or a map-style dataset of paths, PIL images, arrays and tensors: (H, W),
      (H, W, C) or (C, H, W), read as above, sizes mixed at will. Of a tuple, such as the
      (image, label) of a torchvision dataset, the first item is the image; of records and samples
      of a ``Dataset`` it is the colours, under their names.

    Pixels: uint8 and uint16 are divided by 255 and 65535; floats must be finite and in [0, 1];
    no other dtype is taken. Files and PIL images are turned upright by their EXIF orientation,
    and give their first frame; 32-bit integer modes are read as 16-bit. Pillow reads 16-bit
    colour files with 8 bits per channel. Grey is repeated three times. Alpha is dropped without
    blending: the stored colour counts, as in Pillow's ``convert("RGB")``.

    An image is skipped, and named in ``skipped``, if it cannot be decoded to the last row, has
    no pixels, or leaves the ranges above. EXIF that cannot be read counts as none.

    Memory: one image; of path sources also those decoded ahead by one background thread, two at
    their own size, or up to 32 (64 MiB, but at least two) at ``size``.

    Args:
        images: The source. An iterator can be read once, everything else again and again.
        op: Public function on whose behalf images are read; opens every error message.
        size: (height, width) in pixels to which every image is resized, antialiased bilinear in
            float32; None leaves the sizes as they are.
        strict: Raise ValueError at the first image that would be skipped.

    Attributes:
        length: Number of images before any is skipped, None if only reading them can tell.
        skipped: Images skipped by the latest iteration, up to where it has come.

    Raises:
        FileNotFoundError: If a path does not exist. In a generator or dataset: once reached.
        ValueError: If a folder has no images, a shape or dtype is none of the above, an image
            of a batch leaves the range of pixels, or an iterator is read a second time.
        TypeError: If ``images`` or, once it is reached, an item is none of the above.
        ImportError: If a path is to be decoded and Pillow is not installed.

    Examples:
        >>> stream = ImageStream([np.zeros((4, 6), np.uint8)], op="score", size=(2, 2))
        >>> [(image.name, tuple(image.pixels.shape)) for image in stream]
        [('image 00000', (3, 2, 2))]
    """

    def __init__(
        self, images: ImageInput, *, op: str, size: tuple[int, int] | None, strict: bool = False
    ) -> None:
        self.skipped: list[SkippedImage] = []
        self._op, self._size, self._strict = op, size, strict
        self._started = False
        if isinstance(images, str | os.PathLike):
            images = find_images(images, op)
        elif isinstance(images, list | tuple):
            for item in images:
                if isinstance(item, str | os.PathLike):
                    _check_file(item, op)
        elif isinstance(images, np.ndarray | Tensor):
            _check_batch(images, op)
        elif not isinstance(images, Iterable | MapDataset):
            message = (
                f"{op}: images must be a folder, a file, a batch or an iterable of images, got "
                f"{type(images).__name__}; pass one image in a list"
            )
            raise TypeError(message)
        self._source: Iterable[object] | MapDataset = images
        self._only_paths = isinstance(images, list | tuple) and all(
            isinstance(item, str | os.PathLike) for item in images
        )
        self.length = len(self._source) if isinstance(self._source, Sized) else None

    def __iter__(self) -> Generator[NamedImage]:
        """Read the images from the first one on, and list in ``skipped`` those left out."""
        self.skipped = []
        with closing(self._ahead() if self._only_paths else self._in_turn()) as results:
            for result in results:
                if isinstance(result, NamedImage):
                    yield result
                elif self._strict:
                    found = f"{result.name}: {result.reason}"
                    message = f"{self._op}: images must all be usable, got {found}"
                    raise ValueError(message)
                else:
                    self.skipped.append(result)

    def _in_turn(self) -> Generator[NamedImage | SkippedImage]:
        # map keeps no reference to an item, so a generator's images are freed one by one.
        yield from map(self._load, itertools.count(), self._items())

    def _ahead(self) -> Generator[NamedImage | SkippedImage]:
        image_bytes = 12 * self._size[0] * self._size[1] if self._size else _AHEAD_BYTES
        most = max(2, min(32, _AHEAD_BYTES // image_bytes))
        pending: deque[Future[NamedImage | SkippedImage]] = deque()
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pyfeat-images")
        try:
            for index, item in enumerate(self._items()):
                pending.append(executor.submit(self._load, index, item))
                if len(pending) == most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _items(self) -> Iterator[object]:
        source = self._source
        if isinstance(source, Iterator):
            closed = inspect.isgenerator(source) and source.gi_frame is None
            if self._started or closed:
                message = (
                    f"{self._op}: images must have images left to read, got a used "
                    f"{type(source).__name__}; pass a folder or a list to read it more than once"
                )
                raise ValueError(message)
            self._started = True
        if isinstance(source, MapDataset) and not isinstance(source, Iterable):
            return map(source.__getitem__, range(len(source)))
        return iter(source)

    def _load(self, index: int, item: object) -> NamedImage | SkippedImage:
        if isinstance(item, tuple) and item:
            item = item[0]
        name = os.fspath(item) if isinstance(item, str | os.PathLike) else f"image {index:05d}"
        if isinstance(item, Record | Sample):
            name = item.name
            try:
                item = item.rgb if isinstance(item, Sample) else item.load().rgb
            except (OSError, ValueError) as error:
                return SkippedImage(name, str(error))
        try:
            planes = self._read(item, name)
        except UnusableError as error:
            return SkippedImage(name, str(error))
        pixels = _resize(planes, self._size).expand(3, -1, -1).contiguous()
        return NamedImage(name, pixels, shape=(planes.shape[1], planes.shape[2]))

    def _read(self, item: object, name: str) -> Tensor:
        """Return one image as (1, H, W) or (3, H, W) float32."""
        if isinstance(item, str | os.PathLike):
            if not self._only_paths:
                _check_file(item, self._op)
            require("PIL.Image", extra="anomaly", op=self._op)
            array = decode(Path(item))
        elif isinstance(item, np.ndarray | Tensor):
            array = _to_numpy(item)
        # A PIL image exists only once its module is imported, so the module need not be.
        elif (pil := sys.modules.get("PIL.Image")) and isinstance(item, pil.Image):
            array = decode(item)
        else:
            message = (
                f"{self._op}: images must hold paths, PIL images, arrays or tensors, "
                f"or tuples that begin with one, got {type(item).__name__} for {name}"
            )
            raise TypeError(message)
        _check_dtype(array.dtype, name, self._op)
        axis = _channel_axis(array.shape, channels_last=not isinstance(item, Tensor))
        if array.ndim not in (2, 3) or (array.ndim == 3 and axis is None):
            shapes = "(H, W), (H, W, C) or (C, H, W), C = 1, 3 or 4"
            message = f"{self._op}: images must have shape {shapes}, got {array.shape} for {name}"
            raise ValueError(message)
        if array.size == 0:
            message = f"it has no pixels, its shape is {array.shape}"
            raise UnusableError(message)
        _check_range(array)
        planes = array[None] if axis is None else np.moveaxis(array, axis, 0)[:3]
        pixels = torch.from_numpy(planes.astype(np.float32, order="C"))
        if array.dtype.kind == "u":
            pixels /= 255 if array.dtype.itemsize == 1 else 65535
        return pixels


def batched(stream: ImageStream, batch_size: int) -> Generator[tuple[list[NamedImage], Tensor]]:
    """Group the images of a stream; the last group may be smaller.

    Args:
        stream: Images of one shape, as any stream with a ``size`` gives them.
        batch_size: Images per group, at least 1.

    Yields:
        The images, as views of their pixels (B, 3, H, W), and these; 1 <= B <= ``batch_size``.

    Raises:
        ValueError: If ``batch_size`` is below 1.
        RuntimeError: If the images of a group differ in shape.
    """
    if batch_size < 1:
        message = f"batched: batch_size must be at least 1, got {batch_size}"
        raise ValueError(message)
    with closing(iter(stream)) as images:
        while group := list(itertools.islice(images, batch_size)):
            pixels = torch.stack([image.pixels for image in group])
            group[:] = [replace(image, pixels=p) for image, p in zip(group, pixels, strict=True)]
            yield group, pixels


def find_images(path: str | os.PathLike[str], op: str) -> list[str]:
    """Return the image files of a folder in natural order, or the one file given."""
    folder = Path(path)
    if not folder.is_dir() or not os.fspath(path):  # Path("") would be the current folder
        _check_file(path, op, "folder or file")
        return [os.fspath(path)]

    def refuse(error: OSError) -> None:
        message = f"{op}: images must be a readable folder, got {error.filename}: {error.strerror}"
        raise type(error)(message) from error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.suffix.lower() in SUFFIXES.split()]
    found = [file for file in found if file.is_file()]
    if not found:
        message = f"{op}: images must be a folder with image files ({SUFFIXES}), got {path}"
        raise ValueError(message)
    return [str(file) for file in sorted(found, key=_natural_key)]


def _natural_key(path: Path) -> tuple[list[list[int | str]], str]:
    # Splitting by digits puts text at even places and numbers at odd ones, so like meets like.
    split = [re.split("([0-9]+)", part.casefold()) for part in path.parts]
    return [[int(p) if i % 2 else p for i, p in enumerate(pieces)] for pieces in split], str(path)


def _check_file(path: str | os.PathLike[str], op: str, kind: str = "file") -> None:
    # exists() would let a named pipe pass, and opening that waits for a writer.
    if not Path(path).is_file():
        message = f"{op}: images must be an existing {kind}, got {os.fspath(path)!r}"
        raise FileNotFoundError(message)


def _check_batch(batch: Array | Tensor, op: str) -> None:
    shape = tuple(batch.shape)
    colour = len(shape) == 4 and _channel_axis(shape, channels_last=True) is not None
    grey = len(shape) == 3 and not (shape[2] in (3, 4) and shape[1] > 4)
    if not (grey or colour) or 0 in shape[1:]:
        shapes = "(B, H, W), (B, H, W, C) or (B, C, H, W), C = 1, 3 or 4"
        message = f"{op}: images must have shape {shapes}, got {shape}; pass one image in a list"
        raise ValueError(message)
    dtype = _to_numpy(batch[:0]).dtype
    _check_dtype(dtype, "the batch", op)
    for index in range(len(batch) if dtype.kind == "f" else 0):
        try:
            _check_range(_to_numpy(batch[index]))
        except UnusableError as error:
            message = f"{op}: images must have valid pixels, got image {index:05d}: {error}"
            raise ValueError(message) from None


def _check_dtype(dtype: np.dtype[np.generic], name: str, op: str) -> None:
    if dtype.kind != "f" and not (dtype.kind == "u" and dtype.itemsize <= 2):
        message = f"{op}: images must be uint8, uint16 or float in [0, 1], got {dtype} for {name}"
        raise ValueError(message)


def _check_range(array: Array) -> None:
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # false for NaN too
            message = f"its floats must be finite and in [0, 1], got {low:g} to {high:g}"
            raise UnusableError(message)


def _channel_axis(shape: tuple[int, ...], *, channels_last: bool) -> int | None:
    """Return -1 or -3, the preferred one where both fit, or None if neither does."""
    axes = () if len(shape) < 3 else (-1, -3) if channels_last else (-3, -1)
    return next((axis for axis in axes if shape[axis] in (1, 3, 4)), None)


def _to_numpy(image: Array | Tensor) -> Array:
    if isinstance(image, np.ndarray):
        return image
    tensor = image.detach().cpu()
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float64):
        tensor = tensor.float()  # NumPy has no bfloat16
    array: Array = tensor.numpy()
    return array


def _resize(planes: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize (C, H, W) to ``size``, within [0, 1] although weights add up to 1 only nearly."""
    if size is None or tuple(planes.shape[1:]) == tuple(size):
        return planes
    resized = functional.interpolate(
        planes[None], size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].clamp_(0, 1)
