"""Kinds of images that were learned together, found without labels, each with scores of its own scale."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfeat.coreset import greedy_coreset
from pyfeat.search import knn

_MOST_ROUNDS = 100  # of k-means, which nearly always settles within 20
_LEAST = 1e-12  # a score below counts as this much: the logarithm of 0 is infinite


@dataclass(frozen=True, eq=False)
class ImageKinds:
    """Where the kinds are in feature space, and what normal images of each score.

    Where one kind of product has more texture than another, its normal images score higher, and a
    ranking of both puts them before defects of the other. So a score s becomes ``(log s - m) / d``,
    with mean m and standard deviation d of ``log s`` over normal images of its kind: how unusual it
    is among its own.

    Attributes:
        centres: (K, D) float32, mean features of the images of a kind.
        means: (K,) float64, m of each kind.
        spreads: (K,) float64, d of each kind, above 0.
    """

    centres: Tensor
    means: Tensor
    spreads: Tensor

    def of(self, features: Tensor) -> Tensor:
        """(B,) int64: the kind of each image, by the mean (B, D) of its patches."""
        return knn(features.contiguous(), self.centres).indices[:, 0]

    def relative(self, scores: Tensor, features: Tensor) -> Tensor:
        """Scores (B,) on the scale of their kinds; ``features`` as in ``of``."""
        kinds = self.of(features)
        logs = scores.double().clamp(min=_LEAST).log()
        return ((logs - self.means[kinds]) / self.spreads[kinds]).to(scores)

    @classmethod
    def fitted(cls, centres: Tensor, scores: Tensor, features: Tensor) -> "ImageKinds":
        """Learn the scale of each kind from scores (n,), n >= 0, of normal images (n, D).

        A kind of fewer than two images, or whose scores are all equal, has the spread of all images; of
        none also their mean.
        """
        logs = scores.double().clamp(min=_LEAST).log()
        means, spreads = torch.zeros(2, len(centres), dtype=torch.float64)
        scales = cls(centres, means, spreads)
        kinds = scales.of(features)
        for kind in range(len(centres)):
            own = logs[kinds == kind]
            means[kind] = own.mean() if len(own) else logs.mean() if len(logs) else 0.0
            spread = own.std() if len(own) > 1 else torch.zeros(())
            if not spread > 0:
                spread = logs.std() if len(logs) > 1 else torch.zeros(())
            spreads[kind] = spread if spread > 0 else 1.0
        return scales

    def state(self) -> dict[str, Any]:
        """What ``from_state`` needs, for JSON."""
        return {name: tensor.tolist() for name, tensor in vars(self).items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ImageKinds":
        """Make it again; KeyError, TypeError or ValueError if the state is not whole."""
        means, spreads = (torch.tensor(state[n], dtype=torch.float64) for n in ("means", "spreads"))
        return cls(torch.tensor(state["centres"]), means, spreads)


def find_kinds(features: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Find the centres of kinds of images by k-means, from those that lie farthest apart.

    Args:
        features: (n, D) float32, n >= 1, of images.
        count: Kinds to find; fewer are found where there are fewer images.
        seed: Of the first pick.

    Returns:
        (K, D) float32, every one the mean of at least one image.
    """
    start = greedy_coreset(features, size=min(count, len(features)), seed=seed)
    centres = features[start.indices]
    kinds = torch.full((len(features),), -1)
    for _ in range(_MOST_ROUNDS):
        nearest = knn(features, centres).indices[:, 0]
        if torch.equal(nearest, kinds):
            break
        kinds = nearest
        members = torch.nn.functional.one_hot(kinds, len(centres)).double()  # [n, K]
        counts = members.sum(dim=0)
        means = (members.T @ features.double()) / counts.clamp(min=1)[:, None]
        centres = torch.where(counts[:, None] > 0, means, centres.double()).float()
    return centres[torch.bincount(kinds, minlength=len(centres)) > 0]
