"""Pixels out of image files, for as many kinds of broken ones as there are."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import PIL.Image

Array: TypeAlias = npt.NDArray[np.generic]


class UnusableError(Exception):
    """The image at hand is bad, not the call: it is skipped unless the stream is strict."""


def decode(source: "Path | PIL.Image.Image") -> Array:
    """Return the pixels of an image, (H, W) or (H, W, 3); UnusableError says what is wrong."""
    from PIL import UnidentifiedImageError
    from PIL.Image import open as open_image

    try:
        if not isinstance(source, Path):
            return _upright_pixels(source)
        # Pillow leaves some files open when it fails on them, but never a file of ours.
        with source.open("rb") as file, open_image(file) as image:
            return _upright_pixels(image)
    except UnidentifiedImageError:
        message = "it is empty or no image that Pillow can read"
        raise UnusableError(message) from None
    except Exception as error:  # decoders raise nearly anything on broken files
        message = f"it cannot be decoded, {type(error).__name__}: {error}"
        raise UnusableError(message) from error


def _upright_pixels(image: "PIL.Image.Image") -> Array:
    """Return the pixels of the first frame, (H, W) or (H, W, 3), turned as EXIF says."""
    image.load()
    orientation = 1
    if image.format != "TIFF":  # which load() turns, and some versions of Pillow leave marked
        with suppress(Exception):  # EXIF too broken to be read does not spoil the pixels
            orientation = image.getexif().get(0x0112, 1)
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        # Converting straight to RGB warns of a transparency given per palette entry.
        image = image.convert("RGBA").convert("RGB")
    elif image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")
    array: Array = np.asarray(image)
    if array.dtype == np.int32:
        wide, array = array, array.astype(np.uint16)
        if not np.array_equal(wide, array):
            message = "32-bit integers outside [0, 65535] have no known white"
            raise ValueError(message)
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array
