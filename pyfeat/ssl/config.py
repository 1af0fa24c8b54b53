"""The configuration of a run: YAML and ``key=value``, checked whole before the first step."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pyfeat._extras import require
from pyfeat._storage import PathLike
from pyfeat.ssl.options import (
    AT_LEAST_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    describe,
    read_options,
    write_options,
)
from pyfeat.ssl.registry import NETWORKS, OBJECTIVES, SOURCES, Registry, nearest, one_of

OP = "pyfeat train"


@dataclass(frozen=True)
class Optimiser:
    """How weights are changed."""

    name: Annotated[Literal["adamw", "sgd", "lars"], "Rule of the change."] = "adamw"
    lr: Annotated[float, "Learning rate after the warm-up.", POSITIVE] = 1e-3
    weight_decay: Annotated[
        float, "Of weights with two or more axes; biases and norms have none.", NOT_NEGATIVE
    ] = 0.05
    betas: Annotated[
        tuple[float, float], "Decay of both averages of adamw.", Range(low=0, below=1)
    ] = (0.9, 0.999)
    momentum: Annotated[float, "Of sgd and lars.", Range(low=0, below=1)] = 0.9
    warmup_epochs: Annotated[float, "Epochs in which lr rises from 0.", NOT_NEGATIVE] = 0.0
    final_lr: Annotated[float, "Fraction of lr that the cosine ends at.", FRACTION] = 0.0
    clip_norm: Annotated[float | None, "Longest gradient of all weights together.", POSITIVE] = None


@dataclass(frozen=True)
class Training:
    """How long, how and where."""

    epochs: Annotated[int, "Passes over the data.", AT_LEAST_ONE] = 100
    batch_size: Annotated[int, "Samples a step, over all processes together.", AT_LEAST_ONE] = 256
    seed: Annotated[
        int, "Equal seeds give equal runs on the CPU.", Range(low=0, high=2**32 - 1)
    ] = 0
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"], "Of the forward pass, as Lightning names it."
    ] = "32-true"
    accelerator: Annotated[
        Literal["auto", "cpu", "gpu", "mps"], "Kind of device, as Lightning names it."
    ] = "cpu"
    devices: Annotated[int, "Processes on each machine, one a device.", AT_LEAST_ONE] = 1
    nodes: Annotated[int, "Machines.", AT_LEAST_ONE] = 1
    workers: Annotated[int, "Processes that read data, for each device.", NOT_NEGATIVE] = 0
    checkpoint_every: Annotated[int, "Epochs between two checkpoints.", AT_LEAST_ONE] = 1
    keep: Annotated[int, "Newest checkpoints that are kept.", AT_LEAST_ONE] = 2
    log_every: Annotated[int, "Steps between two rows of metrics.", AT_LEAST_ONE] = 10
    progress: Annotated[bool, "Show a bar with the time left."] = True


@dataclass(frozen=True)
class Watch:
    """What is measured while a run goes on."""

    every: Annotated[int, "Epochs between two looks; 0 looks never.", NOT_NEGATIVE] = 5
    samples: Annotated[int, "Samples looked at, spread over the data.", Range(low=4)] = 2048
    k: Annotated[int, "Neighbours that vote in the kNN probe.", AT_LEAST_ONE] = 20
    temperature: Annotated[
        float | None, "A vote weighs exp(cosine / temperature); null: all alike.", POSITIVE
    ] = None
    held_out: Annotated[
        float, "Fraction of them that the probes are tested on.", Range(above=0, below=1)
    ] = 0.25
    linear: Annotated[bool, "Fit a linear probe at the end, where data have labels."] = True
    min_rank: Annotated[
        float, "Alarm below this effective rank of the embeddings.", NOT_NEGATIVE
    ] = 2.0
    max_uniformity: Annotated[
        float, "Alarm above this uniformity (0: all equal), from Wang and Isola."
    ] = -0.05


@dataclass(frozen=True)
class Named:
    """Something from a table.

    Attributes:
        name: Its name there.
        options: An instance of its options dataclass.
    """

    name: str
    options: Any


@dataclass(frozen=True)
class Config:
    """One run, checked.

    Attributes:
        out: Folder of the run.
        data: What is trained on.
        network: The backbone.
        objective: What is minimised.
        optimiser: How weights are changed.
        training: How long, how and where.
        watch: What is measured meanwhile.
    """

    out: str
    data: Named
    network: Named
    objective: Named
    optimiser: Optimiser = Optimiser()
    training: Training = Training()
    watch: Watch = Watch()


_TABLES = {"data": SOURCES, "network": NETWORKS, "objective": OBJECTIVES}
_SECTIONS: dict[str, type[Any]] = {"optimiser": Optimiser, "training": Training, "watch": Watch}


def load_config(path: PathLike, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration from a YAML file.

    Args:
        path: The file.
        overrides: Such as "optimiser.lr=0.1", read as YAML; they win over the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML with sections, or as ``make_config``.
        ImportError: If the extra ``train`` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        message = f"{OP}: config must be an existing YAML file, got {path}"
        raise FileNotFoundError(message)
    values = _parsed(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        message = f"{OP}: config must hold sections with keys, got {path} without"
        raise ValueError(message)
    for override in overrides:
        _override(values, override)
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> Config:
    """Check a configuration.

    Args:
        values: By section, as in YAML: ``out``, ``data``, ``network`` and ``objective``, each with
            a ``name`` and the options of that name, and ``optimiser``, ``training``, ``watch``.

    Raises:
        ValueError: If a section, name or key is unknown or missing, or a value is of another type
            or out of range; names the key, and the nearest one if it is unknown.
        ImportError: If the extra ``train`` is not installed.
    """
    known = ["out", *_TABLES, *_SECTIONS]
    for section, value in values.items():
        if section not in known:
            message = f"{OP}: {section} must be a known section, got {section!r}"
            raise ValueError(message + (nearest(section, known) or f"; known: {one_of(known)}"))
        if section != "out" and not isinstance(value, Mapping):
            message = f"{OP}: {section} must be a section with keys, got {value!r}"
            raise ValueError(message)
    out = values.get("out")
    if not isinstance(out, str) or not out:
        message = f"{OP}: out must be the folder of the run, got {out!r}"
        raise ValueError(message)
    sections: dict[str, Any] = {
        section: _named(section, table, values) for section, table in _TABLES.items()
    }
    for section, options in _SECTIONS.items():
        sections[section] = read_options(OP, section, options, values.get(section, {}))
    return Config(out, **sections)


def config_values(config: Config) -> dict[str, Any]:
    """Return a configuration as ``make_config`` takes it, every key written out."""
    values: dict[str, Any] = {"out": config.out}
    for field in dataclasses.fields(config)[1:]:
        section = getattr(config, field.name)
        if isinstance(section, Named):
            values[field.name] = {"name": section.name, **write_options(section.options)}
        else:
            values[field.name] = write_options(section)
    return values


def help_text() -> str:
    """Return what every key means, with its type, range and default."""
    return "\n".join(_help_lines())


def _help_lines() -> Iterator[str]:
    yield "out (a text; must be given)\n    Folder of the run."
    for section, table in _TABLES.items():
        for entry in table.entries():
            yield f"\n{section}.name: {entry.name}"
            yield from describe(section, entry.options)
    for section, options in _SECTIONS.items():
        yield f"\n{section}"
        yield from describe(section, options)


def _named(section: str, table: Registry[Any], values: Mapping[str, Any]) -> Named:
    given = dict(values.get(section, {}))
    if "name" not in given:
        names = one_of(entry.name for entry in table.entries())
        message = f"{OP}: {section}.name must be {names}, got nothing"
        raise ValueError(message)
    try:
        entry = table.find(given.pop("name"))
    except ValueError as error:
        message = f"{OP}: {section}.name: {error}"
        raise ValueError(message) from error
    return Named(entry.name, read_options(OP, section, entry.options, given))


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        message = f"{OP}: overrides must read key=value, got {override!r}"
        raise ValueError(message)
    *sections, key = name.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            message = f"{OP}: {section} must be a section with keys, got {place!r} for {override!r}"
            raise ValueError(message)
    place[key] = _parsed(text, override)


def _parsed(text: str, source: str) -> Any:
    yaml = require("yaml", extra="train", op=OP)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        message = f"{OP}: config must be YAML, got {source} ({error})"
        raise ValueError(message) from error
