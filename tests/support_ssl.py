"""A network, an objective and runs of them that take no second; also run as ``python -m``."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.losses import FeatureQueue, info_nce
from pyfeat.ssl.checkpoints import FolderIO
from pyfeat.ssl.config import Config, make_config
from pyfeat.ssl.objectives.base import Batch, Objective, Plan
from pyfeat.ssl.registry import NETWORKS, OBJECTIVES
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit

NUM_IMAGES, SIDE = 40, 8


@dataclass(frozen=True)
class TinyNetworkOptions:
    """Options of ``TinyNetwork``."""

    dropout: Annotated[float, "Of features."] = 0.0


@NETWORKS.register("tiny", TinyNetworkOptions)
class TinyNetwork(nn.Module):
    feature_dim = 16

    def __init__(self, options: TinyNetworkOptions) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.dropout = nn.Dropout(options.dropout)

    def maps(self, images: Tensor) -> list[Tensor]:
        return [functional.relu(self.norm(self.first(images - 0.5)))]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.maps(images)[0].mean(dim=(2, 3)))
        return features


@dataclass(frozen=True)
class TinyOptions:
    """Options of ``Tiny``."""

    noise: Annotated[float, "Of the views."] = 0.1
    queue: Annotated[int, "Rows of the queue; 0 is none."] = 24
    nan_at: Annotated[int, "Step with a loss that is NaN; 0 is none."] = 0
    nan_rank: Annotated[int, "Process that has it."] = 0
    collapse: Annotated[bool, "Make all embeddings equal."] = False


@OBJECTIVES.register("tiny", TinyOptions)
class Tiny(Objective):
    """Two noisy views, a teacher and a queue: all that a checkpoint must keep."""

    def __init__(self, backbone: nn.Module, options: TinyOptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan)
        self.head = nn.Linear(16, 8)
        self.teacher = nn.Linear(16, 8).requires_grad_(False)
        self.queue = FeatureQueue(options.queue, 8) if options.queue else None
        self.epochs: list[int] = []

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        images = batch["images"]
        first = functional.normalize(self.head(self.backbone(self._view(images))), dim=1)
        with torch.no_grad():
            features = self.backbone(self._view(images.flip(3)))
            self.keys = functional.normalize(self.teacher(features), dim=1)
        extra = self.queue.features if self.queue is not None else None
        loss = info_nce(
            first, self.keys, temperature=0.2, extra_keys=extra, group=self.group
        )  # fmt: skip
        options = self.options
        if self.steps_done + 1 == options.nan_at and self.global_rank == options.nan_rank:
            loss = loss * torch.nan
        return {"loss": loss, "norm": first.norm()}

    def embed(self, batch: Batch) -> Tensor:
        features = super().embed(batch)
        return features * 0 + 1 if self.options.collapse else features

    def two_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.embed(batch), self.backbone(batch["images"].flip(3))

    def start_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def after_step(self) -> None:
        with torch.no_grad():
            for mine, student in zip(
                self.teacher.parameters(), self.head.parameters(), strict=True
            ):
                mine.lerp_(student, 0.1)
            if self.queue is not None:
                self.queue.enqueue(self.keys)

    def _view(self, images: Tensor) -> Tensor:
        noise = self.options.noise
        return images + noise * torch.randn_like(images) if noise else images


def write_images(folder: Path) -> Path:
    """An array of images of two kinds, and their labels beside it."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_IMAGES) % 2
    images = rng.random((NUM_IMAGES, SIDE, SIDE, 3))
    images[labels == 1, :, : SIDE // 2] *= 0.3
    np.save(folder / "images.npy", (255 * images).astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    return folder / "images.npy"


def tiny_values(images: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration: 40 images, batches of 8, 4 epochs of 5 steps."""
    values: dict[str, Any] = {
        "out": str(out),
        "data": {"name": "images", "path": str(images), "size": [SIDE, SIDE]},
        "network": {"name": "tiny", "dropout": 0.2},
        "objective": {"name": "tiny"},
        "optimiser": {"lr": 0.01, "warmup_epochs": 1},
        "training": {"epochs": 4, "batch_size": 8, "log_every": 1, "progress": False},
        "watch": {"every": 2, "samples": 32, "k": 3},
    }
    values["data"]["labels"] = str(images.with_name("labels.npy"))
    for section, changed in sections.items():
        values[section] = {**values[section], **changed}
    return values


def tiny_config(images: Path, out: Path, **sections: dict[str, Any]) -> Config:
    return make_config(tiny_values(images, out, **sections))


def start_processes(
    runs: list[dict[str, Any]], count: int, module: str = "tests.support_ssl"
) -> list[subprocess.Popen[str]]:
    """Start the processes of some runs, two or more, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [{**run, "training": {**run["training"], "devices": count}} for run in runs]
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tiny",
        "OMP_NUM_THREADS": 1,
    }
    started = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, **shared}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, "-m", module, json.dumps(runs)]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[1],
            )
        )
    return started


def save_text_model(folder: Path) -> Path:
    """A text model of transformers with random weights, that knows six words."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", "a", "very", "dark", "cell", "bright", "it", "is", "above", "below"]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=words[0], unk_token=words[1], model_max_length=32
    )
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def interrupt_at(
    objective: type[Objective], step: int, number: signal.Signals = signal.SIGINT
) -> Any:
    """A ``training_loss`` that sends Ctrl-C, or another signal, to this process in a step."""
    original = objective.training_loss

    def training_loss(self: Objective, batch: Batch) -> dict[str, Tensor]:
        if self.steps_done + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    return training_loss


def loaded(run: Run) -> dict[str, Any]:
    """All that the newest checkpoint of a run holds."""
    newest = run.checkpoint()
    if newest is None:
        message = f"no checkpoint in {run.folder}"
        raise RuntimeError(message)
    return FolderIO("any", total_steps=1).load_checkpoint(newest)


def same(a: Any, b: Any) -> bool:
    """Whether two parts of a checkpoint have the same bits."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def run_all(runs: list[dict[str, Any]]) -> None:
    """Run one after the other; what is refused is said."""
    for values in runs:
        try:
            fit(make_config(values))
        except ValueError as error:
            sys.stdout.write(f"{error}\n")


if __name__ == "__main__":
    run_all(json.loads(sys.argv[1]))
