"""Softplus over all pairs, other values, whole losses and dispatch, by the Triton kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat import _contrast_cuda, _softplus, reference
from pyfeat._backends import select_backend
from pyfeat._contrast import Pairs, WeightedSide, weighted_features
from pyfeat._gpu import contrast_products, contrast_sums
from pyfeat._softplus import pair_softplus
from pyfeat.losses import clip_loss
from tests.support_gpu_contrast import BACKENDS, run_with
from tests.support_losses import LOSSES
from tests.support_triton import (
    DEVICE,
    UNITS,
    TritonOps,
    contrast,
    masks_of,
    moved,
    triton_product_kernels,
    triton_sums_kernels,
)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    run_with(request.param, monkeypatch)
    return str(request.param)


# Of tests that look inside the launchers of one backend.
only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def _softplus_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_softplus, "_run_cpu", _contrast_cuda.softplus)


def pairs_of(num_rows: int, num_columns: int, *, keep: bool = False) -> Pairs:
    row, column = torch.arange(num_rows).int(), torch.arange(num_columns).int()
    return Pairs(None, row % 5, column % 7, row % 3, column % 4, keep)


# Softplus


def eager_softplus(inputs: Sequence[Tensor], pairs: Pairs) -> Tensor:
    """``reference.pair_softplus`` in the dtype of the features."""
    a, b, scale, bias = inputs
    logits = scale * (a @ b.T) + bias
    positive, left_out = masks_of(pairs, len(a), len(b))
    softplus = torch.logaddexp(torch.where(positive, -logits, logits), torch.zeros_like(bias))
    return softplus.where(~left_out, 0.0).sum(1)


def triton_softplus(inputs: Sequence[Tensor], pairs: Pairs) -> Tensor:
    a, b, scale, bias = (x.to(DEVICE) for x in inputs)
    with TritonOps():
        return pair_softplus(a, b, scale, bias, moved(pairs)).cpu()


def exact_softplus(inputs: Sequence[Tensor], pairs: Pairs) -> Tensor:
    a, b, scale, bias = inputs
    return reference.pair_softplus(a, b, scale, bias, *pairs[1:6])


def found_by(
    sums_of: Callable[..., Tensor], inputs: list[Tensor], pairs: Pairs, weights: Tensor
) -> list[Tensor]:
    """The sums, and the gradients of their weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    sums = sums_of(leaves, pairs)
    return [sums.detach(), *torch.autograd.grad(sums.double() @ weights, leaves)]


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("equal", [False, True], ids=["weighted", "mean"])
def test_softplus_and_its_gradients_are_as_good_as_those_of_torch(
    equal: bool, dtype: torch.dtype
) -> None:
    for num_rows, num_columns, dim in [(1, 1, 1), (5, 70, 17), (130, 67, 80)]:
        a, b = torch.randn(num_rows, dim).to(dtype), torch.randn(num_columns, dim).to(dtype)
        inputs = [a, b, torch.tensor(9.0 / dim**0.5), torch.tensor(-3.0)]
        pairs = pairs_of(num_rows, num_columns, keep=not equal)
        weights = torch.rand(num_rows, dtype=torch.float64)
        check_softplus(inputs, pairs, torch.ones_like(weights) / 3 if equal else weights)


def check_softplus(inputs: list[Tensor], pairs: Pairs, weights: Tensor) -> None:
    ours = found_by(triton_softplus, inputs, pairs, weights)
    exact = found_by(exact_softplus, [x.double() for x in inputs], pairs, weights)
    eager = found_by(eager_softplus, [x.float() for x in inputs], pairs, weights)
    dtype = inputs[0].dtype
    for place, (mine, true, theirs) in enumerate(zip(ours, exact, eager, strict=True)):
        torchs = (theirs.double() - true).abs().max()
        budget = 2 * torchs + 2.0**-22 * (1 + true.abs().max())
        if place >= 1 and dtype != torch.float32:
            a, b, scale, _ = (x.double() for x in inputs)
            terms = weights.abs()[:, None]
            sizes = [terms * scale * b.abs().sum(0), scale * terms.expand(-1, len(b)).T @ a.abs()]
            sizes += [(terms * (a @ b.T).abs()).sum(), torch.zeros(())]
            budget = budget + UNITS[dtype] * (sizes[place - 1] + true.abs())
        error = (mine.double() - true).abs()
        assert (error <= budget).all(), f"{place}: {float(error.max()):.2e}, torch {torchs:.2e}"


def test_small_softplus_keep_their_digits() -> None:
    a, b = torch.randn(70, 5), torch.randn(66, 5)
    bias = torch.tensor(-20.0)
    inputs = [a, b, torch.tensor(0.5), bias]
    found = triton_softplus(inputs, Pairs())
    exact = exact_softplus([x.double() for x in inputs], Pairs())
    torch.testing.assert_close(found, exact, rtol=4e-6, atol=0.0)


def test_every_softplus_is_right_to_a_few_roundings() -> None:
    a, one, zero = torch.linspace(-20.0, 20.0, 300)[:, None], torch.ones(1, 1), torch.zeros(())
    found = triton_softplus([a, one, one[0, 0], zero], Pairs())
    exact = torch.logaddexp(a.double(), zero.double())[:, 0]
    # The exponential takes up to 20 log2(e) in float32.
    allowed = (2.0**-23 + 2.0**-24 * a.double().abs()[:, 0].where(a[:, 0] < 0, 0.0)) * exact
    assert ((found - exact).abs() <= allowed + 2.0**-24 * exact).all()


def test_a_positive_that_is_far_above_keeps_the_digits_of_its_gradient() -> None:
    one = torch.ones(1, 1)
    ids = torch.zeros(1, dtype=torch.int32)
    inputs = [one, one, torch.tensor(25.0), torch.tensor(-10.0)]
    weights = torch.ones(1, dtype=torch.float64)
    found = found_by(triton_softplus, inputs, Pairs(None, ids, ids), weights)
    sigmoid = 1.0 / (1.0 + torch.tensor(15.0).double().exp())
    torch.testing.assert_close(found[0], -torch.log1p(-sigmoid).view(1), rtol=4e-6, atol=0.0)
    torch.testing.assert_close(found[1].double(), -25.0 * sigmoid.view(1, 1), rtol=4e-6, atol=0.0)


def test_softplus_of_large_similarities_of_both_signs_is_finite() -> None:
    a, b = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    inputs = [a, b, torch.tensor(1e4), torch.tensor(-10.0)]
    check_softplus(inputs, Pairs(), torch.ones(2).double())


def test_softplus_in_chunks_and_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(130, 9), torch.randn(260, 9), torch.tensor(1.0), torch.tensor(-1.0)]
    weights = torch.rand(130, dtype=torch.float64)
    pairs = pairs_of(130, 260)
    monkeypatch.setattr(contrast_sums, "_PART_BYTES", 4 * 16 * 128)
    monkeypatch.setattr(contrast_products, "_BLOCK_SIDE", 128)
    monkeypatch.setattr(contrast_products, "_BLOCK_PAIRS", 128 * 128)
    check_softplus(inputs, pairs, weights)
    with torch.no_grad():
        found = triton_softplus(inputs, pairs)
    torch.testing.assert_close(found, exact_softplus(inputs, pairs), rtol=1e-5, atol=1e-4)


# Other values


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("widths", [(3, 20), (16, 1)])
def test_weighted_features_are_those_of_the_matrix(widths: tuple[int, int], columns: bool) -> None:
    a, b, scale = torch.randn(70, 9), torch.randn(130, 9), torch.tensor(0.7)
    bias = torch.randn(130)
    pairs = pairs_of(70, 130, keep=True)._replace(column_bias=bias)
    sides = [WeightedSide(*torch.randn(3, n, dtype=torch.float64)) for n in (70, 130)]
    values = torch.randn(70, widths[0]), torch.randn(130, widths[1])
    s = scale.double() * a.double() @ b.double().T + bias
    positive, left_out = masks_of(pairs, 70, 130)
    g = sides[0].weights[:, None] * (s - sides[0].lse[:, None]).exp()
    pulled = sides[0].positives[:, None].expand(70, 130)
    if columns:
        g = g + sides[1].weights * (s - sides[1].lse).exp()
        pulled = pulled + sides[1].positives
    g = g.where(~left_out, 0.0) + pulled.where(positive, 0.0)
    inputs: list[Any] = [a.to(DEVICE), b.to(DEVICE), scale.to(DEVICE), moved(pairs)]
    inputs += [WeightedSide(*(x.to(DEVICE) for x in side)) for side in sides]
    inputs[-1] = inputs[-1] if columns else None
    inputs += [x.to(DEVICE) for x in values]
    with TritonOps():
        found = weighted_features(*inputs)
        nothing = weighted_features(*inputs, need_a=False, need_b=False)
        one = weighted_features(*inputs, need_a=False)
    for mine, true in zip(found, (g @ values[1].double(), g.T @ values[0].double()), strict=True):
        terms = float(g.abs().max()) * 4
        torch.testing.assert_close(mine.cpu().double(), true, rtol=1e-5, atol=1e-5 * terms)
    assert [x.shape for x in nothing] == [(0, widths[1]), (0, widths[0])]
    assert one[0].shape == (0, widths[1])
    assert torch.equal(one[1], found[1])


def test_weights_without_a_sum_to_refer_to_are_none() -> None:
    # A log-sum-exp of -inf is over nothing, whatever counts here.
    a, b = torch.full((3, 1), 20.0), torch.full((4, 1), 20.0)
    side = WeightedSide(torch.full((3,), -torch.inf).double(), *torch.ones(2, 3).double())
    rows = WeightedSide(*(x.to(DEVICE) for x in side))
    one = torch.ones((), device=DEVICE)
    with TritonOps():
        a, b = a.to(DEVICE), b.to(DEVICE)
        found = weighted_features(a, b, one, Pairs(), rows, None, a, b)
    assert all((x == 0).all() for x in found)


# Whole losses


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_their_gradients_are_those_of_the_reference(case: str) -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(70, 19), dim=1) for _ in range(2))
    results = []
    for dtype, options in ((torch.float32, {}), (torch.float64, {"backend": "reference"})):
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (a, b, torch.tensor(7.0))]
        with TritonOps():
            loss = LOSSES[case](*leaves, **options)
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        results.append([loss.detach(), *gradients])
    for mine, true in zip(*results, strict=True):
        largest = float(true.abs().max())
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_16_bits_are_those_of_their_values(dtype: torch.dtype) -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(70, 48), dim=1).to(dtype) for _ in range(2))
    scale = torch.tensor(20.0)
    with TritonOps():
        loss = clip_loss(a.to(DEVICE), b.to(DEVICE), scale.to(DEVICE))
    exact = clip_loss(a.double(), b.double(), scale.double(), backend="reference")
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-6, atol=0.0)


# Dispatch


@only_triton
@pytest.mark.parametrize(
    "op",
    [
        "pair_sums",
        "pair_sums_backward",
        "weighted_features",
        "pair_softplus",
        "pair_softplus_backward",
    ],
)
def test_every_op_has_kernels_for_a_gpu(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyfeat::{op}", "CUDA")


@only_triton
@pytest.mark.parametrize("op", ["info_nce", "clip_loss", "siglip_loss", "supcon_loss", "swav_loss"])
def test_nothing_but_the_device_stands_in_the_way_of_triton(op: str) -> None:
    message = rf"{op}: backend 'triton' does not .*\(triton: inputs are on cpu\)"
    with pytest.raises(NotImplementedError, match=message):
        select_backend(op, "triton", torch.zeros(2, 2))


@only_triton
def test_float64_features_go_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sums_kernels, "_pair_sums_kernel", None)
    monkeypatch.setattr(triton_product_kernels, "_add_product_kernel", None)
    a, b = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with TritonOps():
        assert torch.autograd.gradcheck(lambda x, y: clip_loss(x, y, 2.0), (a, b))


@only_triton
def test_the_library_takes_the_products_that_it_is_given() -> None:
    out, gradient = torch.zeros(5, 3, device="meta"), torch.zeros(5, 7, device="meta").bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast_products, "_library_adds", lambda gradient: True)
        patch.setattr(triton_product_kernels, "_add_product_kernel", None)
        contrast_products._add_product(contrast, out, gradient, gradient.new_zeros(7, 3))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_library_and_our_kernel_add_the_same(dtype: torch.dtype) -> None:
    gradient, values = (
        torch.randn(shape, device=DEVICE).to(dtype) for shape in ((384, 256), (256, 96))
    )
    sums = [torch.ones(300, 96, device=DEVICE) for _ in range(2)]
    contrast_products._add_product(contrast, sums[0], gradient[:300, :200], values[:200])
    torch.use_deterministic_algorithms(False)
    assert contrast_products._library_adds(gradient)
    contrast_products._add_product(contrast, sums[1], gradient[:300, :200], values[:200])
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
