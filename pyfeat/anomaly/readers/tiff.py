"""TIFF files of float32, which Pillow reads with one channel only.

Source: TIFF Revision 6.0, Adobe, 1992; deflate as in Adobe Photoshop TIFF Technical Notes, 2002.
"""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_OFFSETS, _CHANNELS, _ROWS_PER_STRIP, _BYTE_COUNTS = 273, 277, 278, 279
_PLANAR, _PREDICTOR, _TILE_WIDTH, _SAMPLE_FORMAT = 284, 317, 322, 339
_NONE, _DEFLATE, _OLD_DEFLATE = 1, 8, 32946
_FLOAT = 3
_TYPES = {3: "H", 4: "I"}  # the two that hold the tags read here


def read_tiff(path: Path) -> NDArray[np.float32]:
    """Read the first image of a file: (H, W, C) float32.

    Strips of either byte order, uncompressed or deflated, channels interleaved or in planes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is cut off, no TIFF file, or one of another kind.
    """
    data = path.read_bytes()
    try:
        return _decode(data)
    except (struct.error, zlib.error, KeyError, IndexError, _FormatError) as error:
        reason = str(error) if isinstance(error, _FormatError) else f"damaged ({error!r})"
        message = f"read_tiff: path must hold a TIFF image of float32, got {path}: {reason}"
        raise ValueError(message) from error


def write_tiff(path: Path, values: NDArray[np.float32], *, deflate: bool = False) -> None:
    """Write (H, W, C) float32 as one strip, little-endian, channels interleaved.

    Raises:
        ValueError: If the shape is another one or there is nothing to write.
    """
    if values.ndim != 3 or values.size == 0:
        message = f"write_tiff: values must have shape (H, W, C), got {values.shape}"
        raise ValueError(message)
    height, width, channels = values.shape
    strip = np.ascontiguousarray(values, "<f4").tobytes()
    strip = zlib.compress(strip) if deflate else strip
    num_tags = 11
    lists = (
        8 + 2 + 12 * num_tags + 4
    )  # where values lie that do not fit a tag: two for each channel
    fits = channels <= 2
    at = lists + (0 if fits else 4 * channels)

    def each(value: int, place: int) -> tuple[int, int, bytes]:
        packed = struct.pack(f"<{channels}H", *[value] * channels)
        return 3, channels, packed if fits else struct.pack("<I", place)

    tags: dict[int, tuple[int, int, bytes]] = {
        _WIDTH: (4, 1, struct.pack("<I", width)),
        _HEIGHT: (4, 1, struct.pack("<I", height)),
        _BITS: each(32, lists),
        _COMPRESSION: (3, 1, struct.pack("<H", _DEFLATE if deflate else _NONE)),
        _PHOTOMETRIC: (3, 1, struct.pack("<H", 2 if channels == 3 else 1)),
        _OFFSETS: (4, 1, struct.pack("<I", at)),
        _CHANNELS: (3, 1, struct.pack("<H", channels)),
        _ROWS_PER_STRIP: (4, 1, struct.pack("<I", height)),
        _BYTE_COUNTS: (4, 1, struct.pack("<I", len(strip))),
        _PLANAR: (3, 1, struct.pack("<H", 1)),
        _SAMPLE_FORMAT: each(_FLOAT, lists + 2 * channels),
    }
    parts = [b"II", struct.pack("<HIH", 42, 8, num_tags)]
    for tag, (kind, count, packed) in tags.items():
        parts.append(struct.pack("<HHI4s", tag, kind, count, packed))
    parts.append(struct.pack("<I", 0))
    if not fits:
        parts.append(struct.pack(f"<{2 * channels}H", *[32] * channels, *[_FLOAT] * channels))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join([*parts, strip]))


class _FormatError(Exception):
    """What is wrong with a file, in words that follow a colon."""


def _decode(data: bytes) -> NDArray[np.float32]:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or struct.unpack_from(f"{order}H", data, 2) != (42,):
        message = "no classic TIFF file"
        raise _FormatError(message)
    tags = _tags(data, order)
    (height,), (width,) = tags[_HEIGHT], tags[_WIDTH]
    (channels,) = tags.get(_CHANNELS, (1,))
    (compression,), (planar,) = tags.get(_COMPRESSION, (_NONE,)), tags.get(_PLANAR, (1,))
    (rows,) = tags.get(_ROWS_PER_STRIP, (height,))
    if set(tags.get(_BITS, (1,))) != {32} or set(tags.get(_SAMPLE_FORMAT, (1,))) != {_FLOAT}:
        bits, formats = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
        message = f"{bits} bits of sample format {formats} in place of 32 of format 3"
        raise _FormatError(message)
    if tags.get(_PREDICTOR, (1,)) != (1,) or _TILE_WIDTH in tags:
        message = "its values are predicted or lie in tiles, neither is read"
        raise _FormatError(message)
    if compression not in (_NONE, _DEFLATE, _OLD_DEFLATE):
        message = f"compression {compression} in place of 1 (none) or 8 (deflate)"
        raise _FormatError(message)
    if min(height, width, channels, rows) < 1 or planar not in (1, 2):
        message = f"{height} x {width} x {channels} values in strips of {rows}, planes {planar}"
        raise _FormatError(message)
    together = channels if planar == 1 else 1  # channels in one strip
    sizes = [4 * width * together * min(rows, height - r) for r in range(0, height, rows)]
    sizes = sizes * (channels // together)
    strips = list(zip(tags[_OFFSETS], tags[_BYTE_COUNTS], strict=False))
    if len(strips) != len(sizes):
        message = f"{len(strips)} strips in place of {len(sizes)}"
        raise _FormatError(message)
    parts = []
    for (offset, length), size in zip(strips, sizes, strict=True):
        strip = data[offset : offset + length]
        whole = len(strip) == length
        if compression != _NONE:
            strip = zlib.decompressobj().decompress(strip, size)
        if not whole or len(strip) < size:
            message = f"cut off, a strip has {len(strip)} bytes in place of {size}"
            raise _FormatError(message)
        parts.append(strip[:size])
    values = np.frombuffer(b"".join(parts), f"{order}f4").astype(np.float32)
    if planar == 2:
        return np.ascontiguousarray(np.moveaxis(values.reshape(channels, height, width), 0, -1))
    return values.reshape(height, width, channels)


def _tags(data: bytes, order: str) -> dict[int, tuple[Any, ...]]:
    """Values of the tags of the first image; those of other types than whole numbers are left out."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    tags: dict[int, tuple[Any, ...]] = {}
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, place)
        if kind in _TYPES:
            layout = f"{order}{number}{_TYPES[kind]}"
            at = place + 8
            if struct.calcsize(layout) > 4:
                (at,) = struct.unpack_from(f"{order}I", data, at)
            tags[tag] = struct.unpack_from(layout, data, at)
    return tags
