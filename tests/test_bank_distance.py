"""Distances to a memory: value, gradient to the queries alone, bounds, and no matrix of all pairs."""

import math

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import bank_min_distance, reference

SHAPES = [(1, 1, 1), (31, 257, 33), (40, 9, 5)]


def exact(queries: Tensor, bank: Tensor, bound: float = math.inf) -> Tensor:
    """(Q,) float64 by brute force, with the gradient of autograd."""
    distances: Tensor = (queries[:, None] - bank).norm(dim=-1)
    return distances.amin(dim=1).clamp(max=bound)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradient_are_those_of_brute_force(
    shape: tuple[int, int, int], reduction: str
) -> None:
    num_queries, num_rows, dim = shape
    queries = torch.randn(num_queries, dim, requires_grad=True)
    bank = torch.randn(num_rows, dim, requires_grad=True)
    bound = float(exact(queries.detach(), bank.detach()).median()) + 0.01
    found = bank_min_distance(queries, bank, max_distance=bound, reduction=reduction)  # type: ignore[arg-type]
    twin = queries.detach().double().requires_grad_()
    each = exact(twin, bank.detach().double(), bound)
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    weights = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    torch.autograd.backward([(found * weights.float()).sum()])
    torch.autograd.backward([(expected * weights).sum()])
    assert torch.allclose(found.double(), expected, rtol=1e-6)
    assert queries.grad is not None
    assert twin.grad is not None
    assert torch.allclose(queries.grad.double(), twin.grad, rtol=1e-5, atol=1e-7)
    assert bank.grad is None


def test_the_gradient_is_that_of_finite_differences() -> None:
    queries = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(7, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: bank_min_distance(q, bank), (queries,))


def test_a_query_on_a_row_or_beyond_the_bound_is_not_pulled() -> None:
    queries = torch.tensor([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0]], requires_grad=True)
    distances = bank_min_distance(queries, torch.zeros(2, 2), max_distance=5.0, reduction="none")
    assert distances.tolist() == [0.0, 5.0, 1.0]
    torch.autograd.backward([distances.sum()])
    assert queries.grad is not None
    assert queries.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


def test_queries_that_are_masked_out_neither_count_nor_are_looked_at() -> None:
    values = torch.randn(6, 4)
    values[2] = torch.nan
    queries = values.clone().requires_grad_()
    bank, mask = torch.randn(9, 4), torch.tensor([True, False, False, True, True, False])
    mean = bank_min_distance(queries, bank, mask=mask)
    assert torch.equal(mean, bank_min_distance(values[mask], bank))
    torch.autograd.backward([mean])
    assert queries.grad is not None
    assert (queries.grad[~mask] == 0).all()
    assert (queries.grad[mask].norm(dim=1) - 1 / 3).abs().max() < 1e-6
    each = bank_min_distance(values, bank, mask=mask, reduction="none")
    assert (each > 0).tolist() == mask.tolist()


def test_rows_that_may_not_be_nearest_are_passed_over() -> None:
    queries, bank = torch.randn(6, 4), torch.randn(9, 4)
    allowed = torch.arange(9) % 2 == 0
    found = bank_min_distance(queries, bank, bank_mask=allowed)
    assert torch.equal(found, bank_min_distance(queries, bank[allowed]))
    assert found > bank_min_distance(queries, bank)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_query_at_all_is_at_no_distance(reduction: str) -> None:
    queries = torch.randn(3, 4, requires_grad=True)
    nobody = torch.zeros(3, dtype=torch.bool)
    distance = bank_min_distance(queries, torch.randn(2, 4), mask=nobody, reduction=reduction)  # type: ignore[arg-type]
    assert distance == 0
    torch.autograd.backward([distance])
    assert queries.grad is not None
    assert not queries.grad.any()


def test_the_backend_asked_for_runs() -> None:
    queries, bank = torch.randn(4, 3), torch.randn(5, 3)
    expected = reference.knn(queries, bank, 1, "euclidean")[0].mean()
    assert torch.equal(bank_min_distance(queries, bank, backend="reference"), expected)
    with pytest.raises(NotImplementedError, match="knn: "):
        bank_min_distance(queries, bank, backend="cuda")


def test_rows_overwritten_before_the_backward_pass_are_noticed() -> None:
    queue = pyfeat.losses.FeatureQueue(3, 2)
    queue.enqueue(torch.randn(3, 2))
    distance = bank_min_distance(torch.randn(2, 2, requires_grad=True), queue.features)
    queue.enqueue(torch.randn(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward([distance])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank": torch.zeros(0, 4)}, r"bank must hold at least one row, got shape \(0, 4\)"),
        ({"bank": torch.zeros(2, 3)}, r"memory must have shape \(N, 4\), got \(2, 3\)"),
        ({"max_distance": 0.0}, "max_distance must be positive and finite, got 0.0"),
        ({"max_distance": math.nan}, "max_distance must be positive and finite, got nan"),
        ({"reduction": "max"}, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask must have shape \(3,\)"),
        (
            {"bank_mask": torch.zeros(2, dtype=torch.bool)},
            "must allow at least one row, got none of 2",
        ),
        ({"queries": torch.full((3, 4), torch.nan)}, "queries must be finite"),
    ],
    ids=["empty bank", "width", "zero", "nan bound", "reduction", "mask", "bank mask", "nan"],
)
def test_a_wrong_argument_is_refused(options: dict[str, object], message: str) -> None:
    arguments = {"queries": torch.zeros(3, 4), "bank": torch.zeros(2, 4), **options}
    with pytest.raises(ValueError, match=message):
        bank_min_distance(**arguments)  # type: ignore[arg-type]
