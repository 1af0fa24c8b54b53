"""Losses that are more than sums over pairs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat.reference._neighbours import first_smallest, pairwise_distances


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp assignments (B, K), rows summing to 1, in float64.

    Scales the columns and then the rows of ``exp(scores / epsilon)`` to equal sums, so many times.
    Written with the logarithms of the factors: ``Q = exp(s + rows + columns)`` has rows summing to
    1 when rows is ``-logsumexp_k(s_ik + columns_k)``, and columns when columns is
    ``-logsumexp_i(s_ik + rows_i)``.
    """
    s = scores.detach().double() / epsilon  # [B, K]
    if s.shape[0] == 0:
        return s
    rows = s.new_zeros(s.shape[0], 1)
    columns = s.new_zeros(s.shape[1])
    for _ in range(iterations):
        columns = -(s + rows).logsumexp(dim=0)
        rows = -(s + columns).logsumexp(dim=1, keepdim=True)
    return (s + rows + columns).exp()


def prediction_losses(
    views: Sequence[Tensor],
    prototypes: Tensor,
    temperature: Tensor,
    targets: Sequence[Tensor],
    sources: Sequence[int | None],
) -> Tensor:
    """Losses (B,) of views (B, D) that predict targets (B, K), in float64.

    The mean of the cross-entropies of all views with all targets, but for pairs of a target and the
    view that it is of, its source.
    """
    losses = []
    for view_index, view in enumerate(views):
        logits = view.double() @ prototypes.double().T / temperature.double()  # [B, K]
        for target, source in zip(targets, sources, strict=True):
            if source != view_index:
                losses.append(-(target * logits.log_softmax(dim=1)).sum(dim=1))
    return torch.stack(losses).mean(dim=0)


def swav_losses(
    views: Sequence[Tensor],
    prototypes: Tensor,
    temperature: Tensor,
    assigned: Sequence[int],
    balanced: Sequence[Tensor],
    epsilon: float,
    iterations: int,
) -> Tensor:
    """Losses (B,) of views that predict what ``sinkhorn`` assigns to the others, in float64.

    ``balanced`` holds, for each of the assigned views, its rows and then further features.
    """
    targets = [
        sinkhorn(x.double() @ prototypes.detach().double().T, epsilon, iterations) for x in balanced
    ]
    targets = [target[: len(views[0])] for target in targets]
    return prediction_losses(views, prototypes, temperature, targets, assigned)


class Teacher(NamedTuple):
    """What a student learns from: T views of B rows each, one after the other."""

    features: Tensor  # (T B, C)
    prototypes: Tensor  # (K, C)
    temperature: Tensor
    center: Tensor  # (K,)
    sinkhorn_iterations: int | None

    def probabilities(self) -> Tensor:
        """(T B, K): softmax of centred scores, or assignments by ``sinkhorn``; float64."""
        scores = self.features.double() @ self.prototypes.double().T - self.center.double()
        if self.sinkhorn_iterations is None:
            return (scores / self.temperature.double()).softmax(dim=1)
        return sinkhorn(scores, float(self.temperature), self.sinkhorn_iterations)


def dino_losses(
    student: Sequence[Tensor],
    prototypes: Tensor,
    temperature: Tensor,
    teacher: Teacher,
    sources: Sequence[int | None],
) -> Tensor:
    """Losses (B,) of a student's views that predict what a teacher says of others, in float64."""
    targets = teacher.probabilities().view(len(sources), len(student[0]), len(prototypes))
    return prediction_losses(student, prototypes, temperature, list(targets), sources)


def koleo(features: Tensor, epsilon: float) -> Tensor:
    """``-ln(d_i + epsilon)`` (N,), d_i being the distance to the nearest other row, in float64."""
    distances = pairwise_distances(features, features, "euclidean")  # [N, N]
    others = distances.clone().fill_diagonal_(math.inf)
    return -(distances.gather(1, first_smallest(others)[:, None])[:, 0] + epsilon).log()
