"""Folders and files are replaced as a whole or not at all."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pyfeat import _storage
from pyfeat._storage import (
    check_replaceable,
    check_version,
    load_tensors,
    replaced_folder,
    save_tensors,
    written_aside,
)

Patch = pytest.MonkeyPatch
MARKER = "model.json"


def write(
    path: Path,
    *,
    force: bool = False,
    files: tuple[str, ...] = (MARKER, "new"),
    error: BaseException | None = None,
) -> None:
    with replaced_folder("save", path, marker=MARKER, force=force) as folder:
        assert list(folder.iterdir()) == []
        for name in files:
            (folder / name).write_text("new")
        if error:
            (folder / "sub").mkdir()
            raise error


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden things too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


NEW = {MARKER: b"new", "new": b"new"}


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A folder written earlier; whatever happens to it, nothing may be left beside it."""
    path = tmp_path / "out"
    (path / "deep").mkdir(parents=True)
    (path / MARKER).write_bytes(b"old")
    (path / "deep" / "data").write_bytes(bytes(range(256)))
    yield path
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b" / "out")
    assert tree(tmp_path / "a" / "b") == {"out": None} | {f"out/{n}": v for n, v in NEW.items()}


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_filled(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", force=force)
    assert tree(tmp_path / "out") == NEW
    assert names(tmp_path) == ["out"]


def test_a_folder_is_replaced_only_with_force(old: Path) -> None:
    before = tree(old)
    with pytest.raises(FileExistsError, match="save: output must not exist unless force is given"):
        write(old)
    assert tree(old) == before
    write(old, force=True)
    assert tree(old) == NEW


def test_a_folder_without_the_marker_is_never_replaced(old: Path) -> None:
    (old / MARKER).unlink()
    (old / MARKER).mkdir()  # a folder of that name is no marker
    before = tree(old)
    message = rf"save: output must be a folder written by pyfeat \(with {MARKER}\), got .*out"
    with pytest.raises(FileExistsError, match=message):
        write(old, force=True)
    assert tree(old) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match=r"save: output must be a folder, got the file .*out"):
        write(tmp_path / "out", force=force)
    assert tree(tmp_path) == {"out": b"mine"}


ERRORS = (RuntimeError("failed"), OSError("disk full"), KeyboardInterrupt(), SystemExit(1))


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_failure_inside_the_block_leaves_the_old_folder(old: Path, error: BaseException) -> None:
    before = tree(old)

    with pytest.raises(type(error)):
        write(old, force=True, error=error)
    assert tree(old) == before


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_inside_the_block_leaves_nothing_new(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", error=KeyboardInterrupt())
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_failure_at_a_rename_leaves_one_whole_folder(
    old: Path, monkeypatch: Patch, error: BaseException, call: int, late: bool
) -> None:
    before, calls = tree(old), 0
    rename = Path.replace

    def fail_once(source: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == call and not late:
            raise error
        result = rename(source, target)
        if calls == call:
            raise error
        return result

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(type(error)):
        write(old, force=True)
    assert tree(old) == (NEW if (call, late) == (2, True) else before)


def test_what_somebody_else_put_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write_slowly() -> None:
        with replaced_folder("save", out, marker=MARKER, force=False):
            out.mkdir()
            (out / "mine").write_text("precious")

    with pytest.raises(FileExistsError, match="output must not exist unless force is given"):
        write_slowly()
    assert tree(tmp_path) == {"out": None, "out/mine": b"precious"}


def test_a_folder_that_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    write(tmp_path / "out", files=(MARKER,))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "in use")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        write(tmp_path / "out", force=True)
    assert tree(tmp_path / "out") == NEW


@pytest.mark.parametrize("path", ["out", "./out", "sub/../out", "sub/../out/"])
def test_a_relative_path_counts_from_the_current_folder(
    old: Path, monkeypatch: Patch, path: str
) -> None:
    (old / "sub").mkdir()
    monkeypatch.chdir(old)
    write(Path(path))
    assert tree(old / "out") == NEW
    assert names(old / "sub") == []
    write(Path(path), force=True, files=(MARKER,))
    assert tree(old / "out") == {MARKER: b"new"}


def test_a_relative_path_counts_from_where_the_block_began(old: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(old)
    with replaced_folder("save", Path("out"), marker=MARKER, force=False) as folder:
        monkeypatch.chdir(old / "deep")
        (folder / MARKER).write_text("new")
    assert tree(old / "out") == {MARKER: b"new"}
    assert names(old / "deep") == ["data"]


@pytest.mark.parametrize("path", [".", "", "..", "../../out", "../.."])
@pytest.mark.parametrize("force", [False, True])
def test_the_current_folder_is_not_pulled_away(
    old: Path, monkeypatch: Patch, path: str, force: bool
) -> None:
    before = tree(old)
    monkeypatch.chdir(old / "deep")
    with pytest.raises(FileExistsError, match="output must not be the current folder or hold it"):
        write(Path(path), force=force)
    assert Path.cwd() == old / "deep"
    assert tree(old) == before


@pytest.fixture
def links(tmp_path: Path) -> Path:
    try:
        (tmp_path / "probe").symlink_to("nowhere")
    except OSError:
        pytest.skip("needs the right to make links")
    (tmp_path / "probe").unlink()
    return tmp_path


@pytest.mark.parametrize("exists", [False, True])
def test_of_a_link_the_folder_it_points_to_is_replaced(links: Path, exists: bool) -> None:
    (links / "link").symlink_to("disk/out")
    if exists:
        write(links / "disk" / "out", files=(MARKER,))
    write(links / "link", force=True)
    assert (links / "link").readlink() == Path("disk/out")
    assert tree(links / "disk" / "out") == NEW
    assert names(links) == ["disk", "link"]
    assert names(links / "disk") == ["out"]


def test_the_check_alone_writes_nothing(old: Path) -> None:
    before = tree(old)
    check_replaceable("fit", old, marker=MARKER, force=True)
    check_replaceable("fit", old / "new" / "deep", marker=MARKER, force=False)
    with pytest.raises(FileExistsError, match="fit: output must not exist"):
        check_replaceable("fit", old, marker=MARKER, force=False)
    assert tree(old) == before


def test_a_file_written_aside_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_aside(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    with written_aside(path) as partial:
        partial.write_text("two")
        assert path.read_text() == "one"

    def write_half() -> None:
        with written_aside(path) as partial:
            partial.write_text("thr")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert tree(tmp_path) == {"file": b"two"}


def test_a_version_is_read_up_to_the_supported_one() -> None:
    supported: tuple[object, ...] = (1, 2, "2")
    for found in supported:
        check_version("load", Path("file"), found, 2)
    refused: tuple[object, ...] = (3, "10", None, "", "-1", 1.5)
    for found in refused:
        with pytest.raises(ValueError, match=f"version 2 or older, got file with version {found};"):
            check_version("load", Path("file"), found, 2)


# Tensors

TENSORS: dict[str, Tensor] = {
    "bytes": torch.arange(200, dtype=torch.uint8),
    "empty": torch.empty(0, 7, dtype=torch.float64),
    "flags": torch.arange(9) % 2 == 0,
    "half": torch.arange(30).bfloat16().reshape(5, 6),
    "number": torch.tensor(3.5),
    "strided": torch.arange(24.0).reshape(4, 6).T,
}


def save(path: Path, tensors: dict[str, Tensor] = TENSORS, header: object = None) -> None:
    save_tensors(path, tensors, kind="Things", version=3, header=header)


def load(path: Path, **options: Any) -> tuple[dict[str, Tensor], Any]:
    return load_tensors(path, kind="Things", version=3, **options)


def checksum_of(path: Path) -> str:
    with safetensors.safe_open(path, framework="pt") as file:
        return str(file.metadata()["checksum"])


def test_tensors_and_header_come_back_as_they_were(tmp_path: Path) -> None:
    header = {"name": 'a "quoted" μ', "numbers": [1, 0.1, None]}
    save(tmp_path / "file", header=header)
    tensors, found = load(tmp_path / "file")
    assert found == header
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert names(tmp_path) == ["file"]


def test_the_checksum_is_that_of_the_content(tmp_path: Path, monkeypatch: Patch) -> None:
    save(tmp_path / "file")
    expected = checksum_of(tmp_path / "file")
    assert len(expected) == 32
    save(tmp_path / "file", dict(reversed(TENSORS.items())))
    assert checksum_of(tmp_path / "file") == expected
    monkeypatch.setattr(_storage, "_CHUNK_BYTES", 7)  # cuts through numbers and tensors
    save(tmp_path / "file")
    assert checksum_of(tmp_path / "file") == expected
    others: list[dict[str, Tensor]] = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2), "b": torch.zeros(2)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
    ]
    found = set()
    for other in others:
        save(tmp_path / "file", other)
        found.add(checksum_of(tmp_path / "file"))
    assert len(found) == len(others)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_damage_is_noticed_in_every_part(
    tmp_path: Path, monkeypatch: Patch, chunk_bytes: int
) -> None:
    path = tmp_path / "file"
    save(path, {"a": torch.arange(40), "b": torch.arange(40).bfloat16()})
    whole = path.read_bytes()
    monkeypatch.setattr(_storage, "_CHUNK_BYTES", chunk_bytes)
    load(path)
    for position in range(len(whole) - 400, len(whole), 3):
        broken = bytearray(whole)
        broken[position] ^= 16
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"Things\.load: path must be an undamaged file, got "):
            load(path)


def test_only_files_of_older_versions_may_lack_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    metadata = {"kind": "Things", "version": "2", "header": "[1]"}
    safetensors.torch.save_file(TENSORS | {"strided": torch.eye(2)}, path, metadata)
    assert load(path, first_with_checksum=3)[1] == [1]
    for first in (1, 2):
        with pytest.raises(
            ValueError, match=r"undamaged file, got .* \(checksum \w{32}, not None\)"
        ):
            load(path, first_with_checksum=first)
    with pytest.raises(ValueError, match=r"undamaged file, got .*, not None"):
        load(path)


@pytest.mark.parametrize("header", [None, "", "{"], ids=repr)
def test_a_file_without_a_header_is_refused(tmp_path: Path, header: str | None) -> None:
    metadata = {"kind": "Things", "version": "1"} | ({} if header is None else {"header": header})
    safetensors.torch.save_file({"a": torch.eye(2)}, tmp_path / "file", metadata)
    with pytest.raises(
        ValueError, match=r"Things\.load: path must be an undamaged file, .*without a"
    ):
        load(tmp_path / "file", first_with_checksum=2)
