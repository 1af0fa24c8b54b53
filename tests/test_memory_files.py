"""The file of a memory bank: what is kept, what is refused, what survives."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pyfeat._checks import DTYPES, dtype_name
from pyfeat.memory import MemoryBank
from tests.support_memory import assert_same, numbers

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(0,), (1,), (40,), (40, 3)], ids=str)
def test_a_loaded_bank_equals_the_saved_one(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ids = torch.randint(-9, 9, shape)
    bank = MemoryBank(torch.randn(shape[0], 5).to(dtype), metric="inner_product", ids=ids)
    if shape[0] > 1:
        bank.coreset(size=30)
        bank.add(torch.randn(1, 5).to(dtype), ids[:1])  # so that there is room behind the rows
    bank.save(str(tmp_path / "bank"))
    assert_same(MemoryBank.load(str(tmp_path / "bank")), bank)
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_a_radius_that_may_be_untrue_is_not_saved(tmp_path: Path) -> None:
    bank = MemoryBank(torch.randn(20, 5))
    bank.coreset(size=9)
    bank.features[3] = 0.0
    bank.save(tmp_path / "bank")
    assert MemoryBank.load(tmp_path / "bank").radius is None


def test_an_empty_bank_is_saved_too(tmp_path: Path) -> None:
    MemoryBank(metric="cosine").save(tmp_path / "bank")
    assert_same(MemoryBank.load(tmp_path / "bank"), MemoryBank(metric="cosine"))


def test_default_ids_are_not_given_twice_after_remove_and_load(tmp_path: Path) -> None:
    bank = MemoryBank(torch.randn(4, 3))
    bank.remove(numbers(3, 0))
    bank.add(torch.randn(1, 3))
    assert torch.equal(bank.ids, numbers(1, 2, 4))
    bank.remove(numbers(4))
    bank.save(tmp_path / "bank")
    loaded = MemoryBank.load(tmp_path / "bank")
    loaded.add(torch.randn(1, 3))
    assert torch.equal(loaded.ids, numbers(1, 2, 5))


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
def test_others_may_read_the_file_if_they_may_read_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    MemoryBank(torch.eye(3)).save(tmp_path / "bank")
    assert (tmp_path / "bank").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_over_the_file_of_a_loaded_bank_works(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    MemoryBank(torch.eye(3)).save(path)
    bank = MemoryBank.load(path)
    bank.add(torch.ones(1, 3))
    bank.save(path)
    assert_same(MemoryBank.load(path), bank)


def test_a_cut_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    MemoryBank(torch.randn(20, 4)).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"MemoryBank.load: path must be a whole safetensors"):
            MemoryBank.load(path)


def edit(path: Path, old: bytes, new: bytes) -> None:
    whole = path.read_bytes()
    assert whole.count(old) == 1
    assert len(new) == len(old)
    path.write_bytes(whole.replace(old, new))


# What a header may be changed to without harm to its form.
EDITS: dict[str, tuple[bytes, bytes]] = {
    "metric": (b"euclidean", b"nuclidean"),
    "other metric": (b'\\"euclidean\\"', b'\\"cosine\\"   '),
    "next id": (b'next_id\\": 6', b'next_id\\": 5'),
    "radius": (b'radius\\": 1.5', b'radius\\": 1.4'),
    "shape": (b'"shape":[6,4]', b'"shape":[4,6]'),
    "dtype": (b'"BF16"', b'"F16" '),
    "version": (b'"version":"2"', b'"version":"1"'),
    "checksum": (b'"checksum"', b'"checksun"'),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "bank"
    bank = MemoryBank(metric="euclidean")
    bank.cover(torch.randn(6, 4).bfloat16() * 100.0, radius=1.5)
    bank.save(path)
    return path


@pytest.mark.parametrize("case", EDITS)
def test_a_changed_header_is_refused(saved: Path, case: str) -> None:
    edit(saved, *EDITS[case])
    message = r"MemoryBank\.load: path must be an undamaged file, got .*bank \(checksum \w+, not"
    with pytest.raises(ValueError, match=message):
        MemoryBank.load(saved)


@pytest.mark.slow
def test_a_changed_byte_is_refused_wherever_it_is(saved: Path) -> None:
    whole = saved.read_bytes()
    data_bytes = 6 * 4 * 2 + 6 * 8
    for position in range(len(whole)):
        in_data = position >= len(whole) - data_bytes
        message = "be an undamaged file" if in_data else ""
        for flipped in (1, 32, 255):
            broken = bytearray(whole)
            broken[position] ^= flipped
            saved.write_bytes(broken)
            with pytest.raises(ValueError, match=rf"MemoryBank\.load: path must {message}"):
                MemoryBank.load(saved)
    saved.write_bytes(whole)
    assert len(MemoryBank.load(saved)) == 6


def save_as(path: Path, header: object = None, **metadata: str) -> None:
    """As version 1 was saved, without a checksum."""
    tensors = {"features": torch.eye(2), "ids": torch.tensor([4, 3])}
    header = {"metric": "cosine", "next_id": 7} if header is None else header
    metadata = {"kind": "MemoryBank", "version": "1", "header": json.dumps(header)} | metadata
    safetensors.torch.save_file(tensors, path, metadata)


def test_a_file_of_version_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    save_as(path)
    bank = MemoryBank.load(path)
    assert_same(bank, MemoryBank(torch.eye(2), metric="cosine", ids=numbers(4, 3)))
    bank.add(torch.eye(2))
    assert torch.equal(bank.ids, numbers(4, 3, 7, 8))
    bank.save(path)
    assert_same(MemoryBank.load(path), bank)


def test_load_refuses_files_that_are_no_bank_it_can_read(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    save_as(path, kind="Codebook")
    with pytest.raises(ValueError, match=r"path must hold a MemoryBank, got .* with Codebook"):
        MemoryBank.load(path)
    safetensors.torch.save_file({"x": torch.eye(2)}, path)
    with pytest.raises(ValueError, match=r"path must hold a MemoryBank, got .* with None"):
        MemoryBank.load(path)
    for version in ("3", "1.5", "next"):
        save_as(path, version=version)
        with pytest.raises(ValueError, match=f"version 2 or older, got .* version {version}; a ne"):
            MemoryBank.load(path)
    save_as(path, version="2")
    with pytest.raises(ValueError, match=r"path must be an undamaged file, got .*, not None\)"):
        MemoryBank.load(path)


BAD_HEADERS: dict[str, object] = {
    "no metric": {"next_id": 1},
    "no id": {"metric": "euclidean"},
    "metric": {"metric": "manhattan", "next_id": 1},
    "radius": {"metric": "euclidean", "next_id": 1, "radius": "far"},
    "list": [],
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_load_refuses_a_header_that_is_not_whole(tmp_path: Path, case: str) -> None:
    save_as(tmp_path / "bank", header=BAD_HEADERS[case])
    with pytest.raises(
        ValueError, match=r"MemoryBank\.load: path must hold a whole bank, got .*bank"
    ):
        MemoryBank.load(tmp_path / "bank")


def test_load_and_save_say_when_the_path_is_wrong(tmp_path: Path) -> None:
    bank = MemoryBank(torch.eye(2))
    with pytest.raises(FileNotFoundError, match=r"load: path must be an existing file, got .*none"):
        MemoryBank.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="load: path must be an existing file"):
        MemoryBank.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="save: path must lie in an existing folder"):
        bank.save(tmp_path / "none" / "bank")
    with pytest.raises(IsADirectoryError, match="save: path must be a file, got the folder"):
        bank.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_older_file_as_it_was(
    tmp_path: Path, monkeypatch: Patch, error: BaseException
) -> None:
    path = tmp_path / "bank"
    MemoryBank(torch.eye(3)).save(path)
    before = path.read_bytes()

    def fail(_tensors: object, file: Path, **_options: object) -> None:
        Path(file).write_bytes(b"half of")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for target in (path, tmp_path / "other"):
        with pytest.raises(type(error)):
            MemoryBank(torch.eye(4)).save(target)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
