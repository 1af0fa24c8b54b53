"""The memory bank: growing, shrinking, searching, and its file."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import pyfeat
from pyfeat import memory
from pyfeat.memory import MemoryBank
from pyfeat.search import METRICS, Metric

Patch = pytest.MonkeyPatch


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def places(num_images: int, height: int = 2, width: int = 3) -> Tensor:
    """(image, y, x) of every cell."""
    return torch.cartesian_prod(*map(torch.arange, (num_images, height, width)))


def assert_same(actual: MemoryBank, expected: MemoryBank) -> None:
    assert torch.equal(actual.features, expected.features)
    assert torch.equal(actual.ids, expected.ids)
    assert actual.metric == expected.metric


@pytest.mark.parametrize("metric", METRICS)
def test_search_is_knn_against_the_rows(metric: Metric) -> None:
    rows, queries = torch.randn(57, 6), torch.randn(11, 6)
    found = MemoryBank(rows, metric=metric).search(queries, 5)
    expected = pyfeat.knn(queries, rows, 5, metric=metric)
    assert torch.equal(found.distances, expected.distances)
    assert torch.equal(found.indices, expected.indices)


def test_rows_keep_their_order_and_their_ids() -> None:
    rows = torch.randn(6, 3)
    bank = MemoryBank(rows[:2], ids=numbers(7, 3))
    bank.add(rows[2:5], numbers(5, 9, 1))
    bank.add(rows[5:].numpy(), np.array([4]))
    assert len(bank) == 6
    assert torch.equal(bank.features, rows)
    assert torch.equal(bank.ids, numbers(7, 3, 5, 9, 1, 4))


def test_of_two_equal_rows_the_older_one_wins() -> None:
    bank = MemoryBank(torch.zeros(3, 2), ids=numbers(30, 20, 10))
    bank.add(torch.zeros(1, 2), numbers(0))
    nearest = bank.search(torch.ones(1, 2), 4).indices
    assert torch.equal(bank.ids[nearest[0]], numbers(30, 20, 10, 0))
    bank.remove(numbers(30))
    assert bank.ids[bank.search(torch.ones(1, 2)).indices[0, 0]] == 20


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


def test_default_ids_are_not_given_twice_after_remove_and_load(tmp_path: Path) -> None:
    bank = MemoryBank(torch.randn(4, 3))
    bank.remove(numbers(3, 0))
    bank.add(torch.randn(1, 3))
    assert torch.equal(bank.ids, numbers(1, 2, 4))
    bank.remove(numbers(4))
    bank.save(tmp_path / "bank")
    loaded = MemoryBank.load(tmp_path / "bank")
    loaded.add(torch.randn(1, 3))
    assert torch.equal(loaded.ids, numbers(1, 2, 5))


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
    grown = memory._grown

    def counted(tensor: Tensor, size: int, capacity: int) -> Tensor:
        nonlocal copied
        copied += size
        return grown(tensor, size, capacity)

    monkeypatch.setattr(memory, "_grown", counted)
    bank = MemoryBank()
    for _ in range(3000):
        bank.add(torch.zeros(1, 2))
    assert copied <= 2 * 2 * 3000  # features and ids, doubled each time


def test_remove_drops_all_rows_with_an_id_and_keeps_the_order() -> None:
    rows = torch.randn(6, 3)
    bank = MemoryBank(rows, ids=numbers(5, 8, 5, 2, 8, 1))
    assert bank.remove(np.array([8, 1, 8])) == 3
    assert torch.equal(bank.features, rows[[0, 2, 3]])
    assert torch.equal(bank.ids, numbers(5, 5, 2))
    assert bank.remove(numbers()) == 0
    assert len(bank) == 3


def test_an_emptied_bank_can_be_filled_with_rows_of_another_width() -> None:
    bank = MemoryBank(torch.randn(3, 4))
    assert bank.remove(numbers(0, 1, 2)) == 3
    assert len(bank) == 0
    assert bank.remove(numbers()) == 0
    bank.add(torch.randn(2, 7))
    assert bank.features.shape == (2, 7)
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
    "integer": (TypeError, "must be float32 or .*, got int64", add_refused(np.zeros((1, 3), np.int64))),
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
    with pytest.raises(ValueError, match=r"k must be in \[1, N = 2\], got 3"):
        MemoryBank(torch.zeros(2, 3)).search(torch.zeros(1, 3), 3)
    with pytest.raises(ValueError, match=r"search: k must be in \[1, N = 0\], got 1"):
        MemoryBank().search(torch.zeros(1, 3))


@pytest.mark.parametrize(
    "how",
    [{"ratio": 0.2}, {"size": 9, "seed": 4}, {"radius": 1.5}, {"size": 60, "start": 3}],
    ids=str,
)
def test_a_coreset_keeps_the_rows_that_greedy_coreset_picks(how: dict[str, Any]) -> None:
    rows, ids = torch.randn(60, 4), places(10)
    bank = MemoryBank(rows, metric="cosine", ids=ids)
    found, expected = bank.coreset(**how), pyfeat.greedy_coreset(rows, **how)
    assert torch.equal(found.indices, expected.indices)
    assert found.radius == expected.radius
    assert torch.equal(bank.features, rows[expected.indices])
    assert torch.equal(bank.ids, ids[expected.indices])


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


@pytest.mark.parametrize("shape", [(0,), (1,), (40,), (40, 3)], ids=str)
def test_a_loaded_bank_equals_the_saved_one(tmp_path: Path, shape: tuple[int, ...]) -> None:
    ids = torch.randint(-9, 9, shape)
    bank = MemoryBank(torch.randn(shape[0], 5), metric="inner_product", ids=ids)
    if shape[0] > 1:
        bank.add(torch.randn(1, 5), ids[:1])  # so that there is room left behind the rows
    bank.save(str(tmp_path / "bank"))
    assert_same(MemoryBank.load(str(tmp_path / "bank")), bank)
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
def test_others_may_read_the_file_if_they_may_read_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    MemoryBank(torch.eye(3)).save(tmp_path / "bank")
    assert (tmp_path / "bank").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_over_the_file_of_a_loaded_bank_works(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    MemoryBank(torch.eye(3)).save(path)
    bank = MemoryBank.load(path)
    bank.add(torch.ones(1, 3))
    bank.save(path)
    assert_same(MemoryBank.load(path), bank)


def test_a_cut_file_is_refused_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    MemoryBank(torch.randn(20, 4)).save(path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"MemoryBank.load: path must be a whole safetensors"):
            MemoryBank.load(path)


def save_as(path: Path, **metadata: str) -> None:
    tensors = {"features": torch.eye(2), "ids": torch.arange(2)}
    header = json.dumps({"metric": "euclidean", "next_id": 2})
    safetensors.torch.save_file(tensors, path, {"header": header, **metadata})


def test_load_refuses_files_that_are_no_bank_it_can_read(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    save_as(path, kind="MemoryBank", version="1")
    assert len(MemoryBank.load(path)) == 2
    save_as(path, kind="Codebook", version="1")
    with pytest.raises(ValueError, match=r"path must hold a MemoryBank, got .* with Codebook"):
        MemoryBank.load(path)
    safetensors.torch.save_file({"x": torch.eye(2)}, path)
    with pytest.raises(ValueError, match=r"path must hold a MemoryBank, got .* with None"):
        MemoryBank.load(path)
    for version in ("2", "1.5", "next"):
        save_as(path, kind="MemoryBank", version=version)
        with pytest.raises(ValueError, match=f"version 1 or older, got .* version {version}; a ne"):
            MemoryBank.load(path)


def test_load_and_save_say_when_the_path_is_wrong(tmp_path: Path) -> None:
    bank = MemoryBank(torch.eye(2))
    with pytest.raises(FileNotFoundError, match=r"load: path must be an existing file, got .*none"):
        MemoryBank.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="load: path must be an existing file"):
        MemoryBank.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="save: path must lie in an existing folder"):
        bank.save(tmp_path / "none" / "bank")
    with pytest.raises(IsADirectoryError, match="save: path must be a file, got the folder"):
        bank.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_older_file_as_it_was(
    tmp_path: Path, monkeypatch: Patch, error: BaseException
) -> None:
    path = tmp_path / "bank"
    MemoryBank(torch.eye(3)).save(path)
    before = path.read_bytes()

    def fail(_tensors: object, file: Path, **_options: object) -> None:
        Path(file).write_bytes(b"half of")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for target in (path, tmp_path / "other"):
        with pytest.raises(type(error)):
            MemoryBank(torch.eye(4)).save(target)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


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
