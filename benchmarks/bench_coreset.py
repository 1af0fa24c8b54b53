"""Coreset: the k-centre greedy."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import pyfeat
from benchmarks.answers import CoresetCheck
from benchmarks.data import normal_features, patch_like_features
from benchmarks.harness import Harness
from benchmarks.timing import Contender

FEATURES: dict[str, Callable[[int, int], Tensor]] = {
    "standard normal": normal_features,
    "patch-like": patch_like_features,
}


class Selection(NamedTuple):
    """A coreset to pick."""

    features: str  # of FEATURES
    num_rows: int
    dim: int
    size: int
    checked: int  # picks that the loop makes

    def __str__(self) -> str:
        return f"{self.features}, {self.num_rows:,} × {self.dim} to {self.size:,}"


@pytest.mark.sizes(
    "selection",
    full=[Selection(name, 156_800, 152, 1_568, 60) for name in FEATURES],
    quick=[Selection(name, 2_000, 16, 20, 10) for name in FEATURES],
)
def test_greedy_coreset(harness: Harness, selection: Selection) -> None:
    """A hundredth of the rows.

    `greedy_coreset` picks all of them; the plain torch loop `min(d, ||x - c||)` only the first 60, as
    each pick costs it the same. These 60 are compared. The time of pyfeat is that of an average pick, and
    includes its search for NaN. Patch-like features are made by `benchmarks/data.py`.
    """
    features = FEATURES[selection.features](selection.num_rows, selection.dim)

    def ours() -> Tensor:
        return pyfeat.greedy_coreset(features, size=selection.size, start=0).indices

    contenders = [
        Contender("pyfeat", ours, ours=True, count=selection.size),
        Contender(
            "torch loop",
            lambda: torch_loop(features, selection.checked),
            count=selection.checked,
        ),
    ]
    check = CoresetCheck(features, selection.checked, exact=["pyfeat"])
    harness.race(selection, contenders, check=check, per="pick")


def torch_loop(features: Tensor, size: int) -> Tensor:
    """(size,) picks, beginning with row 0."""
    nearest = torch.full((len(features),), float("inf"))
    picks = [0]
    while True:
        nearest = torch.minimum(nearest, (features - features[picks[-1]]).norm(dim=1))
        if len(picks) == size:
            return torch.tensor(picks)
        picks.append(int(nearest.argmax()))
