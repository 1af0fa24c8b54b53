"""The kernels behind the losses, of every instruction set, against the reference in float64."""

import pytest
import torch
from torch import Tensor

from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from pyfeat._contrast_cpu import KeptPairs
from pyfeat._pairs import Pairs
from tests.support_contrast import CASES, SIZES, cut, sums_of


def gradients_of(
    a: Tensor,
    b: Tensor,
    scale: float,
    pairs: Pairs,
    sums: list[Tensor],
    weights: list[Tensor],
    isa: str,
    *,
    columns: bool,
    threads: int = 2,
) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = torch.full_like(a, float("nan")), torch.full_like(b, float("nan"))
    rows, columns_ = (
        (sums[i].data_ptr(), weights[i].data_ptr(), weights[i + 2].data_ptr()) for i in (0, 1)
    )
    _C.contrast_gradient_cpu(
        as_matrix(a),
        as_matrix(b),
        scale,
        KeptPairs(pairs).terms,
        rows,
        columns_ if columns else (0, 0, 0),
        (as_matrix(a), as_matrix(b), grad_a.data_ptr(), grad_b.data_ptr()),
        threads,
        isa,
    )
    return grad_a, grad_b


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", _C.isas())
def test_sums_and_gradients_are_those_of_the_reference(isa: str, case: str, columns: bool) -> None:
    for num_rows, num_columns, dim in SIZES:
        a, b = torch.randn(num_rows, dim), torch.randn(num_columns, dim)
        scale = 3.0 / dim**0.5
        pairs = cut(CASES[case], num_rows, num_columns)
        leaves = [x.double().requires_grad_() for x in (a, b)]
        exact = reference.pair_sums(leaves[0], leaves[1], torch.tensor(scale).double(), *pairs)
        sums = sums_of(a, b, scale, pairs, isa)
        for ours, true in zip(sums, exact, strict=True):
            torch.testing.assert_close(ours, true.detach(), rtol=1e-5, atol=1e-4)
        weights = [torch.randn(len(x), dtype=torch.float64) for x in sums[:4]]
        if not columns:
            weights[1].zero_()
            weights[3].zero_()
        finite = [x.where(x.isfinite(), 0.0) for x in exact[:4]]
        total = torch.stack([x @ w for x, w in zip(finite, weights, strict=True)]).sum()
        true_gradients = torch.autograd.grad(total, leaves)
        found = gradients_of(a, b, scale, pairs, sums, weights, isa, columns=columns)
        for mine, true in zip(found, true_gradients, strict=True):
            largest = float(true.abs().max())
            torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=2e-5 * max(largest, 1))


def test_terms_follow_the_columns_when_they_are_taken_in_chunks() -> None:
    a, b = torch.randn(30, 300), torch.randn(20_000, 300)
    ids = torch.arange(20_000, dtype=torch.int32) % 701
    pairs = Pairs(torch.linspace(-2, 2, 20_000), ids[:30], ids, ids[5:35], ids)
    sums = sums_of(a, b, 0.1, pairs, "")
    exact = reference.pair_sums(a, b, torch.tensor(0.1, dtype=torch.float64), *pairs)
    for ours, true in zip(sums, exact, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("isa", _C.isas())
def test_rows_that_fill_up_a_tile_do_not_overflow(isa: str) -> None:
    # All similarities are -700: a power of 0 relative to that would be infinite.
    a, b = torch.full((13, 2), 1.0), torch.full((35, 2), -1.0)
    sums = sums_of(a, b, 350.0, Pairs(), isa)
    weights = [torch.ones(len(x), dtype=torch.float64) for x in sums]
    for gradient in gradients_of(a, b, 350.0, Pairs(), sums, weights, isa, columns=True):
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_gradients_have_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    a, b = torch.randn(700, 70), torch.randn(1100, 70)
    pairs = cut(CASES["kept"], 600, 600)
    a, b = a[:600], b[:600]
    sums = sums_of(a, b, 0.1, pairs, "")
    weights = [torch.randn(len(x), dtype=torch.float64) for x in sums[:4]]
    expected = gradients_of(a, b, 0.1, pairs, sums, weights, "", columns=True)
    found = gradients_of(a, b, 0.1, pairs, sums, weights, "", columns=True, threads=threads)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_rows_that_would_overflow_are_refused() -> None:
    a, b = torch.full((3, 4), 1e30), torch.full((2, 4), 1e30)
    sums = [torch.zeros(len(x), dtype=torch.float64) for x in (a, b, a, b, a)]
    with pytest.raises(ValueError, match=r"contrast: scale \|a\| \|b\| must be at most 1e\+36"):
        gradients_of(a, b, 1.0, Pairs(), sums, sums, "", columns=True)
    a[1, 2] = float("nan")
    with pytest.raises(
        ValueError, match="contrast: a must be finite, got NaN or infinity in row 1"
    ):
        gradients_of(a, b, 1.0, Pairs(), sums, sums, "", columns=True)
