"""Images with captions: a table, or shards of tar files."""

import io
import json
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

import torch

from pyfeat._extras import require
from pyfeat.anomaly.images import SUFFIXES, Item
from pyfeat.ssl.data.images import check_formats, read_pixels, read_table
from pyfeat.ssl.data.source import OP, Sample, Source
from pyfeat.ssl.options import AT_LEAST_ONE
from pyfeat.ssl.registry import SOURCES


@dataclass(frozen=True)
class PairOptions:
    """Images and what is said of them."""

    path: Annotated[
        str,
        "CSV file with the columns image (path, relative to the file) and caption, a row for each "
        "caption; or a folder of .tar shards, in which x.jpg goes with x.txt (a caption a line) or "
        "x.json (a caption, a list of them, or an object with the key caption).",
    ]
    size: Annotated[tuple[int, int], "Height and width to resize to.", AT_LEAST_ONE] = (64, 64)
    captions: Annotated[
        Literal["one", "all"], "Draw one caption of an image each time, or give all as a list."
    ] = "one"


class _Member(NamedTuple):
    """Where the bytes of a file lie in a shard."""

    shard: str
    offset: int
    size: int


class _Pair(NamedTuple):
    name: str
    image: str | _Member
    captions: tuple[str, ...]


@SOURCES.register("pairs", PairOptions)
class PairSource(Source):
    """Images as ``images`` (3, H, W) float32 in [0, 1], and ``texts``: a caption, or a list of them.

    Shards are read in any order: only their tables of contents are kept in memory, and captions.

    Args:
        options: As a configuration has them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there are no pairs, an image is of no known format, or a caption is missing.
    """

    def __init__(self, options: PairOptions) -> None:
        self._options = options
        self.sample_shape = (3, *options.size)
        path = Path(options.path)
        self._pairs = _pairs_of_shards(path) if path.is_dir() else _pairs_of_table(path)
        silent = [pair.name for pair in self._pairs if not pair.captions]
        if silent:
            shown = ", ".join(silent[:5])
            message = f"{OP}: images must have captions, got {len(silent)} without: {shown}"
            raise ValueError(message)

    def __len__(self) -> int:
        """Return N."""
        return len(self._pairs)

    def read(self, index: int, generator: torch.Generator) -> Sample:
        """Return one pair."""
        pair = self._pairs[index]
        pixels = read_pixels(_opened(pair), self._options.size, pair.name)
        if self._options.captions == "all":
            return {"images": pixels, "texts": list(pair.captions)}
        drawn = int(torch.randint(len(pair.captions), (), generator=generator))
        return {"images": pixels, "texts": pair.captions[drawn]}

    def name(self, index: int) -> str:
        """Return the path of an image, in a shard after its name."""
        return self._pairs[index].name


def _pairs_of_table(path: Path) -> list[_Pair]:
    captions: dict[str, list[str]] = defaultdict(list)
    for row in read_table(path, ("image", "caption")):
        text = (row["caption"] or "").strip()
        captions[row["image"]] += [text] if text else []
    files = [str(path.parent / image) for image in captions]
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        shown = ", ".join(missing[:5])
        message = f"{OP}: images must exist, got {len(missing)} that do not: {shown}"
        raise FileNotFoundError(message)
    check_formats(files)
    return [_Pair(f, f, tuple(t)) for f, t in zip(files, captions.values(), strict=True)]


def _pairs_of_shards(folder: Path) -> list[_Pair]:
    shards = sorted(folder.glob("*.tar"))
    pairs = [pair for shard in shards for pair in _pairs_of_shard(shard)]
    if not pairs:
        message = f"{OP}: data.path must hold .tar shards with images, got {folder} with none"
        raise ValueError(message)
    return pairs


def _pairs_of_shard(shard: Path) -> list[_Pair]:
    images: dict[str, tuple[str, _Member]] = {}
    captions: dict[str, tuple[str, ...]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                key, suffix = str(path.with_suffix("")), path.suffix.lower()
                if not member.isfile():
                    continue
                if suffix in SUFFIXES.split():
                    place = _Member(str(shard), member.offset_data, member.size)
                    images[key] = (f"{shard}:{member.name}", place)
                elif suffix in (".txt", ".json") and (file := archive.extractfile(member)):
                    captions[key] = _captions(file.read().decode("utf-8"), suffix, member.name)
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        message = f"{OP}: shards must be whole .tar files, got {shard} ({error})"
        raise ValueError(message) from error
    return [_Pair(name, place, captions.get(key, ())) for key, (name, place) in images.items()]


def _captions(text: str, suffix: str, name: str) -> tuple[str, ...]:
    found: object = text.splitlines()
    if suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            message = f"{OP}: captions must be JSON in a .json file, got {name} ({error})"
            raise ValueError(message) from error
        if isinstance(found, dict):
            found = found.get("caption", [])
        found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
        message = f"{OP}: captions must be texts, got {found!r} in {name}"
        raise ValueError(message)
    return tuple(caption.strip() for caption in found if caption.strip())


def _opened(pair: _Pair) -> Item:
    """Return the path of a file, or the decoded image of a shard."""
    if isinstance(pair.image, str):
        return pair.image
    with Path(pair.image.shard).open("rb") as file:
        file.seek(pair.image.offset)
        data = file.read(pair.image.size)
    pil = require("PIL.Image", extra="train", op=OP)
    try:
        image: Item = pil.open(io.BytesIO(data))
    except Exception as error:
        message = f"{OP}: data must be readable, got {pair.name}: {error}"
        raise ValueError(message) from error
    return image
