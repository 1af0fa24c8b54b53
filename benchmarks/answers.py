"""Checks of answers before they are timed, each against float64."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from torch import Tensor

from benchmarks.timing import WrongAnswerError

# float64 sums of the same terms in another order differ by a few units in the last place.
NEAR_TIE = 1e-12
# float32 arithmetic may take one neighbour for another where their squared distances differ by no
# more than this, relative to ||q||^2 + ||x||^2, the terms that are subtracted.
FLOAT32_SWAP = 1e-5
# Brute force of a sample of the queries: that many differences in float64.
SAMPLE_DIFFERENCES = 2**29


class NeighbourCheck:
    """Refuses indices that are not those of the nearest rows, by euclidean distance.

    What counts are the float64 distances of the rows that are returned, so that rows at nearly equal
    distance may stand in for each other:

    - the contenders in ``exact`` must return the nearest rows of brute force in float64 by direct
      differences, for a sample of the queries, up to rounding in float64;
    - nobody may find nearer rows than they, for any query;
    - the others may be off by what float32 explains, for any query.

    Args:
        queries: (Q, D) float32.
        memory: (N, D) float32.
        k: Neighbours per query.
        exact: Names of contenders that promise exact answers; one of them must come first.
    """

    def __init__(self, queries: Tensor, memory: Tensor, k: int, exact: Collection[str]) -> None:
        self._queries, self._memory, self._k = queries, memory, k
        self._exact = frozenset(exact)
        self._nearest: Tensor | None = None  # [Q, k], squared distances of an exact contender
        differences = max(1, memory.numel())
        count = max(1, min(len(queries), SAMPLE_DIFFERENCES // differences))
        self._sample = torch.linspace(0, len(queries) - 1, count, device=queries.device).long()
        self._brute_force = _nearest_squared(queries[self._sample], memory, k)

    def __call__(self, name: str, answer: object) -> None:
        found = self._found(name, answer)
        if name in self._exact:
            best = self._brute_force
            if ((found[self._sample] - best).abs() > NEAR_TIE * best).any():
                message = f"{name}: neighbours are not those of brute force in float64"
                raise WrongAnswerError(message)
            self._nearest = found if self._nearest is None else self._nearest
        if self._nearest is None:
            message = f"{name}: an exact contender must come first"
            raise WrongAnswerError(message)
        off = found - self._nearest
        if (off < -NEAR_TIE * self._nearest).any():
            message = f"{name}: finds nearer rows than an exact contender"
            raise WrongAnswerError(message)
        allowed = NEAR_TIE * self._nearest if name in self._exact else self._swap_allowance()
        wrong = (off > allowed).any(dim=1)
        if wrong.any():
            message = f"{name}: wrong neighbours of {int(wrong.sum())} of {len(wrong)} queries"
            raise WrongAnswerError(message)

    def share_wrong(self, name: str, answer: object) -> float:
        """Of queries for which rows farther than those of an exact contender are found."""
        if self._nearest is None:
            message = f"{name}: an exact contender must come first"
            raise WrongAnswerError(message)
        off = self._found(name, answer) - self._nearest
        return float((off > NEAR_TIE * self._nearest).any(dim=1).double().mean())

    def _found(self, name: str, answer: object) -> Tensor:
        """Squared distances (Q, k) of the rows that are returned, ascending."""
        indices = torch.as_tensor(answer, device=self._queries.device).long()
        self._check_form(name, indices)
        return self._squared_distances(indices).sort(dim=1).values

    def _check_form(self, name: str, indices: Tensor) -> None:
        shape = (len(self._queries), self._k)
        if tuple(indices.shape) != shape:
            message = f"{name}: indices must have shape {shape}, got {tuple(indices.shape)}"
            raise WrongAnswerError(message)
        ordered = indices.sort(dim=1).values
        if ordered.min() < 0 or ordered.max() >= len(self._memory):
            message = f"{name}: indices are out of range"
            raise WrongAnswerError(message)
        if (ordered.diff(dim=1) == 0).any():
            message = f"{name}: a neighbour appears twice"
            raise WrongAnswerError(message)

    def _squared_distances(self, indices: Tensor) -> Tensor:
        """(Q, k) float64, by direct differences."""
        rows = max(1, 2**24 // max(1, self._k * self._memory.shape[1]))
        parts = []
        for q, i in zip(torch.split(self._queries, rows), torch.split(indices, rows), strict=True):
            parts.append((q.double()[:, None] - self._memory[i].double()).square().sum(dim=2))
        return torch.cat(parts)

    def _swap_allowance(self) -> Tensor:
        """(Q, 1), in units of squared distances."""
        norms = self._queries.double().square().sum(dim=1, keepdim=True)
        largest = float(self._memory.norm(dim=1).max())
        allowance: Tensor = FLOAT32_SWAP * (norms + largest**2)
        return allowance


def _nearest_squared(queries: Tensor, memory: Tensor, k: int) -> Tensor:
    """(Q, k) float64 squared distances of the nearest rows, by direct differences."""
    nearest = queries.new_full((len(queries), k), float("inf"), dtype=torch.float64)
    for rows in torch.split(memory, 65_536):
        distances = torch.cdist(
            queries.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        merged = torch.cat([nearest, distances.square()], dim=1)
        nearest = merged.topk(k, largest=False).values
    return nearest.sort(dim=1).values


class CoresetCheck:
    """Refuses picks of which one is not the farthest row from those before it, in float64.

    Args:
        features: (N, D) float32.
        picks: How many picks are looked at.
        exact: Names of contenders whose picks must be the farthest up to rounding in float64; those
            of others may be off by what float32 explains.
    """

    def __init__(self, features: Tensor, picks: int, exact: Collection[str]) -> None:
        self._features, self._picks, self._exact = features.double(), picks, frozenset(exact)

    def __call__(self, name: str, answer: object) -> None:
        picks = torch.as_tensor(answer)[: self._picks]
        if len(picks) != self._picks or len(torch.unique(picks)) != len(picks):
            message = f"{name}: must pick {self._picks} different rows first, got {len(picks)}"
            raise WrongAnswerError(message)
        slack = NEAR_TIE if name in self._exact else FLOAT32_SWAP
        nearest = torch.full((len(self._features),), float("inf"), dtype=torch.float64)
        for number, pick in enumerate(picks.tolist()):
            if number and nearest[pick] < nearest.max() * (1 - slack):
                message = f"{name}: pick {number} is not the farthest row"
                raise WrongAnswerError(message)
            squared = (self._features - self._features[pick]).square().sum(dim=1)
            nearest = torch.minimum(nearest, squared)


def check_product(name: str, product: Tensor, left: Tensor, right: Tensor, slack: float) -> None:
    """Refuse a product (n, N) whose first rows are not those of left (n, D) and right (N, D).

    Args:
        name: Of the contender.
        product: To check.
        left: Its rows.
        right: Its columns.
        slack: Allowed error of an element, relative to the product of the two norms.
    """
    first = left[:8].double()
    exact = first @ right.double().T
    scale = first.norm(dim=1, keepdim=True) * right.double().norm(dim=1)
    if ((product[: len(first)].double() - exact).abs() > slack * scale).any():
        message = f"{name}: wrong product"
        raise WrongAnswerError(message)


class GradientCheck:
    """Refuses a loss or gradients that are not those of float64.

    Args:
        exact: Returns loss and gradients in float64.
        slack: Allowed error of an element, relative to the largest of its tensor; the default is what
            float32 may be off by.
    """

    def __init__(self, exact: Callable[[], Sequence[Tensor]], slack: float = 1e-4) -> None:
        self._exact = exact()
        self._slack = slack

    def __call__(self, name: str, answer: object) -> None:
        if not self.error(answer) <= self._slack:
            message = f"{name}: loss or gradients are off by more than rounding explains"
            raise WrongAnswerError(message)

    def error(self, answer: object) -> float:
        """The largest of all elements, each relative to the largest of its tensor."""
        found, errors = cast("Sequence[Tensor]", answer), []
        for ours, true in zip(found, self._exact, strict=True):
            largest = float(true.abs().max()) or 1.0
            errors.append(float((ours.double() - true).abs().max()) / largest)
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
