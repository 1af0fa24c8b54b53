"""Sinkhorn-Knopp against the usual loop, and assignments that are not stored against the matrix."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import reference
from pyfeat.losses import _sinkhorn, sinkhorn, sinkhorn_assignment
from tests.support_losses import unit
from tests.support_prototypes import Largest, usual_sinkhorn

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (33, 257), (400, 30)]


# Scores at hand


@pytest.mark.parametrize("epsilon", [0.05, 1.0])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sinkhorn_is_the_usual_loop(
    shape: tuple[int, int], iterations: int, epsilon: float
) -> None:
    scores = torch.rand(shape, dtype=torch.float64) * 2 - 1
    expected = usual_sinkhorn(scores, epsilon, iterations)
    found = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-300)
    rounded = sinkhorn(scores.float(), epsilon=epsilon, iterations=iterations)
    exact = usual_sinkhorn(scores.float().double(), epsilon, iterations)
    torch.testing.assert_close(rounded.double(), exact, rtol=2.0**-23, atol=2.0**-149)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-6, 1e-30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_epsilon_is_too_small(shape: tuple[int, int], epsilon: float) -> None:
    # Whole multiples of epsilon: at any epsilon rounding stays out of sight.
    steps = (torch.rand(shape, dtype=torch.float64) * 4000).round() * min(1.0, 1e-3 / epsilon)
    scores = steps * epsilon
    found = sinkhorn(scores, epsilon=epsilon, iterations=4)
    exact = reference.sinkhorn(scores, epsilon, 4)
    # What rounding does to scores of so many epsilons.
    rtol = 1e-14 + 64 * 2.0**-53 * float(steps.max())
    if rtol < 0.1:
        torch.testing.assert_close(found, exact, rtol=rtol, atol=1e-300)
    torch.testing.assert_close(
        found.sum(dim=1), torch.ones(len(scores), dtype=torch.float64), rtol=1e-12, atol=0.0
    )


def test_columns_that_no_row_wants_are_balanced_too() -> None:
    # Probabilities of column 2 are e^-2000 in every row: 0, unless logarithms are added up.
    scores = torch.tensor([[0.0, 1.0, -2000.0], [1.0, 0.0, -2001.0], [0.5, 0.5, -2003.0]])
    found = sinkhorn(scores, epsilon=1.0, iterations=200)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(3), rtol=1e-3, atol=0.0)
    biased = scores - torch.tensor([0.0, 0.0, -2000.0])  # a term of the column cancels
    torch.testing.assert_close(found, sinkhorn(biased, epsilon=1.0, iterations=200))


@pytest.mark.parametrize("num_bytes", [8, 8 * 30 * 7, 1 << 30])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    scores = torch.randn(50, 30, dtype=torch.float64) * 30
    scores[:, 3] -= 3000.0
    expected = sinkhorn(scores, epsilon=1.0)
    monkeypatch.setattr(_sinkhorn, "_CHUNK_BYTES", num_bytes)
    torch.testing.assert_close(sinkhorn(scores, epsilon=1.0), expected, rtol=1e-12, atol=1e-300)


def test_equal_column_sums_are_the_limit() -> None:
    found = sinkhorn(torch.randn(60, 12, dtype=torch.float64), epsilon=0.5, iterations=300)
    torch.testing.assert_close(
        found.sum(dim=0), torch.full((12,), 5.0, dtype=torch.float64), rtol=1e-10, atol=0.0
    )


def test_one_row_is_spread_over_all_columns() -> None:
    torch.testing.assert_close(sinkhorn(torch.randn(1, 8)), torch.full((1, 8), 0.125))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_it_is(dtype: torch.dtype) -> None:
    scores = (60 * torch.randn(40, 9)).to(dtype)  # e^(60 / 0.05) overflows in any dtype
    found = sinkhorn(scores)
    assert found.dtype == torch.float32
    assert torch.equal(found, sinkhorn(scores.double()).float())


def test_no_rows_are_no_rows_and_strides_do_not_matter() -> None:
    assert sinkhorn(torch.empty(0, 5)).shape == (0, 5)
    scores = torch.randn(9, 40).T[:, ::2]
    found = sinkhorn(scores)
    assert torch.equal(found, sinkhorn(scores.contiguous()))
    assert found.is_contiguous()


def test_scores_get_no_gradient() -> None:
    assert not sinkhorn(torch.randn(3, 4, requires_grad=True)).requires_grad


def test_scores_are_not_copied() -> None:
    scores = torch.randn(4000, 400)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        sinkhorn(scores)
    assert largest.num_bytes == scores.numel() * 4  # the result


# Without scores


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 257), (400, 30)], ids=str)
def test_assignments_are_as_good_as_torch(
    shape: tuple[int, int], iterations: int, epsilon: float
) -> None:
    features, prototypes = unit(shape[0], 24), unit(shape[1], 24)
    assignment = sinkhorn_assignment(features, prototypes, epsilon=epsilon, iterations=iterations)
    exact = usual_sinkhorn(features.double() @ prototypes.double().T, epsilon, iterations)
    theirs = usual_sinkhorn(features @ prototypes.T, epsilon, iterations)
    found = assignment.probabilities()
    budget = 2 * ((theirs - exact).abs() / exact).max() + 2.0**-22 * (1 + 1 / epsilon)
    assert ((found - exact).abs() <= budget * exact).all()


def test_float64_assignments_are_those_of_the_scores() -> None:
    features, prototypes = unit(70, 5).double(), unit(90, 5).double()
    for epsilon in (0.05, 1e-3):
        found = sinkhorn_assignment(features, prototypes, epsilon=epsilon).probabilities()
        exact = sinkhorn(features @ prototypes.T, epsilon=epsilon)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-290)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-3, 1e-4, 1e-5])
def test_rows_sum_to_one_at_any_epsilon(epsilon: float) -> None:
    features, prototypes = unit(50, 8), unit(20, 8)
    features[3] = 0.0
    features[5] = features[4]
    found = sinkhorn_assignment(features, prototypes, epsilon=epsilon).probabilities()
    # Similarities over epsilon are known to a few times 2^-24 / epsilon, as log-sum-exps are.
    rtol = 4 * 2.0**-24 / epsilon
    torch.testing.assert_close(found.sum(dim=1), torch.ones(50), rtol=rtol, atol=0.0)
    torch.testing.assert_close(found[5], found[4], rtol=2 * rtol, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_and_their_gradients_are_products_with_the_matrix(dtype: torch.dtype) -> None:
    features, prototypes = unit(37, 9).to(dtype), unit(61, 9).to(dtype)
    assignment = sinkhorn_assignment(features, prototypes)
    q = assignment.probabilities().double()
    values = torch.randn(61, 13).to(dtype).requires_grad_()
    weights = torch.randn(37, 13)
    mean = assignment.mean(values)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), q @ values.double(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(mean, values, weights)
    exact = q.T @ weights.double()
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact, rtol=max(rtol, 1e-5), atol=1e-5)


def test_means_pass_gradcheck_twice() -> None:
    assignment = sinkhorn_assignment(unit(6, 3).double(), unit(5, 3).double())
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)

    def squares(x: Tensor) -> Tensor:
        return assignment.mean(x).square()

    assert torch.autograd.gradcheck(squares, (values,))
    assert torch.autograd.gradgradcheck(squares, (values,))


def test_a_queue_takes_part_in_the_balance() -> None:
    features, queue, prototypes = unit(20, 6), unit(70, 6), unit(15, 6)
    found = sinkhorn_assignment(features, prototypes, queue=queue).probabilities()
    everything = sinkhorn(torch.cat([queue, features]) @ prototypes.T)
    torch.testing.assert_close(found, everything[-20:], rtol=1e-4, atol=1e-7)
    alone = sinkhorn_assignment(features, prototypes).probabilities()
    assert (found - alone).abs().max() > 0.1
    nothing = sinkhorn_assignment(features, prototypes, queue=queue[:0]).probabilities()
    assert torch.equal(nothing, alone)


def test_features_are_normalized_if_wanted() -> None:
    features, prototypes = torch.randn(9, 4), 3 * torch.randn(7, 4)
    found = sinkhorn_assignment(features, prototypes, normalize=True).probabilities()
    normal = F.normalize(features, dim=1), F.normalize(prototypes, dim=1)
    torch.testing.assert_close(found, sinkhorn(normal[0] @ normal[1].T), rtol=1e-4, atol=1e-7)


def test_no_features_have_no_assignment() -> None:
    assignment = sinkhorn_assignment(torch.empty(0, 4), unit(3, 4))
    assert assignment.probabilities().shape == (0, 3)
    assert assignment.columns.isfinite().all()
    values = unit(3, 4).requires_grad_()
    assert (torch.autograd.grad(assignment.mean(values).sum(), values)[0] == 0).all()


def test_both_backends_agree() -> None:
    features, prototypes = unit(30, 6), unit(12, 6)
    found = sinkhorn_assignment(features, prototypes)
    exact = sinkhorn_assignment(features, prototypes, backend="reference")
    torch.testing.assert_close(found.row_lse, exact.row_lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.columns, exact.columns, rtol=1e-6, atol=1e-5)


def test_no_matrix_of_features_and_prototypes_is_made() -> None:
    features, prototypes = unit(3000, 4), unit(2500, 4)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        assignment = sinkhorn_assignment(features, prototypes)
        values = prototypes.clone().requires_grad_()
        torch.autograd.grad(assignment.mean(values).sum(), values)
    assert largest.num_elements <= 3000 * 4  # the features, against 7,500,000


# Refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sinkhorn(torch.tensor([[0.0, math.nan]])),
            ValueError,
            "sinkhorn: scores must be finite, got NaN or infinity in row 0",
        ),
        (
            lambda: sinkhorn(torch.zeros(3, 0)),
            ValueError,
            r"sinkhorn: scores must have at least one column, got shape \(3, 0\)",
        ),
        (lambda: sinkhorn(torch.zeros(3)), ValueError, "sinkhorn: scores must have shape"),
        (
            lambda: sinkhorn(torch.zeros(3, 2), epsilon=-1.0),
            ValueError,
            r"sinkhorn: epsilon must be positive and finite, got -1\.0",
        ),
        (
            lambda: sinkhorn(torch.zeros(3, 2), iterations=0),
            ValueError,
            "sinkhorn: iterations must be at least 1, got 0",
        ),
        (
            lambda: sinkhorn(torch.zeros(3, 2), iterations=2.0),  # type: ignore[arg-type]
            TypeError,
            r"sinkhorn: iterations must be an integer, got 2\.0",
        ),
        (
            lambda: sinkhorn_assignment(unit(3, 2), 2 * unit(4, 2), epsilon=1e-6),
            ValueError,
            r"sinkhorn_assignment: epsilon must be at least 1e-06 \|features\| \|prototypes\| for the "
            r"longest, 2e-06, got 1e-06",
        ),
        (
            lambda: sinkhorn_assignment(unit(3, 2), unit(4, 3)),
            ValueError,
            r"sinkhorn_assignment: prototypes must have shape \(N, 2\), got \(4, 3\)",
        ),
        (
            lambda: sinkhorn_assignment(unit(3, 2), unit(4, 2)[:0]),
            ValueError,
            r"sinkhorn_assignment: prototypes must have at least one row, got shape \(0, 2\)",
        ),
        (
            lambda: sinkhorn_assignment(unit(3, 2), unit(4, 2), queue=unit(4, 2) * math.inf),
            ValueError,
            "sinkhorn_assignment: queue must be finite",
        ),
        (
            lambda: sinkhorn_assignment(unit(3, 2), unit(4, 2), iterations=True),
            TypeError,
            "sinkhorn_assignment: iterations must be an integer, got True",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
