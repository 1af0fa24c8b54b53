"""Sums of softplus by blocks in plain torch: float64 features, second derivatives, and memory."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import _contrast_blocks, _softplus_blocks, reference
from pyfeat._pairs import Pairs
from pyfeat._softplus import pair_softplus
from tests.support_losses import LargestTensor, unit
from tests.support_second import assert_second_as_good_as_torch, with_second

# The last are off the block of 1,024 rows and columns, or meet blocks of other shapes.
SIZES = [(1, 1), (3, 5), (40, 7), (0, 4), (4, 0), (1030, 3), (3, 1100)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(count: int, different: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32) % different


def kinds_of_pairs(num_rows: int, num_columns: int) -> list[Pairs]:
    positive = ids(num_rows, 5), ids(num_columns, 7)
    groups = ids(num_rows, 3), ids(num_columns, 4)
    return [
        Pairs(),
        Pairs(None, *positive),
        Pairs(None, *positive, *groups),
        Pairs(None, *positive, *groups, keep_positives=True),
        Pairs(None, None, None, *groups),
    ]


def leaves_of(num_rows: int, num_columns: int, dim: int, bias: float) -> list[Tensor]:
    inputs = random(num_rows, dim), random(num_columns, dim), random(), random()
    leaves = [inputs[0], inputs[1], inputs[2].exp(), inputs[3] + bias]
    return [x.requires_grad_() for x in leaves]


@pytest.mark.parametrize("bias", [-30.0, 0.0, 40.0])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_sums_and_gradients_of_float64_features_are_those_of_the_reference(
    num_rows: int, num_columns: int, bias: float
) -> None:
    for pairs in kinds_of_pairs(num_rows, num_columns):
        a, b, scale, offset = leaves_of(num_rows, num_columns, 6, bias)
        found = pair_softplus(a, b, scale, offset, pairs)
        exact = reference.pair_softplus(a, b, scale, offset, *pairs[1:6])
        torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13 * num_columns)
        # All rows alike, as in a mean, and each with weights of its own.
        alike = torch.full((num_rows,), 0.7, dtype=torch.float64)
        for weights in (alike, random(num_rows)):
            gradients, wanted = (
                torch.autograd.grad(sums, (a, b, scale, offset), weights, retain_graph=True)
                for sums in (found, exact)
            )
            for mine, true in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("bias", [-3.0, 2.0])
def test_both_derivatives_of_the_op_are_right(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contrast_blocks, "SIDE", 4)
    for pairs in kinds_of_pairs(6, 7):
        leaves = leaves_of(6, 7, 2, bias)
        sums = functools.partial(pair_softplus, pairs=pairs)
        assert torch.autograd.gradcheck(sums, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(sums, leaves, fast_mode=True)


def sigmoid_loss(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *, backend: str | None = None
) -> Tensor:
    pairs = Pairs(None, ids(len(a), len(a)), ids(len(b), len(b)))
    if backend == "reference":
        return reference.pair_softplus(a, b, scale, bias, *pairs[1:6])
    return pair_softplus(a, b, scale, bias, pairs)


def eager_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2.0 * torch.eye(len(a), dtype=a.dtype) - 1.0
    return -F.logsigmoid(signs * (scale * a @ b.T + bias)).sum(dim=1)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (100.0, -20.0)])
@pytest.mark.parametrize(("rows", "dim"), [(1, 5), (3, 4), (33, 64), (1030, 8)])
def test_second_derivatives_are_as_good_as_torch(
    rows: int, dim: int, scale: float, bias: float
) -> None:
    inputs = [unit(rows, dim), unit(rows, dim), torch.tensor(scale), torch.tensor(bias)]
    along = [torch.randn_like(x) for x in inputs]
    for direction in (along, None):
        assert_second_as_good_as_torch((sigmoid_loss, eager_sigmoid), inputs, direction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_of_half_precision_keep_their_dtype(dtype: torch.dtype) -> None:
    features = [unit(70, 48).to(dtype), unit(70, 48).to(dtype)]
    numbers = [torch.tensor(10.0), torch.tensor(-2.0)]
    along = [torch.randn_like(x) for x in (*features, *numbers)]
    leaves = [x.clone().requires_grad_() for x in (*features, *numbers)]
    gradients = torch.autograd.grad(sigmoid_loss(*leaves).mean(), leaves, create_graph=True)
    ours = torch.autograd.grad(gradients, leaves, along)
    wide = [[x.double() for x in tensors] for tensors in ([*features, *numbers], along)]
    exact = with_second(functools.partial(sigmoid_loss, backend="reference"), *wide)
    tolerance = 2.0 * torch.finfo(dtype).eps
    for mine, true, leaf in zip(ours, exact, leaves, strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(
            mine.double(), true, rtol=tolerance, atol=tolerance * float(true.abs().max())
        )


def one_sided(which: int) -> Callable[..., Tensor]:
    """The loss of a, of b, of the scale or of the bias alone; the others have no gradient."""
    inputs = [unit(20, 8).double(), unit(20, 8).double(), torch.tensor(3.0), torch.tensor(-1.0)]

    def loss(x: Tensor, backend: str | None = None) -> Tensor:
        given = [*inputs[:which], x, *inputs[which + 1 :]]
        return sigmoid_loss(*given, backend=backend)

    return loss


@pytest.mark.parametrize("which", range(4))
def test_what_has_no_gradient_has_no_second_one(which: int) -> None:
    loss = one_sided(which)
    x = (unit(20, 8) if which < 2 else torch.tensor(2.0)).double()
    along = [torch.randn_like(x)]
    (ours,), (exact,) = (
        with_second(f, [x], along) for f in (loss, functools.partial(loss, backend="reference"))
    )
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-14)


def test_a_third_derivative_is_refused() -> None:
    a, b = unit(5, 3).requires_grad_(), unit(5, 3)
    loss = sigmoid_loss(a, b, torch.tensor(3.0), torch.tensor(-1.0)).sum()
    (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"sums over pairs: derivatives must be of order"):
        torch.autograd.grad(second.sum(), a)


def test_similarities_that_would_overflow_are_refused() -> None:
    a = torch.full((3, 1), 2e6, dtype=torch.float64)
    scale = torch.tensor(1e288, dtype=torch.float64)
    message = r"pair_softplus: scale \|a\| \|b\| must be at most 1e\+300 .*, got 4e\+300"
    with pytest.raises(ValueError, match=message):
        pair_softplus(a, a, scale, torch.tensor(0.0), Pairs())


def test_the_ops_pass_the_checks_of_torch() -> None:
    a, b, numbers = unit(9, 6), unit(7, 6), (torch.tensor(3.0), torch.tensor(-1.0))
    for wide in (False, True):
        inputs = [x.double() if wide else x for x in (a, b, *numbers)]
        ids_and_kept = (ids(9, 4), ids(7, 4), None, None, False)
        softplus, sigmoids, *units = torch.ops.pyfeat.pair_softplus(
            *inputs, "cpu", *ids_and_kept, True, True
        )
        grads = torch.randn_like(softplus)
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.library.opcheck(
            torch.ops.pyfeat.pair_softplus_backward.default,
            (*leaves, "cpu", *ids_and_kept, sigmoids, grads, *units, True, True),
        )
        by = [torch.randn_like(x) for x in inputs]
        torch.library.opcheck(
            torch.ops.pyfeat.pair_softplus_second.default, (*inputs, *ids_and_kept, grads, *by)
        )


def test_no_tensor_of_all_pairs_exists() -> None:
    count, numbers = 3000, (torch.tensor(5.0).double(), torch.tensor(-3.0).double())
    a, b, weights = random(count, 4), random(count, 4), random(count)
    columns = ids(count, count)
    pairs = Pairs(None, columns, columns, columns // 2, columns // 2, keep_positives=True)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        _softplus_blocks.sums(a, b, *numbers, pairs, weights, (True, True))
        by = (a.flip(0), b.flip(0), *numbers)
        _softplus_blocks.second_gradients(a, b, *numbers, pairs, weights, by)
    assert largest.elements == _contrast_blocks.SIDE**2
