"""Checkpoints: a folder with weights in safetensors and what else a run goes on from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from pyfeat._storage import PathLike, load_tensors, replaced_folder, save_tensors

OP = "pyfeat train"
WEIGHTS = "weights.safetensors"
_STATE, _MANIFEST = "state.pt", "checkpoint.json"
_MANIFEST_KEYS = ("objective", "step", "finished", "sample_shape", "num_samples")
_KIND, _VERSION = "checkpoint", 1


class FolderIO(CheckpointIO):
    """How Lightning writes and reads a checkpoint: whole or not at all, and without code in it.

    Args:
        objective: Name of the objective, for the manifest.
        total_steps: Of the run.
        sample_shape: Of one image or volume, for the manifest.
        num_samples: Of the data, for the manifest.
    """

    def __init__(
        self,
        objective: str,
        *,
        total_steps: int,
        sample_shape: tuple[int, ...] = (),
        num_samples: int = 0,
    ) -> None:
        self._objective, self._total_steps = objective, total_steps
        self._sample_shape, self._num_samples = sample_shape, num_samples

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: PathLike, storage_options: object = None
    ) -> None:
        """Write a folder beside ``path``, and rename it.

        Raises:
            ValueError: If a weight is NaN or infinite; nothing is written.
        """
        state = dict(checkpoint)
        weights = _independent(state.pop("state_dict"))
        broken = [
            name for name, x in weights.items() if x.is_floating_point() and not x.isfinite().all()
        ]
        if broken:
            message = (
                f"{OP}: weights must be finite, got NaN or infinity in {', '.join(broken[:3])}"
            )
            raise ValueError(message)
        step = state["global_step"]
        manifest = {
            "objective": self._objective,
            "step": step,
            "finished": step >= self._total_steps,
            "sample_shape": list(self._sample_shape),
            "num_samples": self._num_samples,
        }
        with replaced_folder(OP, Path(path), marker=_MANIFEST, force=True) as folder:
            save_tensors(folder / WEIGHTS, weights, kind=_KIND, version=_VERSION, header=manifest)
            torch.save(state, folder / _STATE)
            (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def load_checkpoint(
        self, path: PathLike, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read what ``save_checkpoint`` wrote; nothing in it is run.

        Raises:
            ValueError: If it is damaged.
        """
        weights = read_weights(path)
        try:
            state = torch.load(Path(path) / _STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError) as error:
            message = f"{OP}: checkpoint must be whole, got {path} ({error})"
            raise ValueError(message) from error
        return {**state, "state_dict": weights}

    def remove_checkpoint(self, path: PathLike) -> None:
        """Delete a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


def read_weights(path: PathLike) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are damaged.
    """
    return load_tensors(Path(path) / WEIGHTS, kind=_KIND, version=_VERSION)[0]


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Returns:
        ``objective``, ``step``, ``finished``, ``sample_shape`` and ``num_samples``.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        return {key: manifest[key] for key in _MANIFEST_KEYS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{OP}: checkpoint must be whole, got {path} ({error!r})"
        raise ValueError(message) from error


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, the newest last."""
    return sorted(
        path for path in folder.glob("checkpoints/step-*") if (path / _MANIFEST).is_file()
    )


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after a step lies."""
    return folder / "checkpoints" / f"step-{step:09d}"


def random_state() -> list[dict[str, Any]]:
    """Return the states of torch's global generators of all processes, on each of them."""
    own: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    if not dist.is_initialized():
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def set_random_state(states: list[dict[str, Any]]) -> None:
    """Set the states that ``random_state`` returned; those of other numbers of processes are left."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if len(states) != world_size:
        return
    own = states[rank]
    torch.set_rng_state(own["torch"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def _independent(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares memory with another, which safetensors refuses."""
    seen: set[int] = set()
    copies = {}
    for name, tensor in weights.items():
        address = tensor.untyped_storage().data_ptr()
        copies[name] = tensor.detach().clone() if address in seen else tensor.detach()
        seen.add(address)
    return copies
