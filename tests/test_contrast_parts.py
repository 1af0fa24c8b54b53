"""Products and sums of the kernels that only some losses take, of every instruction set."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import _C, reference
from pyfeat._checks import as_matrix, dtype_name
from pyfeat._contrast import (
    Pairs,
    WeightedSide,
    memory_budget,
    pair_sums,
    set_memory_budget,
    weighted_features,
)
from pyfeat._contrast_cpu import KeptPairs, kept_panels
from pyfeat._softplus import pair_softplus

SIZES = [(1, 1, 1), (5, 33, 7), (97, 31, 40), (130, 481, 33), (300, 129, 257)]


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


def assert_near(ours: Tensor, true: Tensor, terms: float = 0.0) -> None:
    """Up to rounding in float32, relative to the largest element or to terms that cancel."""
    largest = max(float(true.detach().abs().max()) if true.numel() else 0.0, terms)
    torch.testing.assert_close(
        ours.detach().double(), true.detach().double(), rtol=2e-5, atol=2e-5 * largest + 1e-30
    )


# A batch with itself


def own_pairs(num_rows: int, classes: int) -> Pairs:
    ids = torch.arange(num_rows, dtype=torch.int32)
    classes_of = ids % classes
    return Pairs(None, classes_of, classes_of, ids, ids)


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


# Tiles that are kept


@pytest.mark.parametrize("itself", [False, True], ids=["two", "itself"])
@pytest.mark.parametrize("num_bytes", [0, 400_000, 1 << 30], ids=["none", "some", "all"])
def test_gradients_have_the_same_bits_from_tiles_that_were_kept(
    num_bytes: int, itself: bool
) -> None:
    a, b = torch.randn(301, 40), torch.randn(450, 40)
    panels, _ = kept_panels(301, 301 if itself else 450, torch.float32, num_bytes)
    assert (panels == 0) == (num_bytes == 0)
    before, gradients = memory_budget(), []
    try:
        for budget in (0, num_bytes):
            set_memory_budget(budget)
            leaves = [x.clone().requires_grad_() for x in (a, b, torch.tensor(0.2))]
            other = leaves[0] if itself else leaves[1]
            pairs = own_pairs(301, 9) if itself else Pairs(torch.linspace(-1, 1, 450))
            sums = pair_sums(leaves[0], other, leaves[2], pairs, columns=not itself)
            total = sums.row_lse.sum() + sums.column_lse.square().sum()
            gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    finally:
        set_memory_budget(before)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_beyond_the_budget(dtype: torch.dtype) -> None:
    height, width = _C.tile_shape(getattr(_C.Dtype, dtype_name(dtype)))
    panel = 4 * height * width * -(-1000 // width)
    panels = -(-1000 // height)
    assert kept_panels(1000, 1000, dtype, panels * panel) == (panels, panels * panel // 4)
    assert kept_panels(1000, 1000, dtype, panels * panel - 1)[0] == (panels * panel - 1) // 4 // panel
    assert kept_panels(1000, 1000, dtype, 12 * panel - 1)[0] == 2
    assert kept_panels(0, 1000, dtype, 1 << 30) == (0, 0)
    assert kept_panels(1000, 0, dtype, 1 << 30) == (0, 0)
    with pytest.raises(ValueError, match="set_memory_budget: num_bytes must be at least 0, got -1"):
        set_memory_budget(-1)


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


# Softplus

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


def cut(pairs: Pairs, num_rows: int, num_columns: int) -> Pairs:
    counts = (num_rows, num_columns, num_rows, num_columns)
    ids = [None if x is None else x[:n].int() for x, n in zip(pairs[1:5], counts, strict=True)]
    return Pairs(None, ids[0], ids[1], ids[2], ids[3], pairs.keep_positives)


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


def test_the_ops_pass_the_checks_of_torch() -> None:
    a, b = torch.randn(9, 6).requires_grad_(), torch.randn(7, 6).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    bias = torch.tensor(-1.0, requires_grad=True)
    ids = torch.arange(9, dtype=torch.int32) % 4, torch.arange(7, dtype=torch.int32) % 4
    arguments = (a, b, scale, bias, *ids, None, None, False, True, True)
    torch.library.opcheck(torch.ops.pyfeat.pair_softplus.default, arguments)
    vectors = [torch.rand(n, dtype=torch.float64) for n in (9, 7, 9, 7, 9, 7)]
    pairs = Pairs(None, *ids)
    torch.library.opcheck(
        torch.ops.pyfeat.weighted_features.default,
        (
            a.detach(),
            b.detach(),
            scale.detach(),
            *pairs,
            True,
            *vectors,
            a.detach(),
            b.detach(),
            True,
            False,
        ),
    )


# Memory that calls share


def gradients_of(dim: int, count: int = 130) -> tuple[Tensor, ...]:
    """Of features of width 64, and zeros up to ``dim``, with the gradients of a sum."""
    random = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, 64, generator=random) for _ in range(2))
    leaves = [F.pad(x, (0, dim - 64)).requires_grad_() for x in (a, b)]
    scale, bias = torch.tensor(0.1), torch.tensor(-1.0)
    sums = pair_sums(leaves[0], leaves[1], scale, Pairs())
    total = sums.row_lse.sum() + sums.column_lse.sum()
    total = total + pair_softplus(leaves[0], leaves[1], scale, bias, Pairs()).sum()
    return tuple(x[:, :64] for x in torch.autograd.grad(total, leaves))


def test_gradients_are_the_same_whether_or_not_their_rows_fill_panels() -> None:
    # Those of whole panels are summed where they are returned, others in memory of their own.
    for filled, other in zip(gradients_of(64), gradients_of(65), strict=True):
        assert torch.equal(filled, other)


def test_memory_of_earlier_calls_does_not_show() -> None:
    counts = (130, 700, 129, 40, 131)
    first = [gradients_of(65, count) for count in counts]
    for count, expected in zip(reversed(counts), reversed(first), strict=True):
        for mine, before in zip(gradients_of(65, count), expected, strict=True):
            assert torch.equal(mine, before)


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


def test_similarities_kept_by_two_calls_are_apart() -> None:
    a, b, c = (torch.randn(300, 8) for _ in range(3))

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        return leaf, pair_sums(leaf, y, torch.tensor(0.7), Pairs()).row_lse.sum()

    def gradient(leaf: Tensor, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf)[0]

    alone = gradient(*loss(a, b))
    first, second = loss(a, b), loss(b, c)
    gradient(*second)
    assert torch.equal(gradient(*first), alone)


def test_memory_of_kept_similarities_is_used_again_until_it_is_forgotten() -> None:
    def floats(count: int) -> Tensor:
        return torch.frombuffer(_C.ReusedFloats(count), dtype=torch.float32)

    _C.ReusedFloats.forget()
    kept = floats(1 << 22)
    address = kept.data_ptr()
    beside = floats(1 << 22)
    assert beside.data_ptr() != address
    del kept
    again = floats(3 << 20)
    assert again.data_ptr() == address
    again.fill_(1.0)
    assert again.sum() == 3 << 20
