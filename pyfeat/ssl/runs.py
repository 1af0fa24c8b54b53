"""Run folders: what a run left behind, and the backbone in it."""

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pyfeat import _C
from pyfeat._extras import require
from pyfeat._storage import PathLike, check_replaceable, written_aside
from pyfeat.ssl.checkpoints import checkpoints_of, read_manifest, read_weights
from pyfeat.ssl.config import OP, Config, config_values, load_config
from pyfeat.ssl.metrics import CURVES, METRICS, read_metrics
from pyfeat.ssl.registry import NETWORKS, OBJECTIVES

M = TypeVar("M", bound=nn.Module)

CONFIG, VERSIONS, FAILED_BATCH = "config.yaml", "versions.json", "failed_batch.txt"
# What may differ in a run that goes on, beside ``watch``; no bit of the weights depends on it.
_FREE = {"out", "watch", "training.workers", "training.checkpoint_every", "training.keep"}
_FREE |= {"training.log_every", "training.progress", "training.devices", "training.nodes"}


class Run:
    """A run folder.

    Args:
        folder: That ``fit`` wrote.

    Attributes:
        folder: As given.
        config: Of the run.

    Raises:
        FileNotFoundError: If it is no run folder.
        ValueError: If its configuration cannot be read.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        if not (self.folder / CONFIG).is_file():
            message = f"{OP}: run must be a folder with {CONFIG}, got {self.folder}"
            raise FileNotFoundError(message)
        self.config = load_config(self.folder / CONFIG)

    def checkpoint(self) -> Path | None:
        """Return the newest checkpoint, None if there is none."""
        found = checkpoints_of(self.folder)
        return found[-1] if found else None

    @property
    def steps_done(self) -> int:
        """Steps until the newest checkpoint."""
        newest = self.checkpoint()
        return int(read_manifest(newest)["step"]) if newest else 0

    @property
    def finished(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        newest = self.checkpoint()
        return newest is not None and bool(read_manifest(newest)["finished"])

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one image or volume that was trained on; empty without a checkpoint."""
        newest = self.checkpoint()
        return tuple(read_manifest(newest)["sample_shape"]) if newest else ()

    def metrics(self) -> list[tuple[int, float, str, float]]:
        """Return step, epoch, name and value of all figures."""
        return read_metrics(self.folder)

    def backbone(self) -> nn.Module:
        """Return the trained backbone, in evaluation mode and on the CPU; of ``dino`` the teacher's.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If it is damaged, or does not fit the network of the configuration.
        """
        network = self.config.network
        with torch.random.fork_rng():
            backbone: nn.Module = NETWORKS.find(network.name).make(network.options)
        made: Any = OBJECTIVES.find(self.config.objective.name).make
        return self.load_part(backbone, made.handed_over, f"network {network.name}")

    def objective(self) -> Any:
        """Return the trained objective with all its parts, in evaluation mode and on the CPU.

        Of ``clip``, ``encode_images`` and ``encode_texts`` are what ``pyfeat.ssl.zero_shot`` takes.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If it is damaged, or does not fit the objective of the configuration, as one
                that keeps something of every sample does not.
        """
        from pyfeat.ssl.objectives.base import Plan

        training, network, named = self.config.training, self.config.network, self.config.objective
        plan = Plan(
            self.config.optimiser,
            epochs=training.epochs,
            batch_size=training.batch_size,
            sample_shape=self.sample_shape,
        )
        with torch.random.fork_rng():
            backbone = NETWORKS.find(network.name).make(network.options)
            made: nn.Module = OBJECTIVES.find(named.name).make(backbone, named.options, plan)
        return self.load_part(made, "", f"objective {named.name}")

    def load_part(self, module: M, name: str, kind: str) -> M:
        """Give a module the trained weights of a part of the objective.

        Args:
            module: Made as that part was.
            name: Of the part, such as "backbone"; empty for all of it.
            kind: What it is, for a message.

        Returns:
            The module, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If it is damaged, or does not fit.
        """
        newest = self.checkpoint()
        if newest is None:
            message = f"{OP}: run must have a checkpoint, got {self.folder} without"
            raise FileNotFoundError(message)
        prefix = f"{name}." if name else ""
        weights = {
            key.removeprefix(prefix): value
            for key, value in read_weights(newest).items()
            if key.startswith(prefix)
        }
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            message = f"{OP}: checkpoint must fit the {kind}, got {newest} ({error})"
            raise ValueError(message) from error
        return module.eval()


def start_run(config: Config, *, force: bool) -> None:
    """Make the folder of a run; in a process that is not the first, nothing.

    Raises:
        FileExistsError: If it is there and not empty, unless ``force`` is given and it is a run.
    """
    if not is_first_process():
        return
    folder = Path(config.out)
    check_replaceable(OP, folder, marker=CONFIG, force=force)
    for old in (CONFIG, METRICS, CURVES, VERSIONS, FAILED_BATCH):
        (folder / old).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    _write(folder / VERSIONS, json.dumps(_versions(), indent=2) + "\n")
    yaml = require("yaml", extra="train", op=OP)
    _write(folder / CONFIG, yaml.safe_dump(config_values(config), sort_keys=False))


def continue_run(config: Config, num_samples: int) -> Path | None:
    """Return the newest checkpoint of the folder, None if there is none.

    Args:
        config: Of the run that is to go on.
        num_samples: That the data have.

    Raises:
        ValueError: If a key that the weights depend on differs from the run there, which is named, or
            the number of samples does.
    """
    folder = Path(config.out)
    newest = Run(folder).checkpoint() if (folder / CONFIG).is_file() else None
    if newest is None:
        return None
    before, asked = (_flat(config_values(c)) for c in (Run(folder).config, config))
    for key in sorted({*before, *asked}):
        section = key.partition(".")[0]
        if before.get(key) != asked.get(key) and not {key, section} & _FREE:
            message = f"{OP}: {key} must be that of the run in {folder}, {before.get(key)!r}, "
            raise ValueError(message + f"got {asked.get(key)!r}")
    manifest = read_manifest(newest)
    if manifest["objective"] != config.objective.name:
        message = f"{OP}: checkpoint must be of {config.objective.name}, got {newest} of "
        raise ValueError(message + manifest["objective"])
    if manifest["num_samples"] != num_samples:
        message = (
            f"{OP}: data must have as many samples as those that {newest} was trained on, "
            f"{manifest['num_samples']}, got {num_samples}"
        )
        raise ValueError(message)
    return newest


def is_first_process() -> bool:
    """Whether this process is the one that writes, by what a launcher says of it."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in values.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        flat.update({f"{section}.{key}" if key else section: x for key, x in items})
    return flat


def _versions() -> dict[str, str]:
    found = {"pyfeat": _C.__version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "kornia", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _write(path: Path, text: str) -> None:
    with written_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")
