"""Searches in a memory bank: values, masks, and the packed copy behind them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import _C, _ops, _packed, reference
from pyfeat._checks import DTYPES, dtype_name
from pyfeat._packed import next_finer
from pyfeat.memory import MemoryBank
from pyfeat.search import METRICS, Metric
from tests.support import assert_exact_neighbours
from tests.support_memory import numbers

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("metric", METRICS)
def test_a_search_is_exact(metric: Metric, dtype: torch.dtype) -> None:
    rows, queries = torch.randn(257, 33).to(dtype), torch.randn(67, 33).to(dtype)
    bank = MemoryBank(rows[:200], metric=metric)
    bank.search(queries)
    bank.add(rows[200:])
    for k in (1, 9, 257):
        found = bank.search(queries, k)
        assert_exact_neighbours(*found, queries, rows, k, metric)


MASKS: dict[str, Callable[[], Tensor]] = {
    "row": lambda: torch.rand(90) < 0.5,
    "row, strided": lambda: (torch.rand(180) < 0.5)[::2],
    "query": lambda: torch.rand(31, 90) < 0.2,
    "query, transposed": lambda: (torch.rand(90, 31) < 0.2).T,
    "query, few": lambda: torch.rand(31, 90) < 0.02,
    "none": lambda: torch.zeros(90, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("metric", METRICS)
def test_a_mask_says_which_rows_may_be_found(metric: Metric, dtype: torch.dtype, mask: str) -> None:
    rows, queries, allowed = (
        torch.randn(90, 8).to(dtype),
        torch.randn(31, 8).to(dtype),
        MASKS[mask](),
    )
    bank = MemoryBank(rows, metric=metric)
    distances, indices = bank.search(queries, 4, mask=allowed)
    expected = reference.knn(queries, rows, 4, metric, allowed)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(distances, expected[0], rtol=1e-6, atol=1e-7)
    if mask in ("query, few", "none"):
        assert (indices == -1).any()
        assert distances[indices == -1].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("metric", METRICS)
def test_a_range_search_finds_all_rows_within_the_radius(
    metric: Metric, dtype: torch.dtype
) -> None:
    rows, queries = torch.randn(90, 8).to(dtype), torch.randn(31, 8).to(dtype)
    bank = MemoryBank(rows, metric=metric)
    ordered = reference.pairwise_distances(queries, rows, metric).flatten().sort().values
    radius = float(ordered[500:502].mean())  # between two of them
    for mask in (None, *(make() for make in MASKS.values())):
        found = bank.range_search(queries, radius, mask=mask)
        expected = reference.range_search(queries, rows, radius, metric, mask)
        assert torch.equal(found.offsets, expected[0])
        assert torch.equal(found.indices, expected[2])
        torch.testing.assert_close(found.distances, expected[1], rtol=1e-6, atol=1e-7)


def test_all_searches_share_one_packed_copy(monkeypatch: Patch) -> None:
    made = 0
    packed_memory = _C.PackedMemory

    def counted(*arguments: Any, **options: Any) -> _C.PackedMemory:
        nonlocal made
        made += 1
        return packed_memory(*arguments, **options)

    monkeypatch.setattr(_C, "PackedMemory", counted)
    bank, queries = MemoryBank(torch.randn(300, 8)), torch.randn(20, 8)
    assert made == 0
    for _ in range(3):
        bank.range_search(queries, 1.0)
        bank.search(queries, 3, mask=torch.rand(300) < 0.5)
    assert made == 1
    bank.features[3] = 0.0
    bank.range_search(queries, 1.0)
    bank.search(queries)
    assert made == 2


def test_numpy_queries_get_numpy_answers() -> None:
    rows, queries, mask = (
        torch.randn(40, 5).double(),
        torch.randn(7, 5).double(),
        torch.rand(40) < 0.5,
    )
    bank = MemoryBank(rows.numpy())
    found, expected = (
        bank.search(queries.numpy(), 3, mask=mask.numpy()),
        bank.search(queries, 3, mask=mask),
    )
    assert isinstance(found, pyfeat.search.NumpyNeighbours)
    assert np.array_equal(found.distances, expected.distances.numpy())
    assert np.array_equal(found.indices, expected.indices.numpy())
    within = bank.range_search(queries.numpy(), 2.0, mask=mask.numpy())
    expected_within = bank.range_search(queries, 2.0, mask=mask)
    assert isinstance(within, pyfeat.search.NumpyRangeNeighbours)
    for part, expected_part in zip(within, expected_within, strict=True):
        assert isinstance(part, np.ndarray)
        assert np.array_equal(part, expected_part.numpy())


def test_answers_are_detached() -> None:
    bank, queries = MemoryBank(torch.randn(9, 4)), torch.randn(3, 4, requires_grad=True)
    assert not bank.search(queries).distances.requires_grad
    assert not bank.range_search(queries, 9.0).distances.requires_grad


def test_searches_refuse_bad_arguments() -> None:
    bank, queries = MemoryBank(torch.zeros(6, 3)), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"MemoryBank.search: k must be in \[1, N = 6\], got 7"):
        bank.search(queries, 7)
    with pytest.raises(ValueError, match=r"search: k must be in \[1, N = 0\], got 1"):
        MemoryBank().search(queries)
    with pytest.raises(ValueError, match=r"range_search: radius must be a number, got nan"):
        bank.range_search(queries, math.nan)
    searches: dict[str, Callable[..., object]] = {
        "search": bank.search,
        "range_search": bank.range_search,
    }
    for name, search in searches.items():
        refused: list[tuple[type[Exception], str, Any, Any]] = [
            (TypeError, "queries must be a tensor or a numpy array", [[0.0]], None),
            (TypeError, "queries must be float32, got float64", queries.double(), None),
            (TypeError, "queries must be float32, got float16", queries.half().numpy(), None),
            (ValueError, r"queries must have shape \(Q, 3\), got \(1, 4\)", torch.ones(1, 4), None),
            (TypeError, "mask must be bool, got float32", queries, torch.ones(6)),
            (
                ValueError,
                r"mask must have shape \(6,\) or \(2, 6\), got \(2,\)",
                queries,
                queries[:, 0] > 0,
            ),
            (ValueError, r"got \(1, 6\)", queries, torch.ones(1, 6) > 0),
        ]
        for kind, message, asked, mask in refused:
            with pytest.raises(kind, match=rf"MemoryBank\.{name}: .*{message}"):
                search(asked, 1, mask=mask)
        with pytest.raises(ValueError, match="queries must be finite"):
            search(queries / 0.0, 1)


def test_nothing_is_read_from_another_device() -> None:
    bank, queries = MemoryBank(torch.zeros(6, 3)), torch.zeros(2, 3)
    searches: tuple[Callable[..., object], ...] = (bank.search, bank.range_search)
    for search in searches:
        with pytest.raises(ValueError, match="mask must be on cpu like queries, got meta"):
            search(queries, 1, mask=torch.ones(6, device="meta") > 0)
    bank._features = torch.empty((6, 3), device="meta")
    for search in searches:
        with pytest.raises(ValueError, match="memory must be on cpu like queries, got meta"):
            search(queries, 1)
    with pytest.raises(NotImplementedError, match=r"MemoryBank\.cover: .*inputs are on meta"):
        bank.cover(queries, radius=1.0)


def test_in_an_empty_bank_nothing_is_within_a_radius() -> None:
    emptied = MemoryBank(torch.randn(3, 4))
    emptied.remove(numbers(0, 1, 2))
    for bank in (MemoryBank(), emptied):
        found = bank.range_search(torch.randn(5, 7).half(), 9.0, mask=torch.ones(0) > 0)
        assert torch.equal(found.offsets, torch.zeros(6, dtype=torch.int64))
        assert found.indices.shape == found.distances.shape == (0,)


def test_of_two_equal_rows_the_older_one_wins() -> None:
    bank = MemoryBank(torch.zeros(3, 2), ids=numbers(30, 20, 10))
    bank.add(torch.zeros(1, 2), numbers(0))
    nearest = bank.search(torch.ones(1, 2), 4).indices
    assert torch.equal(bank.ids[nearest[0]], numbers(30, 20, 10, 0))
    bank.remove(numbers(30))
    assert bank.ids[bank.search(torch.ones(1, 2)).indices[0, 0]] == 20


def test_a_search_never_answers_from_an_older_state() -> None:
    bank = MemoryBank(torch.randn(500, 8))
    queries = torch.randn(20, 8)

    def check() -> None:
        expected = pyfeat.knn(queries, bank.features, 2)
        found = bank.search(queries, 2)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.distances, expected.distances)

    check()
    bank.add(queries + 0.01)
    check()
    bank.remove(bank.ids[bank.search(queries).indices[:, 0]])
    check()
    bank.features[3] = queries[0]
    check()
    assert bank.search(queries).indices[0, 0] == 3
    bank.coreset(size=100)
    check()
    bank = copy.deepcopy(bank)
    check()


# The precision of the packed copy


COARSEST_FIRST = ("int8", "bf16", "float32")


def told_apart_by(precision: str) -> tuple[Tensor, Tensor]:
    """Queries and rows that this precision can tell apart, and no coarser one."""
    rows = torch.randn(4000, 32)
    if precision == "float32":  # tight clusters far from each other
        rows = 10.0 * torch.randn(4, 32).repeat(1000, 1) + 0.1 * rows
        return rows[:256] + 0.1 * torch.randn(256, 32), rows
    if precision == "bf16":  # one feature outweighs all others
        rows[:, 0] = torch.tensor([-128.0, 128.0]).repeat(2000)
    queries = rows[:256] + 0.3 * torch.randn(256, 32)
    queries[:, 0] = rows[:256, 0]
    return queries, rows


def chosen(bank: MemoryBank) -> str:
    """The precision of the packed copy."""
    bank.range_search(bank.features[:1], 0.0)
    packed = bank._packed._packed
    assert packed is not None
    return packed.precision


@pytest.mark.parametrize("needed", COARSEST_FIRST)
def test_the_bank_is_packed_in_the_fastest_precision_that_tells_its_rows_apart(needed: str) -> None:
    queries, rows = told_apart_by(needed)
    bank = MemoryBank(rows)
    steps = [chosen(bank)]
    assert steps == [_C.precisions()[-1]]
    for _ in range(5):
        distances, indices = bank.search(queries, 3)
        assert_exact_neighbours(distances[:20], indices[:20], queries[:20], rows, 3, "euclidean")
        steps.append(chosen(bank))
    expected = [_C.precisions()[-1]]
    while COARSEST_FIRST.index(expected[-1]) < COARSEST_FIRST.index(needed):
        expected.append(str(next_finer(expected[-1])))
    assert steps == expected + expected[-1:] * (6 - len(expected))


def test_the_next_finer_precision_is_the_fastest_of_the_finer_ones(monkeypatch: Patch) -> None:
    monkeypatch.setattr(_C, "precisions", lambda: ["float32", "bf16", "int8"])
    assert [next_finer(name) for name in COARSEST_FIRST] == ["bf16", "float32", None]
    monkeypatch.setattr(_C, "precisions", lambda: ["bf16", "float32", "int8"])
    assert [next_finer(name) for name in COARSEST_FIRST] == ["float32", "float32", None]


# Of each search: queries, those tried again, those that took every row; and which one is followed
# by a finer precision.
SEARCHES: dict[str, tuple[list[tuple[int, int, int]], int | None]] = {
    "few queries": ([(63, 63, 0)], None),
    "an eighth": ([(64, 8, 0)], None),
    "more than an eighth": ([(64, 9, 0)], 0),
    "all, and in vain": ([(64, 64, 64)], 0),
    "in all": ([(32, 5, 0), (31, 5, 0), (1, 0, 0)], 2),
    "diluted": ([(800, 0, 0), (100, 100, 0), (100, 12, 0), (100, 26, 0)], 3),
    "without tiles": ([(64, 0, 64), (64, 0, 64), (56, 9, 0), (8, 0, 0)], 3),
    "none": ([(0, 0, 0)], None),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_a_precision_is_given_up_when_too_many_queries_are_undecided(
    monkeypatch: Patch, case: str
) -> None:
    searches, last = SEARCHES[case]
    bank = MemoryBank(torch.randn(40, 4))
    for i, (num_queries, *counters) in enumerate(searches):

        def fake(queries: Tensor, *_: Any, report: Any, **__: Any) -> tuple[Tensor, Tensor]:
            report((0, *counters))  # noqa: B023
            return queries, queries

        monkeypatch.setattr(_packed, "search_cpu", fake)
        bank.search(torch.randn(num_queries, 4))
        first = _C.precisions()[-1]
        assert chosen(bank) == (next_finer(first) if i == last else first)


def test_a_precision_outlives_new_rows_but_not_a_removal() -> None:
    queries, rows = told_apart_by("float32")
    bank = MemoryBank(rows)
    for _ in _C.precisions():
        if chosen(bank) != "float32":
            bank.search(queries)
    bank.add(torch.randn(1, 32))
    bank.features[3] = 0.0
    assert chosen(bank) == "float32"
    assert chosen(copy.deepcopy(bank)) == "float32"
    bank.remove(numbers(7))
    assert chosen(bank) == _C.precisions()[-1]


def test_a_search_that_ends_after_the_bank_was_packed_anew_does_not_count(
    monkeypatch: Patch,
) -> None:
    bank = MemoryBank(torch.randn(40, 4))

    def slow(*arguments: Any, report: Any, **options: Any) -> tuple[Tensor, Tensor]:
        bank._packed.drop()
        chosen(bank)
        report((0, 64, 0))
        return _ops.search_cpu(*arguments, **options)

    monkeypatch.setattr(_packed, "search_cpu", slow)
    bank.search(torch.randn(64, 4))
    assert chosen(bank) == _C.precisions()[-1]
