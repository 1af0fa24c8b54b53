"""Large batches on a small machine: gradient caching, and what the contrast of all pairs costs."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import in_fresh_process, peak_memory_mb
from benchmarks.methods.proofs import Figure
from benchmarks.methods.solar import load_cells
from pyfeat.losses import cached_step
from pyfeat.ssl.config import Optimiser
from pyfeat.ssl.networks import build
from pyfeat.ssl.objectives.base import Plan
from pyfeat.ssl.options import read_options
from pyfeat.ssl.registry import OBJECTIVES

TITLE = "Large batches"
ABOUT = """
`CLIP` with a vision transformer of 128 features (64 × 64 pixels, patches of 16, 4 blocks) and a byte-wise text
transformer of 128 features (3 blocks), on solar cells drawn with replacement and captions that name them. A step
is forward, loss and backward over the whole batch, on one thread; its peak memory is the growth of a fresh
process, images and captions included. `cached_step` encodes 256 samples at a time; the plain step encodes all at
once. Their gradients are compared over all parameters together, in the norm. `SimCLR` has its defaults (`ResNet`
of width 32, views of 64 × 64 pixels); its contrast is `nt_xent` of as many projections, forward and backward.
"""
LIMIT_MB = 24 * 1024
CHUNK = 256


@dataclass(frozen=True)
class Size:
    """How much is shown."""

    large: int  # batch of the cached step
    small: int  # batch that both ways can take
    views: int  # batch of SimCLR
    side: int  # of images, in pixels
    every: int  # n-th solar cell
    rounds: int


FULL = Size(large=16_384, small=2_048, views=1_024, side=64, every=1, rounds=1)
SHORT = Size(large=64, small=32, views=16, side=32, every=120, rounds=1)


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """Yield the figures of one seed."""
    size = SHORT if short else FULL
    chunk = 8 if short else CHUNK

    def peak(batch: int, chunk: int | None) -> float:
        arguments = size, batch, chunk, seed
        return step_memory_mb(*arguments) if short else in_fresh_process(step_memory_mb, *arguments)

    claim = "peak memory of a CLIP step, MB"
    yield Figure(
        f"{claim}, batch {size.large:,}",
        "`cached_step`",
        peak(size.large, chunk),
        "24 GB",
        LIMIT_MB,
        better="lower",
    )
    yield Figure(
        f"{claim}, batch {size.small:,}",
        "`cached_step`",
        peak(size.small, chunk),
        "plain step",
        peak(size.small, None),
        better="lower",
    )
    yield Figure(
        f"error of gradients over their norm, batch {size.small:,}",
        "`cached_step`",
        gradient_error(size, chunk, seed),
        "bound",
        1e-4,
        better="lower",
    )
    step, contrast = simclr_seconds(size, seed)
    yield Figure(
        f"seconds of a SimCLR step, batch {size.views:,}",
        "contrast of all pairs",
        contrast,
        "whole step",
        step,
        better="lower",
        factor=0.1,
    )


def step_memory_mb(size: Size, batch: int, chunk: int | None, seed: int) -> float:
    """Peak memory of a step on a batch that is made meanwhile."""
    torch.set_num_threads(1)
    objective = make_objective("clip", size, seed)

    def run() -> None:
        clip_step(objective, clip_batch(size, batch, seed), chunk)

    return peak_memory_mb(run)


def make_objective(name: str, size: Size, seed: int) -> Any:
    """An objective on grey images."""
    torch.manual_seed(seed)
    entry = OBJECTIVES.find(name)
    plan = Plan(Optimiser(), sample_shape=(1, size.side, size.side))
    if name == "clip":
        transformer = {"width": 128, "heads": 4, "depth": 4, "patch_size": 16}
        network = build("vit", in_channels=1, image_size=size.side, **transformer)
        options = {"text_length": 32}
    else:
        network, options = build("resnet", in_channels=1, width=32), {}
    return entry.make(network, read_options(name, "", entry.options, options), plan)


def clip_batch(size: Size, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (B, 1, side, side) and tokens (B, L) of captions."""
    pixels = torch.from_numpy(load_cells(size.side, every=size.every).pixels)
    rows = torch.randint(len(pixels), (batch,), generator=torch.Generator().manual_seed(seed))
    text = make_objective("clip", size, seed).text
    return pixels[rows][:, None].float() / 255, text.tokens([f"solar cell {i}" for i in rows])


def clip_step(objective: Any, batch: tuple[Tensor, Tensor], chunk: int | None) -> None:
    """Leave the gradients of a step; in chunks, or all at once."""
    images, tokens = batch

    def captions(tokens: Tensor) -> Tensor:
        features: Tensor = objective.text_projection(objective.text(tokens))
        return features

    if chunk is None:
        features = objective.encode_images(images), captions(tokens)
        torch.autograd.backward(objective.loss(*features))
    else:
        encoders = [objective.encode_images, captions]
        cached_step(encoders, [images, tokens], objective.loss, chunk_size=chunk)


def gradient_error(size: Size, chunk: int, seed: int) -> float:
    """Norm of the difference of both ways' gradients over that of the plain step."""
    objective, batch = make_objective("clip", size, seed), clip_batch(size, size.small, seed)
    gradients = []
    for each in (None, chunk):
        objective.zero_grad(set_to_none=True)
        clip_step(objective, batch, each)
        parts = [p.grad.double().flatten() for p in objective.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def simclr_seconds(size: Size, seed: int) -> tuple[float, float]:
    """Medians of a whole step, views and optimiser included, and of the contrast alone."""
    objective = make_objective("simclr", size, seed)
    pixels = torch.from_numpy(load_cells(size.side, every=size.every).pixels)[: size.views]
    batch = {"images": pixels[:, None].float() / 255, "index": torch.arange(len(pixels))}
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-3)

    def step() -> None:
        optimiser.zero_grad()
        torch.autograd.backward(objective.training_loss(batch)["loss"])
        optimiser.step()

    features = torch.randn(2, len(pixels), objective.head.out_dim, requires_grad=True)

    def contrast() -> None:
        torch.autograd.backward(objective.loss(*features))

    return _seconds(step, size.rounds), _seconds(contrast, 3 * size.rounds)


def _seconds(run: Callable[[], None], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
