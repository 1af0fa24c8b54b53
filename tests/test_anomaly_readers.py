"""Readers of published layouts: what was written comes back, and broken folders are refused."""

import itertools
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pyfeat.anomaly import Dataset, Sample, read_dataset, synthesise, write_dataset
from pyfeat.anomaly.readers import LAYOUTS, Layout, eyecandies
from pyfeat.anomaly.readers.tiff import read_tiff, write_tiff
from pyfeat.anomaly.samples import Split

NAMES = sorted(LAYOUTS)
WITH_POINTS: list[Layout] = ["mvtec_3d_ad", "eyecandies"]


def plates(category: str = "plate", defective: int = 3) -> Dataset:
    return synthesise(train=2, good=1, defective=defective, size=(24, 32), category=category)


def two_categories() -> Dataset:
    return Dataset([*plates("disc"), *plates("plate")])


def write(folder: Path, layout: Layout, dataset: Dataset | None = None) -> Path:
    write_dataset(dataset or two_categories(), folder, layout=layout)
    return folder


@pytest.mark.parametrize("layout", NAMES)
def test_what_was_written_is_found_and_read(layout: Layout, tmp_path: Path) -> None:
    written = two_categories()
    found = read_dataset(write(tmp_path, layout, written))
    assert found.categories == ["disc", "plate"]
    assert found.without_mask == []
    splits: tuple[Split, ...] = ("train", "test")
    for category, split in itertools.product(found.categories, splits):
        mine = written.select(category=category, split=split)
        left = [record.load() for record in found.select(category=category, split=split)]
        assert len(left) == len(mine)
        for record in mine:
            left.remove(same(record.load(), left, layout))


def same(written: Sample, found: list[Sample], layout: Layout) -> Sample:
    """The one sample that holds what was written, to the precision of the files."""
    (sample,) = (s for s in found if (s.rgb - written.rgb).abs().max() < 0.6 / 255)
    keeps_kinds = layout in ("mvtec_ad", "mvtec_3d_ad") or not written.defective
    kind = written.kind if keeps_kinds else "anomaly"
    assert (sample.kind, sample.defective) == (kind, written.defective)
    assert sample.mask is not None
    assert written.mask is not None
    assert torch.equal(sample.mask, written.mask)
    assert (sample.xyz is None) == (layout not in WITH_POINTS)
    if sample.xyz is not None and written.xyz is not None:
        if layout == "mvtec_3d_ad":
            assert torch.equal(sample.xyz, written.xyz)
        else:
            seen = written.xyz[2] > 0
            span = float(written.xyz[2][seen].max() - written.xyz[2][seen].min())
            error = (sample.xyz[2] - written.xyz[2])[seen].abs().max()
            assert error <= 0.51 * span / 65535 + 1e-5 * written.xyz.max()
    return sample


def test_one_category_may_be_read_alone_and_several_roots_together(tmp_path: Path) -> None:
    for name in ("disc", "plate"):
        write(tmp_path / name, "mvtec_ad", plates(name))
    both = read_dataset(tmp_path / "disc", tmp_path / "plate")
    assert both.categories == ["disc", "plate"]
    alone = read_dataset(tmp_path / "plate" / "plate")
    assert [record.name for record in alone] == [
        record.name for record in both.select(category="plate")
    ]
    some = read_dataset(tmp_path / "disc", tmp_path / "plate", categories=["disc"])
    assert some.categories == ["disc"]
    with pytest.raises(ValueError, match="categories must be one of 'disc', 'plate', got 'cup'"):
        read_dataset(tmp_path / "disc", tmp_path / "plate", categories=["cup"])


def test_masks_may_be_missing_and_it_is_said_where(tmp_path: Path) -> None:
    for layout in NAMES:
        write(tmp_path / layout, layout, plates())
    for mask in [
        tmp_path / "mvtec_ad/plate/ground_truth/dent/000_mask.png",
        tmp_path / "mvtec_3d_ad/plate/test/dent/gt/000.png",
        tmp_path / "eyecandies/plate/test_public/data/001_mask.png",
    ]:
        mask.unlink()
    table = tmp_path / "visa/split_csv/1cls.csv"
    table.write_text(table.read_text().replace("plate/Data/Masks/Anomaly/test_dent_000.png", ""))
    for layout in NAMES:
        found = read_dataset(tmp_path / layout)
        (name,) = found.without_mask
        (record,) = (record for record in found if record.name == name)
        sample = record.load()
        assert sample.defective
        assert sample.mask is None


def test_categories_that_clash_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "mvtec_ad", plates("plate", 0))
    write(tmp_path / "b", "visa", plates("Plate", 0))
    with pytest.raises(ValueError, match="roots must not share categories, got 'Plate' in"):
        read_dataset(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "a/plate", tmp_path / "a/PLATE")
    with pytest.raises(ValueError, match="must differ in more than case, got 'PLATE' and 'plate'"):
        read_dataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("layout", "gone", "message"),
    [
        (
            "mvtec_3d_ad",
            "plate/train/good/xyz/000.tiff",
            "2 images and 1 files .* points \\['000'\\]",
        ),
        (
            "mvtec_3d_ad",
            "plate/train/good/rgb/001.png",
            "1 images and 2 files .* image \\['001'\\]",
        ),
        ("mvtec_3d_ad", "plate/test/dent/rgb/000.png", "one file of points, got 0 images"),
        ("eyecandies", "plate/train/data/001_depth.png", "one file of depth, got 2 images and 1"),
        ("eyecandies", "plate/train/data/001_metadata.yaml", "must have a file 001_metadata.yaml"),
        ("mvtec_ad", "plate/test/dent/000.png", "every mask must have an image, got \\['000'\\]"),
    ],
)
def test_a_sample_that_lacks_a_file_is_refused(
    layout: Layout, gone: str, message: str, tmp_path: Path
) -> None:
    (write(tmp_path, layout, plates()) / gone).unlink()
    with pytest.raises(ValueError, match=f"read_dataset: .*{message}"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("layout", WITH_POINTS)
def test_modalities_of_different_sizes_are_refused_when_loaded(
    layout: Layout, tmp_path: Path
) -> None:
    write(tmp_path, layout, plates())
    place = {"mvtec_3d_ad": "train/good/rgb/000.png", "eyecandies": "train/data/000_image_0.png"}
    Image.new("RGB", (31, 24)).save(tmp_path / "plate" / place[layout])
    record = read_dataset(tmp_path)[0]
    message = r"must be of one size, got image of \(24, 31\), points of \(24, 32\)"
    with pytest.raises(ValueError, match=message):
        record.load()


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "mvtec_ad", plates())
    Image.new("L", (32, 23)).save(tmp_path / "plate/ground_truth/dent/000_mask.png")
    (record,) = read_dataset(tmp_path).select(kind="dent")
    with pytest.raises(ValueError, match=r"image of \(24, 32\), mask of \(23, 32\)"):
        record.load()


def test_tables_of_visa_are_checked(tmp_path: Path) -> None:
    write(tmp_path, "visa", plates())
    table = tmp_path / "split_csv/1cls.csv"
    whole = table.read_text()
    table.write_text(whole.replace(",train,", ",training,", 1))
    with pytest.raises(ValueError, match=r"must hold splits .* got .*'split': 'training'"):
        read_dataset(tmp_path)
    table.write_text(whole.replace("image,mask", "image,masks"))
    with pytest.raises(ValueError, match="must have columns"):
        read_dataset(tmp_path)
    table.write_text(whole)
    next(tmp_path.glob("plate/Data/Images/Normal/*.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"must exist, got .*Normal"):
        read_dataset(tmp_path)


def test_kinds_and_the_private_set_of_eyecandies(tmp_path: Path) -> None:
    write(tmp_path, "eyecandies", plates())
    data = tmp_path / "plate/test_public/data"
    shutil.copy(data / "001_mask.png", data / "001_dents_mask.png")
    Image.new("L", (32, 24)).save(data / "001_bumps_mask.png")  # of a defect that is not there
    kinds = [record.kind for record in read_dataset(tmp_path).select(split="test")]
    assert kinds == ["good", "dents", "anomaly", "anomaly"]
    private = data.parent.with_name("test_private") / "data"
    private.mkdir(parents=True)
    for file in ("image_0.png", "depth.png", "info_depth.yaml"):
        shutil.copy(data / f"001_{file}", private / f"001_{file}")
    (record,) = (r for r in eyecandies.records("op", tmp_path, private=True) if r.split == "test")
    assert (record.defective, record.kind, record.has_mask) == (None, "unknown", False)
    sample = record.load()
    assert sample.mask is None
    assert sample.xyz is not None
    x, y, z = sample.xyz
    assert torch.allclose(x[:, 20], z[:, 20] * 4 / eyecandies.FOCAL_LENGTH)
    assert torch.allclose(y[20], z[20] * 8 / eyecandies.FOCAL_LENGTH)


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"roots must have the layout of visa, .*, got"):
        read_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="roots must be existing folders, got"):
        read_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="roots must name at least one folder, got none"):
        read_dataset()
    with pytest.raises(ValueError, match=r"layout must be one of None, .* got 'coco'"):
        read_dataset(tmp_path, layout="coco")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="folder must not exist or be empty"):
        write_dataset(plates(), tmp_path, layout="visa")


def test_points_that_are_not_numbers_count_as_none(tmp_path: Path) -> None:
    write(tmp_path, "mvtec_3d_ad", plates())
    path = tmp_path / "plate/train/good/xyz/000.tiff"
    values = read_tiff(path)
    values[3, 4, 1] = np.nan
    write_tiff(path, values)
    points = read_dataset(tmp_path)[0].load().xyz
    assert points is not None
    assert (points[:, 3, 4] == 0).all()
    assert torch.equal(points[:, 5], torch.from_numpy(values[5].T))


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_files_come_back(channels: int, deflate: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7, channels)).astype(np.float32)
    write_tiff(tmp_path / "a.tiff", values, deflate=deflate)
    assert np.array_equal(read_tiff(tmp_path / "a.tiff"), values)
    if channels == 1 and not deflate:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.tiff")), values[..., 0])


def big_endian_planes(values: NDArray[np.float32]) -> bytes:
    """A file with a strip for every two rows of each plane, as other programs write them."""
    height, width, channels = values.shape
    strips = [
        values[row : row + 2, :, channel].astype(">f4").tobytes()
        for channel in range(channels)
        for row in range(0, height, 2)
    ]
    count, begin = len(strips), 8 + 2 + 12 * 9 + 4
    data = begin + 8 * count
    offsets = [data + sum(map(len, strips[:i])) for i in range(count)]
    tags = [(256, 3, 1, width << 16), (257, 3, 1, height << 16), (258, 3, 1, 32 << 16)]
    tags += [(273, 4, count, begin), (277, 3, 1, channels << 16), (278, 3, 1, 2 << 16)]
    tags += [(279, 4, count, begin + 4 * count), (284, 3, 1, 2 << 16), (339, 3, 1, 3 << 16)]
    head = b"MM" + struct.pack(">HIH", 42, 8, len(tags))
    entries = b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4)
    return b"".join(
        [head, entries, struct.pack(f">{2 * count}I", *offsets, *map(len, strips)), *strips]
    )


def test_tiff_files_of_the_other_byte_order_in_planes_are_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    (tmp_path / "a.tiff").write_bytes(big_endian_planes(values))
    assert np.array_equal(read_tiff(tmp_path / "a.tiff"), values)


def test_a_broken_tiff_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    for deflate in (False, True):
        write_tiff(path, np.ones((5, 7, 3), np.float32), deflate=deflate)
        whole = path.read_bytes()
        for length in (
            *range(0, 150, 3),
            *range(150, len(whole) - 9, 23),
            *range(len(whole) - 9, len(whole)),
        ):
            path.write_bytes(whole[:length])
            with pytest.raises(
                ValueError, match="read_tiff: path must hold a TIFF image of float32"
            ):
                read_tiff(path)
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"\(8, 8, 8\) bits of sample format \(1,\)"):
        read_tiff(path)
