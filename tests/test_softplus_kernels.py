"""Sums of softplus by the kernels of every instruction set against the reference in float64."""

import pytest
import torch

from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from pyfeat._contrast_cpu import KeptPairs
from pyfeat._pairs import Pairs
from pyfeat._softplus import pair_softplus
from tests.support_contrast import SIZES, assert_near, cut, leaves_of

SIGMOID_CASES = {
    "plain": Pairs(),
    "positives": Pairs(None, torch.arange(600) % 13, torch.arange(600) % 17),
    "left out": Pairs(
        None,
        torch.arange(600) % 5,
        torch.arange(600) % 7,
        torch.arange(600) % 3,
        torch.arange(600) % 4,
    ),
    "kept": Pairs(
        None,
        torch.arange(600) % 5,
        torch.arange(600) % 7,
        torch.arange(600) % 3,
        torch.arange(600) % 4,
        keep_positives=True,
    ),
}


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.3, 60.0])
@pytest.mark.parametrize("case", SIGMOID_CASES)
def test_softplus_and_its_gradients_are_those_of_the_reference(case: str, bias: float) -> None:
    for num_rows, num_columns, dim in SIZES:
        a, b = torch.randn(num_rows, dim), torch.randn(num_columns, dim)
        pairs = cut(SIGMOID_CASES[case], num_rows, num_columns)
        numbers = torch.tensor(3.0 / dim**0.5), torch.tensor(bias)
        ours = [x.clone().requires_grad_() for x in (a, b, *numbers)]
        true = leaves_of(a, b, *numbers)
        found = pair_softplus(ours[0], ours[1], ours[2], ours[3], pairs)
        exact = reference.pair_softplus(true[0], true[1], true[2], true[3], *pairs[1:6])
        assert_near(found, exact)
        # All rows alike, as in a mean, and each with weights of its own.
        for weights in (
            torch.full((num_rows,), 0.7, dtype=torch.float64),
            torch.rand(num_rows, dtype=torch.float64),
        ):
            gradients, wanted = (
                torch.autograd.grad(
                    sums @ weights, leaves, retain_graph=True, materialize_grads=True
                )
                for sums, leaves in ((found, ours), (exact, true))
            )
            by_scale = float((wanted[0] * true[0].detach()).abs().sum()) / float(numbers[0])
            terms = (0.0, 0.0, by_scale, float(weights.sum()) * num_columns)
            for mine, theirs, size in zip(gradients, wanted, terms, strict=True):
                assert_near(mine, theirs, size)


@pytest.mark.parametrize("isa", _C.isas())
def test_softplus_on_every_instruction_set(isa: str) -> None:
    a, b = torch.randn(130, 33), torch.randn(481, 33)
    pairs = cut(SIGMOID_CASES["kept"], 130, 481)
    kept_pairs = KeptPairs(pairs)
    true = leaves_of(a, b)
    scale = torch.tensor(0.5, dtype=torch.float64)
    bias = torch.tensor(-2.7, dtype=torch.float64, requires_grad=True)
    exact = reference.pair_softplus(true[0], true[1], scale, bias, *pairs[1:6])
    weights = torch.randn(130, dtype=torch.float64)
    wanted = torch.autograd.grad(exact @ weights, true, retain_graph=True)
    sums = [torch.full((130,), float("nan"), dtype=torch.float64) for _ in range(2)]
    grads = [torch.full_like(x, float("nan")) for x in (a, b)]
    _C.softplus_cpu(
        as_matrix(a),
        as_matrix(b),
        0.5,
        -2.7,
        kept_pairs.terms,
        weights.data_ptr(),
        (sums[0].data_ptr(), sums[1].data_ptr()),
        (as_matrix(a), as_matrix(b), grads[0].data_ptr(), grads[1].data_ptr()),
        2,
        isa,
    )
    assert_near(sums[0], exact)
    (by_bias,) = torch.autograd.grad(exact.sum(), bias)
    assert_near(sums[1].sum(), by_bias)
    for mine, theirs in zip(grads, wanted, strict=True):
        assert_near(mine, theirs)


def test_small_terms_of_softplus_keep_their_digits() -> None:
    # exp(-30) per pair: nothing of it would be left beside 1.
    a, b = torch.zeros(3, 4), torch.zeros(50, 4)
    alike = torch.zeros(3, dtype=torch.int32), torch.zeros(50, dtype=torch.int32)
    expected = 50 * torch.log1p(torch.tensor(-30.0, dtype=torch.float64).exp())
    for bias, pairs in ((-30.0, Pairs()), (30.0, Pairs(None, *alike))):
        sums = pair_softplus(a, b, torch.tensor(1.0), torch.tensor(bias), pairs)
        torch.testing.assert_close(sums, expected.expand(3), rtol=2e-7, atol=0)
