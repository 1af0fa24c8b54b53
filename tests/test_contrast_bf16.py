"""Losses over bfloat16 features, which some instruction sets multiply in pairs, with float32 sums."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from pyfeat._contrast import (
    WeightedSide,
    memory_budget,
    pair_sums,
    set_memory_budget,
    weighted_features,
)
from pyfeat._contrast_cpu import KeptPairs
from pyfeat._pairs import Pairs
from pyfeat.losses import clip_loss, info_nce, nt_xent, siglip_loss, supcon_loss
from tests.support_contrast import CASES, cut, sums_of
from tests.support_losses import (
    by_scale,
    eager_clip,
    eager_info_nce,
    eager_nt_xent,
    eager_supcon,
    unit,
    with_gradients,
)

PAIRED = [isa for isa in _C.isas() if isa in ("avx512_bf16", "amx")]
WIDENED = [isa for isa in _C.isas() if isa not in PAIRED]
# One row, odd numbers of rows, columns and features, and more than one block of dS.
SIZES = [(1, 1, 1), (1, 2, 3), (5, 33, 7), (97, 31, 40), (130, 481, 33), (301, 129, 257)]


def features(rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim).bfloat16()


# Losses


def sigmoid_terms(image: Tensor, text: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum(dim=1)


def siglip(image: Tensor, text: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return siglip_loss(image, text, scale, bias, reduction="none")


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "clip": (partial(clip_loss, reduction="none"), eager_clip),
    "info_nce": (by_scale(info_nce, reduction="none"), eager_info_nce),
    "siglip": (siglip, sigmoid_terms),
    "supcon": (by_scale(supcon_loss, reduction="none"), eager_supcon),
    "nt_xent": (by_scale(nt_xent, reduction="none"), eager_nt_xent),
}


def inputs_of(case: str, rows: int, dim: int, scale: float) -> list[Tensor]:
    one, two = unit(rows, dim), unit(rows, dim)
    other = F.normalize(one + (0.1 + 0.1 * scale) * two, dim=1)
    second = {"siglip": [other.bfloat16(), torch.tensor(-5.0)], "supcon": [torch.arange(rows) % 5]}
    return [one.bfloat16(), *second.get(case, [other.bfloat16()]), torch.tensor(scale)]


def assert_as_good_as_torch(
    ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], scale: float
) -> None:
    """Fail unless every error is at most twice the largest that torch makes in bfloat16.

    Granted where torch, by chance, makes none: one rounding of the largest element, to bfloat16 for the
    gradients, to float32 for the losses, and there one of the largest similarity.
    """
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.shape == true.shape
        unit, size = (2.0**-23, scale) if true.ndim == 1 else (2.0**-8, 0.0)
        floor = unit * (float(true.abs().max()) + size)
        error, budget = (mine - true).abs(), 2 * (other - true).abs().max() + floor
        assert (error <= budget).all(), f"off by {error.max():.2e}, more than {budget:.2e}"


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), [(33, 65), (97, 31), (258, 130)])
@pytest.mark.parametrize("case", LOSSES)
def test_losses_are_as_good_as_torch_in_bfloat16(
    case: str, rows: int, dim: int, scale: float
) -> None:
    ours, eager = LOSSES[case]
    inputs = inputs_of(case, rows, dim, scale)

    def in_autocast(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return eager(*leaves)

    def in_bfloat16(*leaves: Tensor) -> Tensor:
        *rest, last = leaves
        rest = [x.bfloat16() if x.is_floating_point() else x for x in rest]
        return eager(*rest, last.bfloat16())

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    found, exact = with_gradients(ours, *inputs), with_gradients(eager, *wide)
    for theirs in (in_autocast, in_bfloat16):
        assert_as_good_as_torch(found, with_gradients(theirs, *inputs), exact, scale)


# Sums and products


def gradients_of(
    a: Tensor,
    b: Tensor,
    scale: float,
    pairs: Pairs,
    sums: list[Tensor],
    weights: list[Tensor],
    isa: str,
    *,
    columns: bool = True,
    threads: int = 2,
) -> list[Tensor]:
    grads = [torch.full(x.shape, torch.nan) for x in (a, b)]
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
        (as_matrix(a), as_matrix(b), grads[0].data_ptr(), grads[1].data_ptr()),
        threads,
        isa,
    )
    return grads


def assert_rounded(
    found: Tensor, gradient: Tensor, values: Tensor, scale: float, largest: float
) -> None:
    """Fail unless ``found`` is ``scale * gradient @ values`` with the gradient rounded to bfloat16.

    2^-8 of every term for that, and a sixteenth of it for the similarities; 2^-22 of the largest weight
    for the float32 sums that make a term.
    """
    exact = scale * (gradient @ values.double())
    terms = (2.0**-8 + 2.0**-12) * gradient.abs() + 2.0**-22 * largest
    bound = scale * (terms @ values.double().abs())
    error = (found.double() - exact).abs()
    assert (error <= bound).all(), f"off by {(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("isa", PAIRED or [""])
def test_sums_are_exact_and_gradients_rounded_once(isa: str, case: str, columns: bool) -> None:
    for num_rows, num_columns, dim in SIZES:
        a, b = features(num_rows, dim), features(num_columns, dim)
        scale = 3.0 / dim**0.5
        pairs = cut(CASES[case], num_rows, num_columns)
        products = scale * a.double() @ b.double().T
        leaf = products.requires_grad_()
        exact = reference.pair_sums(
            leaf, torch.eye(num_columns).double(), torch.tensor(1.0).double(), *pairs
        )
        sums = sums_of(a, b, scale, pairs, isa)
        for ours, true in zip(sums, exact, strict=True):
            torch.testing.assert_close(ours, true.detach(), rtol=1e-5, atol=1e-4)
        weights = [torch.randn(len(x), dtype=torch.float64) for x in sums[:4]]
        if not columns:
            weights[1].zero_()
            weights[3].zero_()
        finite = [x.where(x.isfinite(), 0.0) for x in exact[:4]]
        total = torch.stack([x @ w for x, w in zip(finite, weights, strict=True)]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        found = gradients_of(a, b, scale, pairs, sums, weights, isa, columns=columns)
        largest = float(torch.cat(weights).abs().max())
        assert_rounded(found[0], gradient, b, scale, largest)
        assert_rounded(found[1], gradient.T, a, scale, largest)


def softplus_of(
    a: Tensor, b: Tensor, pairs: Pairs, weights: Tensor, isa: str = "", threads: int = 2
) -> list[Tensor]:
    """Sums of softplus(y (2 A B^T / D^(1/2) - 1)), of y sigmoids, and both gradients."""
    sums = [torch.full((len(a),), torch.nan, dtype=torch.float64) for _ in range(2)]
    grads = [torch.full(x.shape, torch.nan) for x in (a, b)]
    _C.softplus_cpu(
        as_matrix(a),
        as_matrix(b),
        2.0 / a.shape[1] ** 0.5,
        -1.0,
        KeptPairs(pairs).terms,
        weights.data_ptr(),
        (sums[0].data_ptr(), sums[1].data_ptr()),
        (as_matrix(a), as_matrix(b), grads[0].data_ptr(), grads[1].data_ptr()),
        threads,
        isa,
    )
    return [*sums, *grads]


@pytest.mark.parametrize("case", ["positives", "left out", "kept"])
@pytest.mark.parametrize("isa", PAIRED or [""])
def test_softplus_is_exact_and_its_gradients_rounded_once(isa: str, case: str) -> None:
    for num_rows, num_columns, dim in SIZES:
        a, b = features(num_rows, dim), features(num_columns, dim)
        pairs = cut(CASES[case], num_rows, num_columns)._replace(column_bias=None)
        weights = torch.randn(num_rows, dtype=torch.float64)
        found = softplus_of(a, b, pairs, weights, isa)
        scale = 2.0 / dim**0.5
        leaf = (scale * a.double() @ b.double().T).requires_grad_()
        bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        exact = reference.pair_softplus(
            leaf,
            torch.eye(num_columns).double(),
            torch.tensor(1.0).double(),
            bias,
            *pairs[1:6],
        )
        torch.testing.assert_close(found[0], exact.detach(), rtol=1e-5, atol=1e-4)
        (by_bias,) = torch.autograd.grad(exact.sum(), bias, retain_graph=True)
        torch.testing.assert_close(found[1].sum(), by_bias, rtol=1e-5, atol=1e-4)
        (gradient,) = torch.autograd.grad(exact @ weights, leaf)
        largest = float(weights.abs().max())
        assert_rounded(found[2], gradient, b, scale, largest)
        assert_rounded(found[3], gradient.T, a, scale, largest)


@pytest.mark.parametrize("rows", [1, 33, 301])
def test_products_with_other_values_are_rounded_once(rows: int) -> None:
    a, b, a_values, b_values = (features(rows, dim) for dim in (31, 31, 5, 66))
    one = torch.ones(rows, dtype=torch.float64)
    products = 0.3 * a.double() @ b.double().T
    by_rows = WeightedSide(products.logsumexp(dim=1), one, 0 * one)
    by_columns = WeightedSide(products.logsumexp(dim=0), -one, 0 * one)
    scale = torch.tensor(0.3, dtype=torch.float64)
    found = weighted_features(a, b, scale, Pairs(), by_rows, by_columns, a_values, b_values)
    gradient = products.softmax(dim=1) - products.softmax(dim=0)
    for mine, weights, values in (
        (found[0], gradient, b_values),
        (found[1], gradient.T, a_values),
    ):
        assert mine.dtype == torch.bfloat16
        exact = weights @ values.double()
        # Its own rounding, too.
        bound = 2.0**-8 * exact.abs() + 2.0**-7 * (weights.abs() @ values.double().abs()) + 1e-5
        assert ((mine.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 2, 95, 97, 301])
def test_a_batch_with_itself_is_as_two_equal_batches(rows: int) -> None:
    z, ids = features(rows, 21), torch.arange(rows, dtype=torch.int32)
    pairs = Pairs(None, ids % 7, ids % 7, ids, ids)
    found = []
    for other in (z, z.clone()):
        left, right = z.clone().requires_grad_(), other.clone().requires_grad_()
        scale = torch.tensor(0.3, requires_grad=True)
        right = left if other is z else right
        sums = pair_sums(left, right, scale, pairs, columns=False, largest=True)
        total = (sums.row_lse.where(sums.row_lse.isfinite(), 0.0) + sums.row_positives).sum()
        leaves = [left, scale] if other is z else [left, right, scale]
        gradients = [x.double() for x in torch.autograd.grad(total, leaves)]
        by_rows = gradients[0] if other is z else gradients[0] + gradients[1]
        found.append([*sums[::2], by_rows, gradients[-1]])
    # Gradients are rounded to bfloat16 in one half or in two.
    tolerances = [(1e-6, 1e-5)] * 3 + [(0.0, 0.03 * float(found[1][3].abs().max())), (1e-2, 1e-3)]
    for ours, theirs, (rtol, atol) in zip(*found, tolerances, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# What does not change an answer


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_are_the_same_for_any_number_of_threads(threads: int) -> None:
    a, b = features(400, 70), features(601, 70)
    pairs = cut(CASES["kept"], 400, 600)._replace(column_ids=None, row_ids=None)
    pairs = pairs._replace(
        column_bias=torch.linspace(-1, 1, 601), row_groups=None, column_groups=None
    )
    sums = sums_of(a, b, 0.1, pairs, "")
    weights = [torch.randn(len(x), dtype=torch.float64) for x in sums[:4]]
    expected = gradients_of(a, b, 0.1, pairs, sums, weights, "")
    expected += softplus_of(a, b, Pairs(), weights[0])
    found = gradients_of(a, b, 0.1, pairs, sums, weights, "", threads=threads)
    found += softplus_of(a, b, Pairs(), weights[0], threads=threads)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.parametrize("itself", [False, True], ids=["two", "itself"])
def test_bits_are_the_same_from_tiles_that_were_kept(itself: bool) -> None:
    a, b, ids = features(301, 40), features(450, 40), torch.arange(301, dtype=torch.int32)
    pairs = Pairs(None, ids % 9, ids % 9, ids, ids) if itself else Pairs()
    before, found = memory_budget(), []
    try:
        for budget in (0, 400_000, 1 << 30):
            set_memory_budget(budget)
            leaves = [x.clone().requires_grad_() for x in (a, b, torch.tensor(0.2))]
            other = leaves[0] if itself else leaves[1]
            sums = pair_sums(leaves[0], other, leaves[2], pairs, columns=not itself)
            total = sums.row_lse.sum() + sums.column_lse.square().sum()
            found.append(torch.autograd.grad(total, leaves, allow_unused=True))
    finally:
        set_memory_budget(before)
    for expected, *others in zip(*found, strict=True):
        assert all(x is expected or torch.equal(x, expected) for x in others)


@pytest.mark.parametrize("sizes", [(2.0**-100, 2.0**100), (2.0**90, 2.0**20), (2.0**-110, 1.0)])
def test_bits_follow_powers_of_two(sizes: tuple[float, float]) -> None:
    a, b = features(40, 33), features(50, 33)
    expected = sums_of(a, b, 0.25, Pairs(), "")
    found = sums_of(a * sizes[0], b * sizes[1], 0.25 / (sizes[0] * sizes[1]), Pairs(), "")
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def outcome(a: Tensor, b: Tensor, isa: str) -> list[Tensor]:
    sums = sums_of(a, b, 0.5, Pairs(), isa)
    weights = [torch.linspace(-1, 2, len(x), dtype=torch.float64) for x in sums[:4]]
    gradients = gradients_of(a, b, 0.5, Pairs(), sums, weights, isa)
    return [*gradients, *softplus_of(a, b, Pairs(), weights[0], isa)[2:]]


@pytest.mark.parametrize("isa", PAIRED)
def test_pairs_are_multiplied_where_there_is_an_instruction_for_it(isa: str) -> None:
    a, b = features(60, 40), features(70, 40)
    paired, widened = outcome(a, b, isa), outcome(a.float(), b.float(), isa)
    for ours, theirs in zip(paired, widened, strict=True):
        assert (ours != theirs).float().mean() > 0.9
    # float32 takes part in nothing of this.
    for ours, theirs in zip(widened, outcome(a.float(), b.float(), "avx512"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("isa", WIDENED)
def test_features_are_widened_elsewhere(isa: str) -> None:
    a, b = features(60, 40), features(70, 40)
    for ours, theirs in zip(outcome(a, b, isa), outcome(a.float(), b.float(), isa), strict=True):
        assert torch.equal(ours, theirs)


def test_other_dtypes_beside_bfloat16_are_not_rounded_to_it() -> None:
    a, b = features(37, 20), torch.randn(41, 20)
    for ours, theirs in zip(outcome(a, b, ""), outcome(a.float(), b, ""), strict=True):
        assert torch.equal(ours, theirs)


# Edges


@pytest.mark.parametrize("isa", _C.isas())
def test_rows_that_fill_up_a_pair_do_not_overflow(isa: str) -> None:
    # All similarities are -700: a power of 0 relative to that would be infinite.
    a, b = torch.full((13, 2), 1.0).bfloat16(), torch.full((35, 2), -1.0).bfloat16()
    sums = sums_of(a, b, 350.0, Pairs(), isa)
    weights = [torch.ones(len(x), dtype=torch.float64) for x in sums]
    for gradient in gradients_of(a, b, 350.0, Pairs(), sums, weights, isa):
        assert gradient.isfinite().all()
        assert (gradient != 0).all()


def test_extreme_features_are_refused_or_finite() -> None:
    a, b = features(3, 4), features(2, 4)
    a[1, 2] = torch.inf
    arguments: Any = (Pairs(), [torch.zeros(3).double()] * 4, [torch.zeros(3).double()] * 4, "")
    with pytest.raises(ValueError, match="a must be finite, got NaN or infinity in row 1"):
        gradients_of(a, b, 1.0, *arguments)
    a[1, 2] = 1e37
    with pytest.raises(ValueError, match=r"scale \|a\| \|b\| must be at most 1e\+36"):
        gradients_of(a, b, 1.0, *arguments)
    zeros = torch.zeros(5, 3).bfloat16()
    for x, y in ((zeros, features(7, 3)), (zeros, zeros), (1e-38 * features(5, 3), features(7, 3))):
        sums = sums_of(x, y, 1.0, Pairs(), "")
        torch.testing.assert_close(sums[0], torch.full((5,), float(len(y))).double().log())
