"""Files and folders that are whole or absent: written aside, then renamed into place."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyfeat._extras import require

PathLike = str | os.PathLike[str]

_CHECKSUM = "checksum"  # its key among the metadata of a safetensors file
_CHUNK_BYTES = 16 << 20


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; rename it to ``path`` if the block succeeds."""
    partial = _aside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(op: str, path: Path, *, marker: str, force: bool) -> None:
    """Raise unless a folder may be written at ``path``.

    A folder that exists and is not empty is replaced only with ``force``, and only if it holds
    ``marker``, the file that shows it to be one of ours.

    Raises:
        FileExistsError: If something is there that must not be replaced.
    """
    if not path.exists():
        return
    if not path.is_dir():
        message = f"{op}: output must be a folder, got the file {path}"
        raise FileExistsError(message)
    # The process, and the shell it was called from, would go on in a deleted folder.
    if Path.cwd().is_relative_to(path.resolve()):
        message = f"{op}: output must not be the current folder or hold it, got {path}"
        raise FileExistsError(message)
    if not any(path.iterdir()):
        return
    if not force:
        message = f"{op}: output must not exist unless force is given, got {path}"
        raise FileExistsError(message)
    if not (path / marker).is_file():
        message = f"{op}: output must be a folder written by pyfeat (with {marker}), got {path}"
        raise FileExistsError(message)


@contextmanager
def replaced_folder(op: str, path: Path, *, marker: str, force: bool) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of ``path`` if the block succeeds.

    Until then, and if the block fails, what is at ``path`` stays as it is. Of a link to a folder,
    the folder is replaced.

    Raises:
        FileExistsError: As ``check_replaceable``.
    """
    check_replaceable(op, path, marker=marker, force=force)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _aside(path), _aside(path)
    partial.mkdir()
    try:
        yield partial
        check_replaceable(op, path, marker=marker, force=force)  # the block may have taken hours
        if path.exists():
            path.replace(old)
        partial.replace(path)
    finally:
        # Also between the two renames, where Ctrl-C can strike too.
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], *, kind: str, version: int, header: object
) -> None:
    """Write tensors and a JSON header to one safetensors file, with a checksum over both.

    The checksum takes about a second for a gigabyte.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        IsADirectoryError: If ``path`` is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        message = f"{kind}.save: path must lie in an existing folder, got {path}"
        raise FileNotFoundError(message)
    if path.is_dir():
        message = f"{kind}.save: path must be a file, got the folder {path}"
        raise IsADirectoryError(message)
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"kind": kind, "version": str(version), "header": json.dumps(header)}
    metadata[_CHECKSUM] = _checksum(metadata, data)
    write_safetensors(f"{kind}.save", path, data, metadata)


def write_safetensors(
    op: str, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write contiguous tensors of the CPU to a safetensors file, whole or not at all."""
    safetensors = require("safetensors.torch", extra="bank", op=op)
    with written_aside(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        safetensors.save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # some versions of safetensors let nobody but the owner read a file


def load_tensors(
    path: PathLike, *, kind: str, version: int, first_with_checksum: int = 1
) -> tuple[dict[str, Tensor], Any]:
    """Read what ``save_tensors`` wrote, the tensors and the header.

    Files of versions before ``first_with_checksum`` may lack the checksum.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut off or damaged, of another kind, or of a newer version than
            ``version``.
    """
    op = f"{kind}.load"
    path = Path(path)
    if not path.is_file():
        message = f"{op}: path must be an existing file, got {path}"
        raise FileNotFoundError(message)
    safetensors = require("safetensors", extra="bank", op=op)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        message = f"{op}: path must be a whole safetensors file, got {path} ({error})"
        raise ValueError(message) from error
    if metadata.get("kind") != kind:
        message = f"{op}: path must hold a {kind}, got {path} with {metadata.get('kind')}"
        raise ValueError(message)
    check_version(op, path, metadata.get("version"), version)
    noted = metadata.pop(_CHECKSUM, None)
    if noted is not None or int(metadata["version"]) >= first_with_checksum:
        found = _checksum(metadata, tensors)
        if found != noted:
            message = (
                f"{op}: path must be an undamaged file, got {path} (checksum {found}, not {noted})"
            )
            raise ValueError(message)
    try:
        return tensors, json.loads(metadata["header"])
    except (KeyError, ValueError) as error:
        message = f"{op}: path must be an undamaged file, got {path} without a header ({error!r})"
        raise ValueError(message) from error


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of the metadata, and of the names, dtypes, shapes and bytes of contiguous CPU tensors."""
    named = sorted(tensors.items())
    layout = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in named]
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([sorted(metadata.items()), layout]).encode())
    for _, tensor in named:
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        # In parts, between which Ctrl-C is noticed.
        for begin in range(0, len(data), _CHUNK_BYTES):
            digest.update(data[begin : begin + _CHUNK_BYTES])
    return digest.hexdigest()


def read_manifest(op: str, path: Path, version: int) -> dict[str, Any]:
    """Return the fields of the manifest of a saved model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON with a format version, or that version is newer than
            ``version``.
    """
    if not path.is_file():
        message = (
            f"{op}: path must be the folder of a saved model (with {path.name}), got {path.parent}"
        )
        raise FileNotFoundError(message)
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        message = f"{op}: path must hold a whole model, got {path} that is no JSON ({error})"
        raise ValueError(message) from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        message = f"{op}: path must hold a whole model, got {path} without format_version"
        raise ValueError(message)
    check_version(op, path, manifest["format_version"], version)
    return manifest


def check_version(op: str, path: Path, found: object, supported: int) -> None:
    """Raise ValueError unless ``found`` is a format version that this release reads."""
    if not str(found).isdigit() or int(str(found)) > supported:
        message = (
            f"{op}: path must have format version {supported} or older, got {path} with version "
            f"{found}; a newer pyfeat wrote it"
        )
        raise ValueError(message)
