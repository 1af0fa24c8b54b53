"""Sources of samples, and the order in which steps take them."""

import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyfeat.ssl.data.images import ImageOptions, ImageSource
from pyfeat.ssl.data.pairs import PairOptions, PairSource
from pyfeat.ssl.data.sampler import ResumableLoader, StepSampler
from pyfeat.ssl.data.source import SourceDataset, collate
from pyfeat.ssl.data.volumes import VolumeOptions, VolumeSource


def _image(path: Path, value: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (6, 4), value if mode == "L" else (value, 0, 0)).save(path)


def _table(path: Path, header: str, *rows: Sequence[object]) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_of_folders_have_their_names_as_labels(tmp_path: Path) -> None:
    for kind, value in (("good", 255), ("bad", 51)):
        for i in range(2):
            _image(tmp_path / kind / f"{i}.png", value)
    source = ImageSource(ImageOptions(str(tmp_path), size=(2, 3), labels="folders"))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.name(2).endswith("good/0.png")
    pixels = source.read(0, _draw())["images"]
    assert pixels.shape == source.sample_shape == (3, 2, 3)
    torch.testing.assert_close(pixels[0], torch.full((2, 3), 0.2))
    assert source.read(0, _draw())["images"] is pixels  # kept
    grey = ImageSource(ImageOptions(str(tmp_path), size=(2, 3), channels="grey"))
    torch.testing.assert_close(grey.read(0, _draw())["images"], torch.full((1, 2, 3), 0.2 / 3))


def test_no_more_images_are_kept_than_allowed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 512, 512), np.uint8))
    options = ImageOptions(str(tmp_path / "a.npy"), size=(512, 512), channels="grey", cache_mb=1)
    source = ImageSource(options)
    kept = [source.read(i, _draw())["images"] for i in range(2)]
    assert source.read(0, _draw())["images"] is kept[0]
    assert source.read(1, _draw())["images"] is not kept[1]


def test_labels_of_tables_and_arrays(tmp_path: Path) -> None:
    for i in range(3):
        _image(tmp_path / "x" / f"{i}.png", 9)
    table = _table(tmp_path / "t.csv", "file,label", ("0.png", "b"), ("2.png", "a"))
    labels = ImageSource(ImageOptions(str(tmp_path / "x"), labels=str(table))).labels
    assert labels is not None
    assert labels.tolist() == [1, -1, 0]
    np.save(tmp_path / "l.npy", np.array([3, 1, 2]))
    labels = ImageSource(ImageOptions(str(tmp_path / "x"), labels=str(tmp_path / "l.npy"))).labels
    assert labels is not None
    assert labels.tolist() == [3, 1, 2]
    np.save(tmp_path / "l.npy", np.array([3.0, 1, 2]))
    with pytest.raises(ValueError, match="labels must be 3 whole numbers, got float64"):
        ImageSource(ImageOptions(str(tmp_path / "x"), labels=str(tmp_path / "l.npy")))
    other = _table(tmp_path / "o.csv", "file,label", ("9.png", "b"))
    with pytest.raises(ValueError, match="labels must name files below"):
        ImageSource(ImageOptions(str(tmp_path / "x"), labels=str(other)))
    with pytest.raises(FileNotFoundError, match="labels must be 'folders' or an existing file"):
        ImageSource(ImageOptions(str(tmp_path / "x"), labels="none.csv"))


def test_bad_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder with image files"):
        ImageSource(ImageOptions(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="images must be an existing folder"):
        ImageSource(ImageOptions(str(tmp_path / "none")))
    _image(tmp_path / "x" / "a.png", 9)
    (tmp_path / "x" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got 1 that are not: .*b.png \(UnidentifiedImageError\)"):
        ImageSource(ImageOptions(str(tmp_path / "x")))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(
        tmp_path / "x" / "b.png"
    )
    data = (tmp_path / "x" / "b.png").read_bytes()
    (tmp_path / "x" / "b.png").write_bytes(data[: len(data) // 2])
    source = ImageSource(ImageOptions(str(tmp_path / "x")))
    with pytest.raises(ValueError, match=r"data must be readable, got .*b.png"):
        source.read(1, _draw())
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(
        ValueError, match=r"must have shape \(N, H, W\) or \(N, H, W, C\), got \(2, 2\)"
    ):
        ImageSource(ImageOptions(str(tmp_path / "a.npy")))
    (tmp_path / "a.npy").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"must be a whole .npy file"):
        ImageSource(ImageOptions(str(tmp_path / "a.npy")))
    np.save(tmp_path / "a.npy", np.zeros((0, 2, 2)))
    with pytest.raises(ValueError, match=r"must hold images, got .* with none"):
        ImageSource(ImageOptions(str(tmp_path / "a.npy")))


def test_a_source_goes_to_another_process_without_its_pixels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((9, 64, 64), 51, np.uint8))
    source = ImageSource(ImageOptions(str(tmp_path / "a.npy")))
    source.read(0, _draw())
    data = pickle.dumps(source)
    assert len(data) < 4000
    torch.testing.assert_close(
        pickle.loads(data).read(1, _draw())["images"], torch.full((3, 64, 64), 0.2)
    )


def test_pairs_of_a_table(tmp_path: Path) -> None:
    for i in range(2):
        _image(tmp_path / f"{i}.png", 51)
    rows = [("0.png", "a cell"), ("1.png", "a crack"), ("1.png", "a dark line")]
    path = _table(tmp_path / "pairs.csv", "image,caption", *rows)
    source = PairSource(PairOptions(str(path), size=(2, 2)))
    assert len(source) == 2
    drawn = {source.read(1, _draw(seed))["texts"] for seed in range(20)}
    assert drawn == {"a crack", "a dark line"}
    assert source.read(1, _draw(3)).keys() == {"images", "texts"}
    every = PairSource(PairOptions(str(path), size=(2, 2), captions="all"))
    assert every.read(1, _draw())["texts"] == ["a crack", "a dark line"]


def test_pairs_of_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for i in range(2):
                _image(tmp_path / "x.png", 51 * (2 * shard + i + 1))
                archive.add(tmp_path / "x.png", f"{i}.png")
                text = json.dumps({"caption": [f"c{shard}{i}", "other"]}) if i else f"c{shard}{i}\n"
                data = text.encode()
                info = tarfile.TarInfo(f"{i}.json" if i else f"{i}.txt")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    source = PairSource(PairOptions(str(tmp_path), size=(2, 2), captions="all"))
    read = [source.read(i, _draw()) for i in range(4)]
    assert [sample["texts"] for sample in read] == [
        ["c00"],
        ["c01", "other"],
        ["c10"],
        ["c11", "other"],
    ]
    assert [round(float(sample["images"][0, 0, 0]), 2) for sample in read] == [0.2, 0.4, 0.6, 0.8]
    assert source.name(3).endswith("1.tar:1.png")
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"shards must be whole .tar files, got .*0.tar"):
        PairSource(PairOptions(str(tmp_path)))


def test_pairs_without_captions_or_images_are_named(tmp_path: Path) -> None:
    _image(tmp_path / "0.png", 51)
    path = _table(tmp_path / "pairs.csv", "image,caption", ("0.png", " "))
    with pytest.raises(ValueError, match=r"images must have captions, got 1 without: .*0.png"):
        PairSource(PairOptions(str(path)))
    path = _table(tmp_path / "pairs.csv", "image,caption", ("9.png", "x"))
    with pytest.raises(FileNotFoundError, match=r"images must exist, got 1 that do not: .*9.png"):
        PairSource(PairOptions(str(path)))
    path = _table(tmp_path / "pairs.csv", "image,text", ("9.png", "x"))
    with pytest.raises(ValueError, match="must have the columns image, caption and rows"):
        PairSource(PairOptions(str(path)))
    with pytest.raises(ValueError, match=r"must hold .tar shards with images"):
        PairSource(PairOptions(str(tmp_path)))


def test_volumes_are_scaled_and_resized(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    cells = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", cells)
    nibabel.save(nibabel.Nifti1Image(cells + 7, np.eye(4)), tmp_path / "b.nii.gz")
    source = VolumeSource(VolumeOptions(str(tmp_path)))
    expected = torch.from_numpy(cells)[None] / 23
    for i in range(2):
        torch.testing.assert_close(source.read(i, _draw())["volumes"], expected)
    resized = VolumeSource(VolumeOptions(str(tmp_path), size=(4, 6, 8), clip=(0.1, 0.9)))
    volume = resized.read(0, _draw())["volumes"]
    assert volume.shape == resized.sample_shape == (1, 4, 6, 8)
    assert (float(volume.min()), float(volume.max())) == (0.0, 1.0)


def test_images_come_beside_volumes(tmp_path: Path) -> None:
    (tmp_path / "volumes").mkdir()
    np.save(tmp_path / "volumes" / "a.npy", np.arange(24.0).reshape(2, 3, 4))
    for i in range(3):
        _image(tmp_path / "images" / f"{i}.png", 51 * (i + 1))
    options = VolumeOptions(
        str(tmp_path / "volumes"),
        channels=3,
        images=str(tmp_path / "images"),
        images_per_volume=5,
    )
    source = VolumeSource(options)
    assert source.sample_shape == (3, 2, 3, 4)
    assert source.num_images == 3
    sample = source.read(0, _draw())
    torch.testing.assert_close(
        sample["volumes"], (torch.arange(24.0) / 23).view(2, 3, 4).expand(3, 2, 3, 4)
    )
    assert sample["images"].shape == (5, 3, 3, 4)
    drawn = sample["image_index"]
    assert sorted(drawn[:3].tolist()) == [0, 1, 2]  # each once before one comes again
    torch.testing.assert_close(sample["images"][:, 0, 0, 0], 0.2 * (drawn + 1.0))
    assert source.read(0, _draw(1))["image_index"].tolist() != drawn.tolist()
    grey = VolumeSource(VolumeOptions(options.path, images=options.images, images_per_volume=2))
    assert grey.read(0, _draw())["images"].shape == (2, 1, 3, 4)
    assert "images" not in VolumeSource(VolumeOptions(options.path)).read(0, _draw())
    with pytest.raises(FileNotFoundError):
        VolumeSource(VolumeOptions(options.path, images=str(tmp_path / "none")))


def test_bad_volumes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold volumes"):
        VolumeSource(VolumeOptions(str(tmp_path)))
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4)))
    np.save(tmp_path / "b.npy", np.full((2, 3, 5), np.nan))
    with pytest.raises(
        ValueError,
        match=r"one shape unless data.size is given, got \(2, 3, 4\) in .*a.npy and \(2, 3, 5\) in .*b",
    ):
        VolumeSource(VolumeOptions(str(tmp_path)))
    source = VolumeSource(VolumeOptions(str(tmp_path), size=(2, 2, 2)))
    with pytest.raises(ValueError, match=r"must be finite, got NaN or infinity in .*b.npy"):
        source.read(1, _draw())
    np.save(tmp_path / "c.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"must have three axes, none 0, got \(2, 3\) in .*c.npy"):
        VolumeSource(VolumeOptions(str(tmp_path)))
    (tmp_path / "c.npy").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"volumes must be readable, got .*c.npy"):
        VolumeSource(VolumeOptions(str(tmp_path)))
    with pytest.raises(ValueError, match="clip must rise"):
        VolumeOptions("x", clip=(0.9, 0.1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_batches_of_one(world_size: int) -> None:
    whole = list(StepSampler(11, 4, epochs=3, seed=5))
    parts = [
        list(StepSampler(11, 4, epochs=3, seed=5, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [[key for part in parts for key in part[step]] for step in range(6)] == whole
    for epoch in range(3):
        taken = [key for batch in whole[2 * epoch : 2 * epoch + 2] for key in batch]
        assert [e for e, _ in taken] == [epoch] * 8
        assert len({index for _, index in taken}) == 8
    assert whole[0] != [(0, index) for _, index in whole[2]]


def test_a_sampler_goes_on_from_any_step() -> None:
    sampler = StepSampler(11, 4, epochs=3, seed=5)
    whole = list(sampler)
    for start in range(7):
        sampler.start = start
        assert list(sampler) == whole[start:]
    assert len(sampler) == 6


def test_a_sample_depends_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    _image(tmp_path / "0.png", 51)
    captions = [("0.png", f"caption {i}") for i in range(50)]
    path = _table(tmp_path / "pairs.csv", "image,caption", *captions)
    data = SourceDataset(PairSource(PairOptions(str(path), size=(2, 2))), seed=3)
    texts = [data[epoch, 0]["texts"] for epoch in range(8)]
    assert len(set(texts)) > 4
    torch.manual_seed(9)
    assert [data[epoch, 0]["texts"] for epoch in reversed(range(8))] == texts[::-1]


def test_a_loader_takes_nothing_from_the_global_generator(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 2, 2), np.uint8))
    source = ImageSource(ImageOptions(str(tmp_path / "a.npy"), size=(2, 2)))
    loader = ResumableLoader(source, StepSampler(8, 2, epochs=1, seed=0), seed=0, workers=0)
    before = torch.get_rng_state()
    batches = [batch["index"].tolist() for batch in loader]
    assert torch.equal(torch.get_rng_state(), before)
    loader.load_state_dict({"steps_done": 3})
    assert [batch["index"].tolist() for batch in loader] == batches[3:]
    assert loader.state_dict() == {"steps_done": 3}


def test_samples_of_differing_shape_are_refused() -> None:
    samples = [{"volumes": torch.zeros(2)}, {"volumes": torch.zeros(3)}]
    with pytest.raises(
        ValueError, match=r"volumes must have one shape in all samples, got \[\(2,\)"
    ):
        collate(samples)
