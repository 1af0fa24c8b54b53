"""A memory bank that shrinks to a coreset, and grows by what it does not cover."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import reference
from pyfeat._checks import DTYPES, dtype_name
from pyfeat.memory import MemoryBank
from pyfeat.search import METRICS, Metric
from tests.support_memory import assert_same, numbers, places

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize(
    "how",
    [
        {"ratio": 0.2},
        {"size": 9, "seed": 4},
        {"radius": 1.5},
        {"size": 60, "start": 3},
        {"size": 7, "projection": 2, "seed": 1},
    ],
    ids=str,
)
def test_a_coreset_keeps_the_rows_that_greedy_coreset_picks(how: dict[str, Any]) -> None:
    rows, ids = torch.randn(60, 4), places(10)
    bank = MemoryBank(rows, metric="cosine", ids=ids)
    found, expected = bank.coreset(**how), pyfeat.greedy_coreset(rows, **how)
    assert torch.equal(found.indices, expected.indices)
    assert found.radius == expected.radius == bank.radius
    assert torch.equal(bank.features, rows[expected.indices])
    assert torch.equal(bank.ids, ids[expected.indices])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_coreset_of_any_dtype_is_that_of_the_reference(dtype: torch.dtype) -> None:
    rows = torch.randn(60, 4).to(dtype)
    bank = MemoryBank(rows)
    bank.coreset(size=9, start=5)
    indices, radius = reference.greedy_coreset(rows, start=5, size=9)
    assert bank.features.dtype == dtype
    assert torch.equal(bank.features, rows[indices])
    assert bank.radius == pytest.approx(radius, rel=1e-12)


def test_ids_continue_after_a_coreset() -> None:
    bank = MemoryBank(torch.randn(50, 4))
    bank.coreset(size=3)
    bank.add(torch.randn(1, 4))
    assert bank.ids[-1] == 50


def test_a_refused_coreset_leaves_the_bank_whole() -> None:
    bank = MemoryBank(torch.randn(5, 4))
    with pytest.raises(ValueError, match="exactly one of size, ratio and radius must be given"):
        bank.coreset()
    assert len(bank) == 5


# Growing by what is not covered


def greedy_cover(rows: Tensor, held: Tensor, radius: float) -> list[int]:
    """The rows to add, by the definition."""
    nearest = torch.full((len(rows),), math.inf, dtype=torch.float64)
    if len(held):
        nearest = reference.pairwise_distances(rows, held, "euclidean").amin(dim=1)
    picks: list[int] = []
    while len(rows) and float(nearest.max()) > radius:
        picks.append(int(nearest.argmax()))
        to_pick = reference.pairwise_distances(rows, rows[picks[-1:]], "euclidean")[:, 0]
        nearest = torch.minimum(nearest, to_pick)
    return picks


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_cover_adds_the_rows_that_greedy_adds(
    metric: Metric, dtype: torch.dtype, shift: float
) -> None:
    if shift and dtype in (torch.float16, torch.bfloat16):
        shift = 8.0
    held = (torch.randn(40, 3) + shift).to(dtype)
    rows = (1.5 * torch.randn(150, 3) + shift).to(dtype)
    for radius in (0.0, 0.3, 1.0, 2.0, 50.0):
        bank = MemoryBank(held, metric=metric, ids=torch.arange(1000, 1040))
        expected = greedy_cover(rows, held, radius)
        picks = bank.cover(rows, radius=radius)
        assert picks.dtype == torch.int64
        assert picks.tolist() == expected
        assert torch.equal(bank.features, torch.cat([held, rows[expected]]))
        assert torch.equal(bank.ids, torch.arange(1000, 1040 + len(expected)))
        distances = reference.pairwise_distances(rows, bank.features, "euclidean")
        assert float(distances.amin(dim=1).max()) <= radius
        assert bank.cover(rows, radius=radius).tolist() == []
    assert 0 < len(greedy_cover(rows, held, 1.0)) < len(greedy_cover(rows, held, 0.3)) < 150


def test_covering_an_empty_bank_begins_with_the_first_row() -> None:
    rows = torch.randn(80, 3)
    bank = MemoryBank()
    picks = bank.cover(rows, radius=1.0)
    expected = pyfeat.greedy_coreset(rows, radius=1.0, start=0)
    assert torch.equal(picks, expected.indices)
    assert torch.equal(bank.features, rows[picks])
    assert torch.equal(bank.ids, torch.arange(len(picks)))
    assert bank.radius == 1.0


def test_equal_rows_are_added_once_and_the_first_of_them() -> None:
    bank = MemoryBank(torch.zeros(1, 2))
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    assert bank.cover(rows, radius=0.0).tolist() == [1, 2, 5]
    assert MemoryBank().cover(rows, radius=0.0).tolist() == [0, 1, 2, 5]


def test_a_row_at_the_radius_itself_is_covered() -> None:
    bank = MemoryBank(torch.zeros(1, 1))
    assert bank.cover(torch.tensor([[3.0], [-3.0]]), radius=3.0).tolist() == []
    assert bank.cover(torch.tensor([[3.0], [-3.0]]), radius=2.999999).tolist() == [0, 1]


def test_cover_tells_distances_apart_that_are_one_in_float32() -> None:
    rows = torch.tensor([[3.0, 0.0], [3.0, 2.0**-14], [-3.0, 0.0]])
    for radius, expected in ((3.0, [1]), (1.0, [1, 2])):
        assert MemoryBank(torch.zeros(1, 2)).cover(rows, radius=radius).tolist() == expected


def test_rows_that_are_added_keep_the_ids_they_were_given() -> None:
    rows, ids = torch.randn(60, 2), places(10)
    bank = MemoryBank(rows[:6], ids=ids[:6])
    picks = bank.cover(rows.numpy(), ids.numpy(), radius=0.5)
    assert 0 < len(picks) < 54
    assert torch.equal(bank.ids, torch.cat([ids[:6], ids[picks]]))
    assert torch.equal(bank.features, torch.cat([rows[:6], rows[picks]]))


def test_nothing_is_covered_by_nothing() -> None:
    bank = MemoryBank()
    assert bank.cover(torch.empty(0, 3), radius=1.0).tolist() == []
    bank.cover(torch.zeros(1, 3), radius=1.0)
    assert bank.cover(torch.empty(0, 3)).tolist() == []
    assert len(bank) == 1


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "negative": (ValueError, "radius must be finite and at least 0, .*got -1.0", {"radius": -1}),
    "nan": (ValueError, "radius must be finite .*got nan", {"radius": math.nan}),
    "infinite": (ValueError, "radius must be finite .*got inf", {"radius": math.inf}),
    "unknown": (ValueError, "radius must be .* given where the bank has none, got None", {}),
    "dtype": (
        TypeError,
        "features must be float32, got float64",
        {"features": np.zeros((1, 3)), "radius": 1.0},
    ),
    "width": (
        ValueError,
        r"features must have shape \(N, 3\)",
        {"features": torch.zeros(1, 4), "radius": 1.0},
    ),
    "nonfinite": (
        ValueError,
        "features must be finite",
        {"features": torch.full((1, 3), math.nan), "radius": 1.0},
    ),
    "ids": (
        ValueError,
        r"ids must have shape \(2,\), got \(3,\)",
        {"ids": numbers(1, 2, 3), "radius": 1.0},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_cover_leaves_the_bank_whole(case: str) -> None:
    kind, message, arguments = REFUSED[case]
    bank = MemoryBank(torch.randn(5, 3))
    before = copy.deepcopy(bank)
    with pytest.raises(kind, match=rf"MemoryBank\.cover: {message}"):
        bank.cover(**{"features": torch.full((2, 3), 9.0)} | arguments)
    assert_same(bank, before)


# The covering radius


def ready() -> MemoryBank:
    bank = MemoryBank(torch.randn(50, 3))
    bank.coreset(size=20)
    return bank


def test_cover_takes_the_radius_that_the_coreset_left() -> None:
    bank, rows = ready(), 2.0 * torch.randn(100, 3)
    radius = bank.radius
    assert radius is not None
    expected = greedy_cover(rows, bank.features, radius)
    assert 0 < len(expected) < 100
    assert bank.cover(rows).tolist() == expected
    assert bank.radius == radius


def test_the_radius_is_not_known_before_somebody_sets_it() -> None:
    bank = MemoryBank()
    assert bank.radius is None
    bank.add(torch.randn(3, 2))
    assert bank.radius is None


def write_and_merge(bank: MemoryBank) -> None:
    bank.features[3] = 0.0
    bank.merge(MemoryBank(torch.randn(1, 3)))


KEEPS: dict[str, Callable[[MemoryBank], object]] = {
    "add": lambda bank: bank.add(100.0 * torch.randn(70, 3)),
    "search": lambda bank: bank.search(torch.randn(2, 3)),
    "remove nothing": lambda bank: bank.remove(numbers()),
    "cover closely": lambda bank: bank.cover(torch.randn(90, 3), radius=0.1),
    "merge nothing": lambda bank: bank.merge(MemoryBank()),
    "merge rows": lambda bank: bank.merge(MemoryBank(torch.randn(4, 3))),
}
FORGETS: dict[str, Callable[[MemoryBank], object]] = {
    "remove": lambda bank: bank.remove(bank.ids[:1]),
    "write": lambda bank: bank.features[3].zero_(),
    "write, then add": lambda bank: bank.add(bank.features.mul_(2)[:1]),
    "write, then merge": write_and_merge,
}


@pytest.mark.parametrize("case", [*KEEPS, *FORGETS])
def test_the_radius_is_forgotten_when_it_may_be_untrue(case: str) -> None:
    bank = ready()
    radius = bank.radius
    assert radius is not None
    (KEEPS | FORGETS)[case](bank)
    assert bank.radius == (radius if case in KEEPS else None)


def test_the_radius_is_the_largest_that_any_row_was_covered_with(tmp_path: Path) -> None:
    bank = ready()
    bank.cover(torch.randn(9, 3), radius=77.0)
    assert bank.radius == 77.0
    bank.cover(torch.randn(9, 3), radius=5.0)
    assert bank.radius == 77.0
    other = MemoryBank(torch.randn(9, 3))
    other.cover(torch.randn(9, 3), radius=99.0)
    assert other.radius == 99.0
    bank.merge(other)
    assert bank.radius == 99.0
    fresh = MemoryBank(torch.randn(2, 3))
    fresh.merge(bank)
    assert fresh.radius == 99.0
    fresh.save(tmp_path / "bank")
    assert MemoryBank.load(tmp_path / "bank").radius == 99.0
    fresh.coreset(size=len(fresh))
    assert fresh.radius == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_every_row_ever_given_lies_within_the_radius(seed: int) -> None:
    torch.manual_seed(seed)
    rows = [torch.randn(60, 2) * (i + 1) for i in range(4)]
    bank, other = MemoryBank(rows[0]), MemoryBank(rows[3])
    bank.coreset(ratio=0.2)
    bank.add(rows[1])
    bank.cover(rows[2])
    other.coreset(ratio=0.1)
    bank.merge(other)
    assert bank.radius is not None
    distances = reference.pairwise_distances(torch.cat(rows), bank.features, "euclidean")
    assert float(distances.amin(dim=1).max()) <= bank.radius
