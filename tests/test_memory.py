"""The memory bank: rows and ids, added and removed."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyfeat import _rows
from pyfeat._checks import DTYPES, dtype_name
from pyfeat.memory import MemoryBank
from tests.support_memory import assert_same, numbers, places

Patch = pytest.MonkeyPatch


def test_rows_keep_their_order_and_their_ids() -> None:
    rows = torch.randn(6, 3)
    bank = MemoryBank(rows[:2], ids=numbers(7, 3))
    bank.add(rows[2:5], numbers(5, 9, 1))
    bank.add(rows[5:].numpy(), np.array([4]))
    assert len(bank) == 6
    assert torch.equal(bank.features, rows)
    assert torch.equal(bank.ids, numbers(7, 3, 5, 9, 1, 4))


def test_the_bank_copies_what_it_is_given() -> None:
    rows, ids = torch.randn(4, 3), numbers(3, 1, 4, 2)
    expected = copy.deepcopy((rows, ids))
    bank = MemoryBank(rows, ids=ids)
    rows.zero_()
    ids.zero_()
    assert torch.equal(bank.features, expected[0])
    assert torch.equal(bank.ids, expected[1])


def test_a_bank_can_be_added_to_itself() -> None:
    rows = torch.randn(5, 3)
    bank = MemoryBank(rows)
    bank.add(torch.randn(1, 3))
    bank.add(bank.features[:5])
    assert torch.equal(bank.features[6:], rows)


def test_rows_that_carry_a_gradient_are_stored_without_it() -> None:
    bank = MemoryBank(torch.randn(3, 2, requires_grad=True))
    bank.add(torch.randn(1, 2, requires_grad=True))
    assert not bank.features.requires_grad


def test_default_ids_count_on_from_the_highest_one_given() -> None:
    bank = MemoryBank(torch.randn(2, 3))
    assert torch.equal(bank.ids, numbers(0, 1))
    bank.add(torch.randn(1, 3), numbers(41))
    bank.add(torch.randn(2, 3))
    bank.add(torch.randn(1, 3), numbers(7))
    bank.add(torch.randn(1, 3))
    assert torch.equal(bank.ids, numbers(0, 1, 41, 42, 43, 7, 44))


def test_ids_may_have_several_numbers() -> None:
    rows, ids = torch.randn(18, 4), places(3)
    bank = MemoryBank(rows[:6], ids=ids[:6])
    bank.add(rows[6:], ids[6:])
    assert bank.remove(torch.tensor([[1, 1, 2], [0, 0, 0], [2, 0, 1]])) == 3
    keep = torch.ones(18, dtype=torch.bool)
    keep[[0, 11, 13]] = False
    assert torch.equal(bank.features, rows[keep])
    assert torch.equal(bank.ids, ids[keep])


@pytest.mark.parametrize("shape", [(), (3,)], ids=["single", "triple"])
def test_many_small_adds_equal_one_big_one(shape: tuple[int, ...]) -> None:
    rows, ids = torch.randn(400, 5), torch.randint(-50, 50, (400, *shape))
    bank, begin = MemoryBank(), 0
    while begin < 400:
        end = begin + int(torch.randint(0, 8, ()))
        bank.add(rows[begin:end], ids[begin:end])
        begin = end
    assert_same(bank, MemoryBank(rows, ids=ids))


def test_a_growing_bank_copies_each_row_a_constant_number_of_times(
    monkeypatch: Patch,
) -> None:
    copied = 0
    grown = _rows._grown

    def counted(held: Tensor, capacity: int) -> Tensor:
        nonlocal copied
        copied += len(held)
        return grown(held, capacity)

    monkeypatch.setattr(_rows, "_grown", counted)
    bank = MemoryBank()
    for _ in range(3000):
        bank.add(torch.zeros(1, 2))
    assert 2 * 1500 < copied <= 2 * 2 * 3000  # features and ids, doubled each time


def test_remove_drops_all_rows_with_an_id_and_keeps_the_order() -> None:
    rows = torch.randn(6, 3)
    bank = MemoryBank(rows, ids=numbers(5, 8, 5, 2, 8, 1))
    assert bank.remove(np.array([8, 1, 8])) == 3
    assert torch.equal(bank.features, rows[[0, 2, 3]])
    assert torch.equal(bank.ids, numbers(5, 5, 2))
    assert bank.remove(numbers()) == 0
    assert len(bank) == 3


def test_an_emptied_bank_can_be_filled_with_rows_of_another_kind() -> None:
    bank = MemoryBank(torch.randn(3, 4))
    assert bank.remove(numbers(0, 1, 2)) == 3
    assert len(bank) == 0
    assert bank.remove(numbers()) == 0
    bank.add(torch.randn(2, 7).half())
    assert bank.features.shape == (2, 7)
    assert bank.features.dtype == torch.float16
    assert torch.equal(bank.ids, numbers(3, 4))


@pytest.mark.parametrize("multiple", [False, True], ids=["single", "triple"])
def test_an_unknown_id_leaves_the_bank_whole(multiple: bool) -> None:
    ids = places(2) if multiple else torch.arange(12)
    unknown = torch.tensor([2, 0, 0]) if multiple else torch.tensor(12)
    bank = MemoryBank(torch.randn(12, 3), ids=ids)
    before = copy.deepcopy(bank)
    named = r"\[2, 0, 0\]" if multiple else "12"
    with pytest.raises(KeyError, match=f"MemoryBank.remove: ids must be in the bank, got {named}"):
        bank.remove(torch.stack([ids[3], unknown, ids[5]]))
    assert_same(bank, before)


def test_remove_refuses_ids_of_another_kind() -> None:
    bank = MemoryBank(torch.randn(6, 3), ids=places(1))
    with pytest.raises(ValueError, match=r"remove: ids must have shape \(n, 3\), got \(1, 2\)"):
        bank.remove(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"remove: ids must have shape \(n, 3\), got \(3,\)"):
        bank.remove(numbers(0, 0, 0))
    with pytest.raises(TypeError, match="remove: ids must be int64, got float32"):
        bank.remove(torch.zeros(1, 3))


def add_refused(features: Any, ids: Any = None) -> Callable[[MemoryBank], None]:
    return lambda bank: bank.add(features, ids)


NAN = torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])
REFUSED: dict[str, tuple[type[Exception], str, Callable[[MemoryBank], None]]] = {
    "list": (TypeError, "features must be a tensor or a numpy", add_refused([[1.0, 2.0, 3.0]])),
    "double": (TypeError, "must be float32, got float64", add_refused(torch.zeros(1, 3).double())),
    "integer": (TypeError, "must be float32, got int64", add_refused(np.zeros((1, 3), np.int64))),
    "width": (ValueError, r"shape \(N, 3\), got \(1, 4\)", add_refused(torch.zeros(1, 4))),
    "vector": (ValueError, r"shape \(N, D\), got \(3,\)", add_refused(torch.zeros(3))),
    "nan": (ValueError, "must be finite, got NaN or infinity in row 1", add_refused(NAN)),
    "infinite": (ValueError, "must be finite, got .* row 0", add_refused(torch.ones(1, 3) / 0)),
    "count": (
        ValueError,
        r"ids must have shape \(2,\), got \(1,\)",
        add_refused(torch.zeros(2, 3), numbers(1)),
    ),
    "ids": (TypeError, "ids must be int64, got int32", add_refused(NAN[:1], np.zeros(1, np.int32))),
    "columns": (
        ValueError,
        r"ids must have shape \(1,\), got \(1, 3\)",
        add_refused(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64)),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_row_leaves_the_bank_whole(case: str) -> None:
    kind, message, action = REFUSED[case]
    bank = MemoryBank(torch.randn(2, 3))
    before = copy.deepcopy(bank)
    with pytest.raises(kind, match=f"MemoryBank.add: .*{message}"):
        action(bank)
    assert_same(bank, before)
    bank.add(torch.zeros(1, 3))
    assert torch.equal(bank.ids, numbers(0, 1, 2))


def test_ids_of_several_numbers_have_no_default() -> None:
    bank = MemoryBank(torch.randn(6, 3), ids=places(1))
    with pytest.raises(ValueError, match=r"add: ids must have shape \(n, 3\), got None"):
        bank.add(torch.randn(1, 3))


def test_a_bank_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="MemoryBank: metric must be one of 'euclidean'"):
        MemoryBank(metric="manhattan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ids must be None without features, got Tensor"):
        MemoryBank(ids=numbers(1))
    with pytest.raises(ValueError, match=r"ids must have shape \(2,\) or \(2, c\), got \(\)"):
        MemoryBank(torch.zeros(2, 3), ids=torch.tensor(1))
    with pytest.raises(TypeError, match=r"features must be float32 or .*, got int64"):
        MemoryBank(np.zeros((1, 3), np.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_dtype_of_the_first_rows_is_the_banks(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 3).to(dtype)
    bank = MemoryBank(rows[:2])
    bank.add(rows[2:])
    assert bank.features.dtype == dtype
    assert torch.equal(bank.features, rows)
    for other in DTYPES:
        if other != dtype:
            message = f"add: features must be {dtype_name(dtype)}, got {dtype_name(other)}"
            with pytest.raises(TypeError, match=message):
                bank.add(rows.to(other))
    assert len(bank) == 5


def test_a_bank_says_what_it_holds() -> None:
    assert repr(MemoryBank()) == "MemoryBank(0 x 0 float32, metric='euclidean', radius=None)"
    bank = MemoryBank(torch.tensor([[0.0], [3.0], [4.0]]).double(), metric="cosine")
    bank.coreset(size=2, start=0)
    assert repr(bank) == "MemoryBank(2 x 1 float64, metric='cosine', radius=1.0)"


COPIES: dict[str, Callable[[MemoryBank], MemoryBank]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_bank_of_its_own(how: str) -> None:
    bank = MemoryBank(torch.randn(40, 3), ids=torch.arange(100, 140))
    bank.coreset(size=9)
    bank.add(torch.randn(1, 3))  # so that there is room left behind the rows
    bank.search(torch.randn(2, 3))
    other = COPIES[how](bank)
    assert_same(other, bank)
    before = copy.deepcopy(bank)
    other.add(torch.zeros(3, 3))
    other.features[0] = 7.0
    assert other.search(other.features[:1]).distances[0, 0] == 0
    assert torch.equal(bank.search(bank.features).indices[:, 0], torch.arange(10))
    assert_same(bank, before)
    bank.add(torch.ones(3, 3))
    assert torch.equal(other.features[10:], torch.zeros(3, 3))
    assert torch.equal(other.ids[10:], numbers(141, 142, 143))
    assert other.radius is None
    assert COPIES[how](other).radius is None
    bank.features[0] = 7.0
    assert COPIES[how](bank).radius is None


def test_a_bank_made_in_inference_mode_can_be_used_outside() -> None:
    rows = torch.randn(12, 3)
    with torch.inference_mode():
        bank = MemoryBank(rows[:6].clone())
        bank.remove(numbers(2))
        bank.search(rows.clone())
        bank.features[4] = rows[2]
        assert bank.search(rows[2:3]).indices[0, 0] == 4
    bank.add(rows[6:])
    bank.features[3] = rows[5]
    assert bank.search(rows[5:6]).indices[0, 0] == 3
    bank.coreset(size=5)
    with torch.inference_mode():
        bank.add(rows[:1].clone())
        bank = copy.deepcopy(bank)
        assert bank.search(rows[:1].clone()).distances[0, 0] == 0


# Merging


def test_a_merged_bank_holds_the_rows_of_both_with_their_ids() -> None:
    rows, ids = torch.randn(30, 4).double(), places(5)
    bank, other = MemoryBank(rows[:18], ids=ids[:18]), MemoryBank(rows[18:], ids=ids[18:])
    bank.search(rows)
    bank.merge(other)
    assert_same(bank, MemoryBank(rows, ids=ids))
    assert_same(other, MemoryBank(rows[18:], ids=ids[18:]))
    assert torch.equal(bank.search(rows).indices[:, 0], torch.arange(30))
    bank.features[20] = 0.0
    assert torch.equal(other.features, rows[18:])


def test_ids_that_both_banks_have_are_shared() -> None:
    bank = MemoryBank(torch.zeros(2, 3))
    bank.merge(MemoryBank(torch.ones(3, 3)))
    assert torch.equal(bank.ids, numbers(0, 1, 0, 1, 2))
    assert bank.remove(numbers(1)) == 2
    assert torch.equal(bank.features, torch.tensor([0.0, 1.0, 1.0])[:, None].expand(3, 3))


@pytest.mark.parametrize("emptied", [False, True])
def test_ids_counted_on_after_merge_are_new_to_both_banks(emptied: bool) -> None:
    other = MemoryBank(torch.randn(9, 3))
    other.remove(torch.arange(9) if emptied else numbers(8, 1))
    for count in (0, 2, 20):
        bank = MemoryBank(torch.randn(count, 3)) if count else MemoryBank()
        bank.merge(other)
        assert len(bank) == count + len(other)
        bank.add(torch.randn(1, 3))
        assert bank.ids[-1] == max(9, count)


def test_an_empty_bank_takes_the_kind_of_the_one_merged_into_it() -> None:
    other = MemoryBank(torch.randn(6, 5).bfloat16(), metric="cosine", ids=places(1))
    bank = MemoryBank(metric="cosine")
    bank.merge(other)
    assert_same(bank, other)
    bank.merge(MemoryBank(torch.empty(0, 3), metric="cosine"))
    assert_same(bank, other)


def with_infinity(_: MemoryBank) -> MemoryBank:
    bank = MemoryBank(torch.zeros(2, 3))
    bank.features[1, 2] = float("inf")
    return bank


NOT_MERGED: dict[str, tuple[type[Exception], str, Callable[[MemoryBank], object]]] = {
    "itself": (ValueError, "must be another bank, got the bank itself", lambda bank: bank),
    "rows": (TypeError, "must be a MemoryBank, got Tensor", lambda bank: bank.features),
    "metric": (
        ValueError,
        "must have metric 'euclidean', got 'cosine'",
        lambda _: MemoryBank(torch.zeros(1, 3), metric="cosine"),
    ),
    "empty": (ValueError, "must have metric", lambda _: MemoryBank(metric="sqeuclidean")),
    "dtype": (
        TypeError,
        "must be float32, got float16",
        lambda _: MemoryBank(torch.zeros(1, 3).half()),
    ),
    "width": (
        ValueError,
        r"must have shape \(N, 3\), got \(1, 4\)",
        lambda _: MemoryBank(torch.zeros(1, 4)),
    ),
    "infinite": (ValueError, "must be finite, got NaN or infinity in row 1", with_infinity),
    "ids": (
        ValueError,
        r"ids must have shape \(6,\), got \(6, 3\)",
        lambda _: MemoryBank(torch.zeros(6, 3), ids=places(1)),
    ),
}


@pytest.mark.parametrize("case", NOT_MERGED)
def test_a_refused_merge_leaves_the_bank_whole(case: str) -> None:
    kind, message, make = NOT_MERGED[case]
    bank = MemoryBank(torch.randn(2, 3))
    before = copy.deepcopy(bank)
    with pytest.raises(kind, match=f"MemoryBank.merge: (other )?{message}"):
        bank.merge(make(bank))  # type: ignore[arg-type]
    assert_same(bank, before)
    bank.add(torch.zeros(1, 3))
    assert bank.ids[-1] == 2
