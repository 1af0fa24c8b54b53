"""``koleo`` against the reference in float64 and the formula as it is usually written."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import Backend
from pyfeat.losses import koleo
from pyfeat.losses._reduction import Reduction
from tests.support_losses import with_gradients

SIZES = [(2, 1), (2, 3), (3, 7), (33, 8), (257, 64), (600, 129)]


def usual_koleo(features: Tensor) -> Tensor:
    """As in DINOv2's code, but for its offset of every coordinate."""
    z = F.normalize(features, dim=1)
    similarities = (z @ z.T).detach().fill_diagonal_(-2.0)
    return -torch.log((z - z[similarities.argmax(dim=1)]).norm(dim=1) + 1e-8)


def each(features: Tensor) -> Tensor:
    return koleo(features, reduction="none")


@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_koleo_is_the_usual_formula(rows: int, dim: int) -> None:
    features = torch.tensor([[1.5], [-2.0]]) if dim == 1 else torch.randn(rows, dim)
    exact = with_gradients(usual_koleo, features.double())
    for mine, theirs, true in zip(
        with_gradients(each, features), with_gradients(usual_koleo, features), exact, strict=True
    ):
        budget = 2 * (theirs - true).abs().max() + 2.0**-23 * true.abs().max()
        assert ((mine - true).abs() <= budget).all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_both_backends_agree_in_float64(reduction: Reduction, normalize: bool) -> None:
    def weighted(backend: Backend | None) -> Callable[[Tensor], Tensor]:
        def total(x: Tensor) -> Tensor:
            losses = koleo(
                x, epsilon=1e-3, normalize=normalize, reduction=reduction, backend=backend
            )
            return (losses * torch.arange(1.0, 1.0 + losses.numel())).sum()

        return total

    features = torch.randn(90, 5, dtype=torch.float64) * torch.arange(1.0, 91.0)[:, None]
    ours, exact = (with_gradients(weighted(backend), features) for backend in (None, "reference"))
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12 * float(true.abs().max()))


def test_both_ends_of_a_distance_are_pushed() -> None:
    # The first two are each other's nearest, the second is also that of the third.
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 24.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(koleo(x, normalize=False, reduction="sum"), x)
    first, second = torch.tensor([0.6, 0.8]) / 5, torch.tensor([0.0, 1.0]) / 20
    expected = torch.stack([2 * first, -2 * first + second, -second])
    torch.testing.assert_close(grad, expected)


def test_among_equals_the_lower_index_is_nearest() -> None:
    x = torch.tensor([[0.0], [1.0], [-1.0], [9.0], [10.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(koleo(x, normalize=False, reduction="none")[0], x)
    torch.testing.assert_close(grad, torch.tensor([[1.0], [-1.0], [0.0], [0.0], [0.0]]))


@pytest.mark.parametrize("epsilon", [1e-8, 1e-30])
@pytest.mark.parametrize("kind", ["equal", "zero", "pairs"])
def test_duplicates_have_a_finite_loss_and_no_gradient(kind: str, epsilon: float) -> None:
    x = {
        "equal": torch.ones(4, 3),
        "zero": torch.zeros(4, 3),
        "pairs": torch.randn(2, 3).repeat(2, 1),
    }[kind].requires_grad_()
    losses = koleo(x, epsilon=epsilon, reduction="none")
    torch.testing.assert_close(losses, torch.full((4,), -math.log(epsilon)))
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert (grad == 0).all()


def test_a_row_of_many_equals_is_not_its_own_neighbour() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [5.0]])
    losses = koleo(x, normalize=False, epsilon=1.0, reduction="none")
    torch.testing.assert_close(losses, -torch.tensor([1.0, 1.0, 1.0, 6.0]).log())


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_rows_without_others_have_no_loss(
    rows: int, reduction: Reduction, backend: Backend | None
) -> None:
    x = torch.randn(rows, 4, requires_grad=True)
    losses = koleo(x, reduction=reduction, backend=backend)
    assert losses.shape == ((rows,) if reduction == "none" else ())
    assert (losses == 0).all()
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    features = (100 * torch.randn(120, 16)).to(dtype)
    features[1] = features[0] * 1.01  # near in direction, where 16-bit unit vectors would be equal
    losses, grad = with_gradients(each, features)
    exact, true = with_gradients(
        lambda x: koleo(x, reduction="none", backend="reference"), features.double()
    )
    # Rows 0 and 1 are 3e-4 or more apart: float32 knows that to 2^-23 / 3e-4.
    torch.testing.assert_close(losses[:2], exact[:2], rtol=0.0, atol=4e-4)
    torch.testing.assert_close(losses[2:], exact[2:], rtol=1e-6, atol=1e-6)
    numbers = torch.finfo(dtype)
    torch.testing.assert_close(grad[2:], true[2:], rtol=numbers.eps, atol=numbers.smallest_normal)


def test_strided_features_are_read_as_they_are() -> None:
    wide = torch.randn(6, 20)[:, ::2].T
    assert koleo(wide) == koleo(wide.contiguous())


def test_the_reference_passes_gradcheck() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    for loss in (
        lambda x: koleo(x, backend="reference"),
        lambda x: reference.koleo(x, 0.1),
        lambda x: koleo(x, epsilon=0.1, normalize=False),
    ):
        assert torch.autograd.gradcheck(loss, (x,))
        assert torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: koleo(torch.tensor([[1.0, math.nan]])),
            ValueError,
            "koleo: features must be finite, got NaN or infinity in row 0",
        ),
        (
            lambda: koleo(torch.ones(2, 3), epsilon=0.0),
            ValueError,
            r"koleo: epsilon must be positive and finite, got 0\.0",
        ),
        (lambda: koleo(torch.ones(2)), ValueError, r"koleo: features must have shape \(N, D\)"),
        (
            lambda: koleo(torch.ones(2, 3, dtype=torch.int64)),
            TypeError,
            "koleo: features must be float32",
        ),
        (
            lambda: koleo(torch.ones(2, 3), reduction="max"),  # type: ignore[arg-type]
            ValueError,
            "koleo: reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (
            lambda: koleo(torch.ones(2, 3), backend="gpu"),  # type: ignore[arg-type]
            ValueError,
            "koleo: backend must be one of",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Tensor], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
