"""Products and sums of the kernels that only some losses take, of every instruction set."""

import pytest
import torch

from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from pyfeat._contrast import (
    Pairs,
    WeightedSide,
    pair_sums,
    weighted_features,
)
from pyfeat._contrast_cpu import KeptPairs
from tests.support_contrast import SIZES, assert_near, leaves_of, own_pairs

# A batch with itself


@pytest.mark.parametrize("num_rows", [1, 2, 95, 97, 300, 1030])
def test_a_batch_with_itself_is_as_two_equal_batches(num_rows: int) -> None:
    z = torch.randn(num_rows, 21)
    pairs = own_pairs(num_rows, 7)
    exact = reference.pair_sums(z, z, torch.tensor(0.3).double(), *pairs)
    leaves = z.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sums = pair_sums(leaves[0], leaves[0], leaves[1], pairs, columns=False, largest=True)
    for name in ("row_lse", "row_positives", "row_largest"):
        torch.testing.assert_close(
            getattr(sums, name), exact[sums._fields.index(name)], rtol=1e-5, atol=1e-5
        )
    weights = torch.rand(2, num_rows, dtype=torch.float64)
    true = leaves_of(z, leaves[1])
    true_sums = reference.pair_sums(true[0], true[0], true[1], *pairs)
    if num_rows == 1:
        assert torch.equal(sums.row_lse.isinf(), true_sums[0].isinf())
        return
    found = torch.autograd.grad(sums.row_lse @ weights[0] + sums.row_positives @ weights[1], leaves)
    wanted = torch.autograd.grad(true_sums[0] @ weights[0] + true_sums[2] @ weights[1], true)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("isa", _C.isas())
def test_a_batch_with_itself_on_every_instruction_set(isa: str) -> None:
    z, pairs = torch.randn(400, 30), own_pairs(400, 5)
    kept_pairs = KeptPairs(pairs)
    sums = [torch.full((400,), float("nan"), dtype=torch.float64) for _ in range(3)]
    row_lse, row_positives, row_largest = (x.data_ptr() for x in sums)
    arguments = (as_matrix(z), as_matrix(z), 0.3, _C.Dtype.float32, row_lse, 0, 2, isa)
    _C.log_sum_exp_cpu(*arguments, kept_pairs.terms, row_positives, 0, row_largest, itself=True)
    leaf = z.double().requires_grad_()
    exact = reference.pair_sums(leaf, leaf, torch.tensor(0.3).double(), *pairs)
    for ours, index in zip(sums, (0, 2, 4), strict=True):
        torch.testing.assert_close(ours, exact[index].detach(), rtol=1e-5, atol=1e-4)
    weights = torch.randn(2, 400, dtype=torch.float64)
    (true,) = torch.autograd.grad(exact[0] @ weights[0] + exact[2] @ weights[1], leaf)
    grad = torch.full_like(z, float("nan"))
    side = (row_lse, weights[0].data_ptr(), weights[1].data_ptr())
    products = (as_matrix(z), as_matrix(z), grad.data_ptr(), 0)
    _C.contrast_gradient_cpu(
        as_matrix(z),
        as_matrix(z),
        0.3,
        kept_pairs.terms,
        side,
        side,
        products,
        2,
        isa,
        itself=True,
    )
    assert_near(grad, true)


@pytest.mark.slow
def test_more_rows_with_themselves_than_are_packed_at_a_time() -> None:
    z, pairs = torch.randn(20_000, 3), own_pairs(20_000, 701)
    sums = pair_sums(z, z, torch.tensor(0.5), pairs, columns=False, largest=True)
    expected = pair_sums(z, z.clone(), torch.tensor(0.5), pairs, columns=False, largest=True)
    for name in ("row_lse", "row_positives", "row_largest"):
        torch.testing.assert_close(
            getattr(sums, name), getattr(expected, name), rtol=1e-6, atol=1e-5
        )


# Products with other values


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
def test_weighted_features_are_products_with_the_dense_matrix(columns: bool) -> None:
    for num_rows, num_columns, dim in SIZES:
        a, b = torch.randn(num_rows, dim), torch.randn(num_columns, dim)
        a_values, b_values = torch.randn(num_rows, 5), torch.randn(num_columns, 70)
        ids = torch.arange(num_rows).int() % 5, torch.arange(num_columns).int() % 7
        bias = torch.randn(num_columns)
        pairs = Pairs(bias, ids[0], ids[1])
        scale = torch.tensor(2.0 / dim**0.5)
        sums = pair_sums(a, b, scale, pairs)
        sides = [
            WeightedSide(lse, *torch.randn(2, len(lse), dtype=torch.float64))
            for lse in (sums.row_lse, sums.column_lse)
        ]
        s = scale.double() * (a.double() @ b.double().T) + bias
        dense = sides[0].weights[:, None] * (s - sides[0].lse[:, None]).exp()
        positives = sides[0].positives[:, None].expand_as(s)
        if columns:
            dense = dense + sides[1].weights * (s - sides[1].lse).exp()
            positives = positives + sides[1].positives
        dense = dense + positives.where(ids[0][:, None] == ids[1], 0.0)
        found = weighted_features(
            a, b, scale, pairs, sides[0], sides[1] if columns else None, a_values, b_values
        )
        assert_near(found[0], dense @ b_values.double())
        assert_near(found[1], dense.T @ a_values.double())
        for need in (0, 1):
            one = weighted_features(
                a,
                b,
                scale,
                pairs,
                sides[0],
                sides[1] if columns else None,
                a_values,
                b_values,
                need_a=need == 0,
                need_b=need == 1,
            )
            assert torch.equal(one[need], found[need])
            assert len(one[1 - need]) == 0


def test_a_scale_without_a_gradient_changes_no_other() -> None:
    a, b = torch.randn(40, 8), torch.randn(50, 8)
    found = []
    for learnable in (True, False):
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        scale = torch.tensor(0.7, requires_grad=learnable)
        torch.autograd.backward(pair_sums(leaves[0], leaves[1], scale, Pairs()).row_lse.sum())
        assert (scale.grad is not None) == learnable
        found.append([x.grad for x in leaves])
    for mine, other in zip(*found, strict=True):
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)


def test_the_ops_pass_the_checks_of_torch() -> None:
    a, b = torch.randn(9, 6).requires_grad_(), torch.randn(7, 6).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    bias = torch.tensor(-1.0, requires_grad=True)
    ids = torch.arange(9, dtype=torch.int32) % 4, torch.arange(7, dtype=torch.int32) % 4
    arguments = (a, b, scale, bias, "cpu", *ids, None, None, False, True, True)
    torch.library.opcheck(torch.ops.pyfeat.pair_softplus.default, arguments)
    vectors = [torch.rand(n, dtype=torch.float64) for n in (9, 7, 9, 7, 9, 7)]
    pairs = Pairs(None, *ids)
    torch.library.opcheck(
        torch.ops.pyfeat.weighted_features.default,
        (
            a.detach(),
            b.detach(),
            scale.detach(),
            "cpu",
            *pairs,
            True,
            *vectors,
            a.detach(),
            b.detach(),
            True,
            False,
        ),
    )
