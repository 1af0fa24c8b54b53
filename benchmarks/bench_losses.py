"""Losses: forward and backward of losses over all pairs.

Features are normal, of unit length, those of a pair at a cosine of about 0.3; every contender returns the
loss and its gradients. eager is the usual formula, which stores the similarities of all pairs: that of
open_clip in one process for CLIP, and for NT-Xent one matrix of both views. A rate counts the products
that any exact method must make: three times 2 N M D operations, for the similarities and both gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.answers import GradientCheck
from benchmarks.data import normal_features
from benchmarks.harness import Harness
from benchmarks.memory import in_fresh_process, peak_memory_mb
from benchmarks.timing import Contender, Work
from pyfeat.losses import clip_loss, nt_xent

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """Pairs of features."""

    num_pairs: int
    dim: int

    def __str__(self) -> str:
        return f"{self.num_pairs:,} pairs × {self.dim}"

    def features(self) -> tuple[Tensor, Tensor]:
        """(N, D) each."""
        a = normal_features(self.num_pairs, self.dim, seed=0)
        b = normal_features(self.num_pairs, self.dim, seed=1)
        return F.normalize(a, dim=1), F.normalize(a + 3 * b, dim=1)


@pytest.mark.sizes(
    "batch",
    full=[Batch(256, 512), Batch(1_024, 512), Batch(8_192, 512), Batch(16_384, 128)],
    quick=[Batch(40, 16)],
)
def test_clip(harness: Harness, batch: Batch, quick: bool) -> None:
    """Symmetric CLIP, float32.

    `clip_loss` with a learnable scale, here 20.
    """
    work = Work(6.0 * batch.num_pairs**2 * batch.dim, "float32")
    _race(harness, batch, clip_loss, eager_clip, 20.0, work, compiles=not quick)


@pytest.mark.sizes("batch", full=[Batch(4_096, 256)], quick=[Batch(40, 16)])
def test_nt_xent(harness: Harness, batch: Batch, quick: bool) -> None:
    """NT-Xent, float32.

    `nt_xent` at temperature 0.1. pytorch-metric-learning builds a mask of 8 N³ elements, 550 GB here.
    """

    def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return nt_xent(a, b, temperature=1.0 / scale)

    work = Work(6.0 * (2 * batch.num_pairs) ** 2 * batch.dim, "float32")
    _race(harness, batch, ours, eager_nt_xent, 10.0, work, compiles=not quick)


@pytest.mark.sizes("batch", full=[Batch(8_192, 512), Batch(65_536, 256)], quick=[Batch(40, 16)])
def test_extra_memory(harness: Harness, batch: Batch) -> None:
    """Extra memory.

    Growth of the peak resident memory beyond the features and their gradients, `clip_loss` forward and
    backward, in a process of its own.
    """
    harness.values(batch, {"pyfeat": in_fresh_process(extra_memory_mb, batch)}, unit="MB")


def extra_memory_mb(batch: Batch) -> float:
    """Beyond features and gradients; for a fresh process."""
    a, b = batch.features()
    _step(clip_loss, a[:64], b[:64], 20.0)()  # loads libraries and starts threads
    return peak_memory_mb(_step(clip_loss, a, b, 20.0)) - 2 * 4 * a.numel() / 2**20


def eager_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """As in open_clip: both matrices of logits."""
    labels = torch.arange(len(image))
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def eager_nt_xent(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    """All similarities of both views, without the diagonal."""
    z = torch.cat([z1, z2])
    logits = scale * z @ z.T
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def _step(loss: Loss, a: Tensor, b: Tensor, scale: float) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients by both features and the scale."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (a, b, torch.tensor(scale))]
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return run


def _race(
    harness: Harness,
    batch: Batch,
    ours: Loss,
    eager: Loss,
    scale: float,
    work: Work,
    *,
    compiles: bool,
) -> None:
    a, b = batch.features()
    losses = {"pyfeat": ours, "eager": eager}
    if compiles:
        losses["eager, compiled"] = torch.compile(eager)
    contenders = [
        Contender(name, _step(loss, a, b, scale), ours=name == "pyfeat", work=work)
        for name, loss in losses.items()
    ]
    check = GradientCheck(_step(eager, a.double(), b.double(), scale))
    harness.race(batch, contenders, check=check)
