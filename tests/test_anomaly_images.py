import io
import re
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyfeat.anomaly import images
from pyfeat.anomaly.decoding import Array, decode
from pyfeat.anomaly.images import ImageInput, ImageStream, Item, NamedImage, batched

Patch = pytest.MonkeyPatch
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)


def stream(source: ImageInput, size: tuple[int, int] | None = None) -> ImageStream:
    return ImageStream(source, op="score", size=size)


def read(source: ImageInput, size: tuple[int, int] | None = None) -> list[NamedImage]:
    return list(ImageStream(source, op="score", size=size, strict=True))


def pixels(source: ImageInput, size: tuple[int, int] | None = None) -> Tensor:
    (image,) = read(source, size)
    return image.pixels


def planes(array: Array, white: float = 255) -> Tensor:
    unit = torch.from_numpy(array.astype(np.float32)) / white
    return unit.expand(3, -1, -1) if unit.ndim == 2 else unit.permute(2, 0, 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual.dtype, actual.is_contiguous()) == (torch.float32, True)
    assert torch.equal(actual, expected)


def encode(image: Image.Image | Array, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def save(folder: Path, name: str, array: Array = RGB) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images, each grey with its index as value."""
    for index in range(40):
        save(tmp_path, f"{index}.png", np.full((3, 3), index, np.uint8))
    return tmp_path


def oriented(orientation: int, kind: str) -> bytes:
    exif, image = Image.Exif(), Image.fromarray(RGB)
    exif[0x0112] = orientation
    undo = Image.Transpose([0, 3, 1, 5, 2, 6, 4][orientation - 2])
    return encode(image.transpose(undo), kind, exif=exif)


BIG_ENDIAN = Image.frombytes("I;16B", (7, 5), DEEP.astype(">u2").tobytes())
CMYK = Image.frombytes("CMYK", (7, 5), RGBA.tobytes())
PALETTE = Image.fromarray(RGB).quantize(7)
COLOURS = planes(np.reshape(PALETTE.getpalette() or [], (-1, 3))[np.asarray(PALETTE)])
FRAMES = {"save_all": True, "append_images": [Image.fromarray(255 - GREY)]}
KINDS = {
    "webp": (encode(RGB, "WEBP", lossless=True), planes(RGB)),
    "grey with alpha": (encode(RGBA[..., :2], "PNG"), planes(RGBA[..., 0])),
    "alpha": (encode(RGBA, "PNG"), planes(RGBA[..., :3])),
    "one pixel": (encode(RGB[:1, :1], "PNG"), planes(RGB[:1, :1])),
    "16 bits png": (encode(DEEP, "PNG"), planes(DEEP, 65535)),
    "16 bits tiff": (encode(DEEP, "TIFF"), planes(DEEP, 65535)),
    "big endian": (encode(BIG_ENDIAN, "TIFF"), planes(DEEP, 65535)),
    "32 bits": (encode(DEEP.astype(np.int32), "TIFF"), planes(DEEP, 65535)),
    "float": (encode(DEEP.astype(np.float32) / 65535, "TIFF"), planes(DEEP, 65535)),
    "white at 1023": (b"P5 2 1 1023\n\x00\x00\x03\xff", planes(np.array([[0, 1]]), 1)),
    "1 bit": (encode(GREY > 99, "PNG"), planes(GREY > 99, 1)),
    "cmyk": (encode(CMYK, "TIFF"), planes(np.asarray(CMYK.convert("RGB")))),
    "palette": (encode(PALETTE, "PNG"), COLOURS),
    "one entry transparent": (encode(PALETTE, "PNG", transparency=2), COLOURS),
    "palette with alpha": (encode(PALETTE, "PNG", transparency=bytes(range(7))), COLOURS),
    "animated gif": (encode(GREY, "GIF", **FRAMES), planes(GREY)),
    "animated png": (encode(GREY, "PNG", **FRAMES), planes(GREY)),
    "many pages": (encode(GREY, "TIFF", **FRAMES), planes(GREY)),
    "broken exif": (encode(RGB, "PNG", exif=b"Exif\0\0II*\0\x08\0\0"), planes(RGB)),
    **{f"turned png {i}": (oriented(i, "PNG"), planes(RGB)) for i in range(2, 9)},
    **{f"turned tiff {i}": (oriented(i, "TIFF"), planes(RGB)) for i in range(2, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_and_a_pil_image_have_the_expected_pixels(kind: str, tmp_path: Path) -> None:
    content, expected = KINDS[kind]
    path = tmp_path / "image.bin"
    path.write_bytes(content)
    assert_same(pixels(path), expected)
    with Image.open(path) as image:
        assert_same(pixels([image]), expected)


ARRAYS: dict[str, tuple[Array, Tensor]] = {
    "grey": (GREY, planes(GREY)),
    "channels last": (RGB, planes(RGB)),
    "one channel": (GREY[..., None], planes(GREY)),
    "alpha": (RGBA, planes(RGBA[..., :3])),
    "channels first": (np.moveaxis(RGB, 2, 0), planes(RGB)),
    "one channel first": (GREY[None], planes(GREY)),
    "alpha first": (np.moveaxis(RGBA, 2, 0), planes(RGBA[..., :3])),
    "16 bits": (DEEP, planes(DEEP, 65535)),
    "flipped": (RGB[::-1], planes(RGB[::-1])),
    "float64": (GREY / 256, planes(GREY, 256)),
    "float16": ((GREY / 256).astype(np.float16), planes(GREY, 256)),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_and_tensors_have_the_expected_pixels_alone_and_in_a_batch(kind: str) -> None:
    array, expected = ARRAYS[kind]
    tensor = torch.from_numpy(array.copy())
    for source in ([array], [tensor], array[None], tensor[None]):
        assert stream(source).length == 1
        assert_same(pixels(source), expected)


def test_big_endian_read_only_bfloat16_and_attached_inputs_are_taken_and_copied() -> None:
    locked = GREY.copy()
    locked.setflags(write=False)
    assert_same(pixels([locked]), planes(GREY))
    assert_same(pixels([DEEP.astype(">u2")]), planes(DEEP, 65535))
    assert_same(pixels([(torch.ones(2, 2) / 4).bfloat16()]), torch.full((3, 2, 2), 0.25))
    source = torch.ones(3, 2, 2, requires_grad=True)
    pixels([source]).fill_(0)
    assert source.all()


def test_an_array_that_fits_both_layouts_has_channels_last_and_a_tensor_first() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    for last in ([array], array[None]):
        assert_same(pixels(last), planes(array[..., 0]))
    for first in ([torch.from_numpy(array)], torch.from_numpy(array[None])):
        assert_same(pixels(first), planes(np.moveaxis(array, 0, 2)))
    for grey in (np.zeros((3, 6, 7)), torch.zeros(3, 4, 4)):
        assert len(read(grey)) == 3


@pytest.mark.parametrize("shape", [(61, 83), (61, 83, 3)])
def test_every_source_resizes_to_the_same_image(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = RNG.integers(0, 256, shape, dtype=np.uint8)
    unit = planes(array).contiguous()[None]
    expected = torch.nn.functional.interpolate(unit, (16, 20), mode="bilinear", antialias=True)[0]
    tensor = torch.from_numpy(array)
    for source in (save(tmp_path, "a.png", array), [array], [tensor], tensor[None], array[None]):
        assert_same(pixels(source, (16, 20)), expected)
        assert_same(pixels(source, (61, 83)), unit[0])
    assert pixels(np.ones((1, 97, 89)), (31, 33)).max() <= 1


def test_a_folder_is_read_to_its_depth_in_natural_order_but_not_hidden(tmp_path: Path) -> None:
    expected = [save(tmp_path, name) for name in ["2.png", "10.PNG", "b/1.jpg", "b/02.tif"]]
    save(tmp_path, ".hidden.png")
    save(tmp_path, ".cache/a.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    assert stream(tmp_path).length == 4
    assert [image.name for image in read(str(tmp_path))] == expected


def test_a_folder_without_images_or_leave_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"^score: images must .*\.jpg.*, got {tmp_path}$"):
        stream(tmp_path)

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(PermissionError, match=r"^score: images must be a readable folder, got /"):
        stream(tmp_path)


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.png")
    for lone in (missing, ""):
        with pytest.raises(FileNotFoundError, match=f"^score: .* folder or file, got '{lone}'$"):
            stream(lone)
    listed: list[list[Item]] = [[missing], [RGB, missing], [tmp_path]]
    for source in listed:
        with pytest.raises(FileNotFoundError, match=r"^score: images must be an existing file"):
            stream(source)
    for reached in (iter([missing]), [(missing, 0)]):
        with pytest.raises(FileNotFoundError, match=r"^score: images must be an existing file"):
            read(reached)


def test_items_of_every_kind_and_size_may_be_mixed(tmp_path: Path) -> None:
    path = save(tmp_path, "a.png")
    mixed: list[Item] = [path, Path(path), Image.fromarray(RGB), RGB[:2], (GREY, 3)]
    found = read(mixed)
    assert [image.name for image in found] == [path, path, *(f"image 0000{i}" for i in (2, 3, 4))]
    for image, array in zip(found, [RGB, RGB, RGB, RGB[:2], GREY], strict=True):
        assert_same(image.pixels, planes(array))


def test_a_map_style_dataset_is_read_by_its_length() -> None:
    class Pairs:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int, /) -> tuple[object, ...]:
            return np.full((2, 2), index % 3, np.uint8), "label"

    pairs = stream(Pairs())
    assert pairs.length == 3
    for _ in range(2):
        assert [round(image.pixels.max().item() * 255) for image in pairs] == [0, 1, 2]


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (3, TypeError, "be a folder, .* got int; pass one image in a list"),
        ([3], TypeError, "hold paths, .* got int for image 00000"),
        ([()], TypeError, "hold paths, .* got tuple for image 00000"),
        ([[GREY]], TypeError, "hold paths, .* got list for image 00000"),
        ([GREY, GREY.astype(int)], ValueError, "be uint8, .* int64 for image 00001"),
        (torch.zeros(1, 2, 2).bool(), ValueError, "be uint8, .* bool for the batch"),
        ([RGBA[..., :2]], ValueError, r"have shape .* \(5, 7, 2\) for image 00000"),
        ([RGB[None]], ValueError, r"have shape .* \(1, 5, 7, 3\) for image 00000"),
        (RGB, ValueError, r"have shape .* \(5, 7, 3\); pass one image in a list"),
        (GREY, ValueError, r"have shape .* \(5, 7\)"),
        (RGBA[None, ..., :2], ValueError, r"have shape .* \(1, 5, 7, 2\)"),
        (torch.zeros(2, 0, 7), ValueError, r"have shape .* \(2, 0, 7\)"),
    ],
)
def test_no_image_is_an_error(source: ImageInput, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"^score: images must {match}"):
        list(stream(source))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1.01, -0.01])
def test_floats_out_of_range_fail_a_batch_and_skip_an_item(value: float) -> None:
    batch = np.zeros((3, 4, 5))
    batch[1, 2, 3] = value
    for whole in (batch, torch.from_numpy(batch)):
        with pytest.raises(ValueError, match=r"^score: images must .* got image 00001: its floats"):
            stream(whole)
    items = stream(list(batch))
    assert [image.name for image in items] == ["image 00000", "image 00002"]
    assert [skipped.name for skipped in items.skipped] == ["image 00001"]


BROKEN = {
    "cut.png": (encode(RGB, "PNG")[:90], "truncated"),
    "cut.jpg": (encode(RGB, "JPEG")[:-1], "[Tt]runcated"),
    "text.png": (b"this is text", "no image that Pillow can read"),
    "empty.png": (b"", "it is empty"),
    "wide.tif": (encode(np.full((2, 2), 65536, np.int32), "TIFF"), "no known"),
    "nan.tif": (encode(np.full((2, 2), np.nan, np.float32), "TIFF"), "nan to nan"),
    "no_pixels.pgm": (b"P5 0 4 255\n", "it "),
    "bomb.pgm": (b"P5 99999 99999 255\n", "DecompressionBombError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_skipped_by_name_or_an_error_if_strict(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    good = save(tmp_path, "z.png")
    images = stream(tmp_path)
    for _ in range(2):
        assert [image.name for image in images] == [good]
        (skipped,) = images.skipped
        assert skipped.name == str(path)
        assert re.search(reason, skipped.reason)
    assert images.length == 2
    with pytest.raises(ValueError, match=rf"^score: images must all be usable, got {path}: "):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_file_cut_anywhere_is_skipped_unless_complete(kind: str, tmp_path: Path) -> None:
    data = encode(RGB, kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    whole = pixels(path)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        cut = stream(path)
        assert all(torch.equal(image.pixels, whole) for image in cut)
        assert len(cut.skipped) == 1 or length > len(data) - 25


def test_no_pixels_a_closed_image_and_a_vanished_file_are_skipped(tmp_path: Path) -> None:
    with Image.open(save(tmp_path, "a.png")) as closed:
        pass
    items: list[Item] = [np.zeros((0, 5, 3)), closed]
    for late in (stream(items), stream(tmp_path)):
        (tmp_path / "a.png").unlink(missing_ok=True)
        assert list(late) == []
        assert len(late.skipped) == late.length


def test_an_iterator_is_read_once_and_everything_else_again(folder: Path) -> None:
    once = stream(GREY for _ in range(3))
    assert (once.length, len(list(once))) == (None, 3)
    used = (GREY for _ in range(0))
    assert list(used) == []
    for spent in (once, stream(used)):
        with pytest.raises(ValueError, match=r"^score: images must .*, got a used generator; pass"):
            list(spent)
    again = stream(folder)
    assert [image.name for image in again] == [image.name for image in again]
    assert read([]) == read(np.zeros((0, 4, 4))) == []


def test_images_from_a_generator_are_alive_one_at_a_time() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []

    def generate() -> Iterator[Tensor]:
        for _ in range(50):
            image = torch.zeros(3, 8, 8)
            alive.add(image)
            counts.append(len(alive))
            yield image
            del image

    assert [len(names) for names, _ in batched(stream(generate()), 8)] == [8] * 6 + [2]
    assert max(counts) == 1


@pytest.mark.parametrize(("size", "ahead"), [(None, 2), ((8, 8), 32), ((2048, 2048), 2)])
def test_decoding_runs_a_few_images_ahead_and_stops_when_the_consumer_does(
    size: tuple[int, int] | None, ahead: int, folder: Path, monkeypatch: Patch
) -> None:
    decoded: list[Path] = []

    def record(path: Path) -> Array:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(images, "decode", record)
    reader = iter(stream(folder, size))
    for index, image in zip(range(4), reader, strict=False):
        assert index < len(decoded) <= index + ahead
        assert round(image.pixels.max().item() * 255) == index
    with pytest.raises(KeyboardInterrupt):
        reader.throw(KeyboardInterrupt())
    assert len(decoded) <= 3 + ahead
    for _ in batched(stream(folder, size), 2):
        break
    assert "pyfeat-images" not in str(threading.enumerate())


def test_an_error_in_the_background_has_its_traceback(folder: Path, monkeypatch: Patch) -> None:
    def broken_resize(planes: Tensor, size: object) -> Tensor:
        message = "a bug, not a bad image"
        raise RuntimeError(message)

    monkeypatch.setattr(images, "_resize", broken_resize)
    with pytest.raises(RuntimeError, match="a bug") as caught:
        read(folder)
    assert "broken_resize" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert "pyfeat-images" not in str(threading.enumerate())


def test_a_path_without_pillow_names_the_extra_to_install(folder: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"^score: needs .*pyfeat-kernels\[anomaly\]"):
        read(folder)
    assert_same(pixels([RGB]), planes(RGB))


def test_batches_are_full_but_for_the_last(folder: Path) -> None:
    batches = list(batched(stream(folder, (3, 4)), 16))
    assert [len(pixels) for _, pixels in batches] == [16, 16, 8]
    assert all(torch.equal(batch[5], group[5].pixels) for group, batch in batches)
    with pytest.raises(ValueError, match=r"^batched: batch_size must be at least 1"):
        next(batched(stream(folder), 0))
