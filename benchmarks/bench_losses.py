"""Losses: forward and backward of losses over all pairs.

Features are normal, of unit length, those of a pair at a cosine of about 0.3; every contender returns the
loss and its gradients, also by the scale of the similarities. eager is the usual formula, which stores the
similarities of all pairs: for CLIP that of open_clip in one process, for NT-Xent and SupCon one matrix of
both views. metric learning is pytorch-metric-learning, told that features are of unit length, where its
masks fit the memory. A rate counts the products that any exact method must make: three times 2 N M D
operations, for the similarities and both gradients.
"""

from collections.abc import Callable, Mapping
from typing import cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor, nn

from benchmarks.answers import GradientCheck
from benchmarks.eager_losses import (
    Batch,
    eager_clip,
    eager_info_nce,
    eager_nt_xent,
    eager_siglip,
    eager_supcon,
)
from benchmarks.harness import Harness
from benchmarks.memory import in_fresh_process, peak_memory_mb
from benchmarks.timing import Contender, Work
from pyfeat.losses import clip_loss, info_nce, nt_xent, siglip_loss, supcon_loss

PACKAGES = ("pytorch-metric-learning",)
MASK_LIMIT = 4e9  # bytes

# Of features of both views and learnable numbers, of which the first is the scale of the similarities.
Loss = Callable[..., Tensor]


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
    _race(harness, batch, clip_loss, {"eager": eager_clip}, (20.0,), work, compiles=not quick)


@pytest.mark.sizes("batch", full=[Batch(1_024, 512), Batch(8_192, 512)], quick=[Batch(40, 16)])
def test_siglip(harness: Harness, batch: Batch, quick: bool) -> None:
    """SigLIP, float32.

    `siglip_loss` with a learnable scale and bias, 10 and -10. eager is that of open_clip in one process.
    """
    work = Work(6.0 * batch.num_pairs**2 * batch.dim, "float32")
    peers = {"eager": eager_siglip}
    _race(harness, batch, siglip_loss, peers, (10.0, -10.0), work, compiles=not quick)


@pytest.mark.sizes("batch", full=[Batch(1_024, 512), Batch(8_192, 512)], quick=[Batch(40, 16)])
def test_info_nce(harness: Harness, batch: Batch, quick: bool) -> None:
    """One-sided InfoNCE, float32.

    `info_nce` at temperature 0.05. linear CE is `torch.nn.functional.linear_cross_entropy` with its default
    options, which takes the similarities of some queries at a time and no gradient for their scale but
    through the queries.
    """

    def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return info_nce(a, b, temperature=1.0 / scale)

    peers = {"eager": eager_info_nce, "linear CE": linear_cross_entropy}
    work = Work(6.0 * batch.num_pairs**2 * batch.dim, "float32")
    _race(harness, batch, ours, peers, (20.0,), work, compiles=not quick)


@pytest.mark.sizes("batch", full=[Batch(256, 256), Batch(4_096, 256)], quick=[Batch(40, 16)])
def test_nt_xent(harness: Harness, batch: Batch, quick: bool) -> None:
    """NT-Xent, float32.

    `nt_xent` at temperature 0.1.
    """

    def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return nt_xent(a, b, temperature=1.0 / scale)

    peers: dict[str, Loss] = {"eager": eager_nt_xent}
    mask = 4.0 * 8 * batch.num_pairs**3
    if mask <= MASK_LIMIT:
        peers["metric learning"] = metric_learning_nt_xent
        skipped = {}
    else:
        skipped = {"metric learning": f"its mask of 8 N³ numbers would take {mask / 1e9:,.0f} GB"}
    work = Work(6.0 * (2 * batch.num_pairs) ** 2 * batch.dim, "float32")
    _race(harness, batch, ours, peers, (10.0,), work, compiles=not quick, skipped=skipped)


@pytest.mark.sizes("batch", full=[Batch(256, 256), Batch(4_096, 256)], quick=[Batch(40, 16)])
def test_supcon(harness: Harness, batch: Batch, quick: bool) -> None:
    """SupCon, float32.

    `supcon_loss` of both views at temperature 0.1, eight rows of each label.
    """
    labels = (torch.arange(batch.num_pairs) % (batch.num_pairs // 4)).repeat(2)

    def ours(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return supcon_loss(torch.cat([a, b]), labels, temperature=1.0 / scale)

    def eager(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return eager_supcon(torch.cat([a, b]), labels, scale)

    def metric_learning(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        loss = SupConLoss(1.0 / scale, distance=unit_similarity())
        return cast("Tensor", loss(torch.cat([a, b]), labels))

    peers = {"eager": eager, "metric learning": metric_learning}
    work = Work(6.0 * (2 * batch.num_pairs) ** 2 * batch.dim, "float32")
    _race(harness, batch, ours, peers, (10.0,), work, compiles=not quick)


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


def linear_cross_entropy(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    targets = torch.arange(len(queries))
    return F.linear_cross_entropy(scale * queries, keys, targets, options=options)


def metric_learning_nt_xent(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    loss = NTXentLoss(1.0 / scale, distance=unit_similarity())
    return cast("Tensor", loss(torch.cat([z1, z2]), torch.arange(len(z1)).repeat(2)))


def unit_similarity() -> DotProductSimilarity:
    """Cosines of features that are of unit length."""
    return DotProductSimilarity(normalize_embeddings=False)


def _step(loss: Loss, a: Tensor, b: Tensor, *numbers: float) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients by both features and the numbers."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (a, b, *map(torch.tensor, numbers))]
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return run


def _race(
    harness: Harness,
    batch: Batch,
    ours: Loss,
    peers: Mapping[str, Loss],
    numbers: tuple[float, ...],
    work: Work,
    *,
    compiles: bool,
    skipped: Mapping[str, str] | None = None,
) -> None:
    """Against peers, of which eager says what is right and is compiled as well if so wanted."""
    a, b = batch.features()
    losses = {"pyfeat": ours, **peers}
    if compiles:
        losses["eager, compiled"] = torch.compile(peers["eager"])
    contenders = [
        Contender(name, _step(loss, a, b, *numbers), ours=name == "pyfeat", work=work)
        for name, loss in losses.items()
    ]
    check = GradientCheck(_step(peers["eager"], a.double(), b.double(), *numbers))
    harness.race(batch, contenders, check=check, skipped=skipped)
