"""Batches of pairs, and the usual formulas of losses over them, which store all similarities."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.data import normal_features


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


def eager_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """As in open_clip: both matrices of logits."""
    labels = torch.arange(len(image), device=image.device)
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def eager_nt_xent(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    """All similarities of both views, without the diagonal."""
    z = torch.cat([z1, z2])
    logits = scale * z @ z.T
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


def eager_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """As in open_clip."""
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def eager_info_nce(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(
        scale * queries @ keys.T, torch.arange(len(queries), device=queries.device)
    )


def eager_supcon(features: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """The average outside the logarithm."""
    self_pairs = torch.eye(len(features), dtype=torch.bool, device=features.device)
    logits = (scale * features @ features.T).masked_fill(self_pairs, -torch.inf)
    positive = (labels[:, None] == labels) & ~self_pairs
    log_p = logits.log_softmax(dim=1).where(positive, 0.0)
    return -(log_p.sum(dim=1) / positive.sum(dim=1)).mean()
