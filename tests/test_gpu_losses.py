"""Losses over all pairs on the backends of a GPU, against the float64 reference on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.losses import clip_loss, siglip_loss
from tests.support_gpu import Target, each_gpu_target, each_target, peak_beyond_inputs
from tests.support_losses import LOSSES, unit

CASES: dict[str, Callable[..., Tensor]] = {
    **LOSSES,
    "siglip": lambda a, b, s, **o: siglip_loss(a, b, s, -s, **o),
}
# What one rounding to the dtype is relative to a number.
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def found_by(
    loss: Callable[..., Tensor],
    inputs: list[Tensor],
    move: Callable[[Tensor], Tensor],
    **options: Any,
) -> list[Tensor]:
    """The loss and its gradients by both sets of features and the scale, back on the CPU."""
    leaves = [move(x.detach()).requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return [x.cpu() for x in (value.detach(), *gradients)]


def assert_right(target: Target, loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Fail unless loss and gradients are those of the reference in float64, of the same features."""
    mine = found_by(loss, inputs, target, backend=target.backend)
    wide = [x.double() for x in inputs]
    exact = found_by(loss, wide, lambda x: x, backend="reference")
    rounding = UNITS[inputs[0].dtype]
    # Gradients of 16 bits are sums of terms that are rounded to them, and are rounded again. Where a
    # processor multiplies bfloat16, that of the scale is a sum of such terms too: it is not rounded
    # itself, and the roundings of its terms cancel out for the most part.
    coarse = target.backend == "cpu" and inputs[0].dtype == torch.bfloat16
    limits = 0.0, 4 * rounding, 4 * rounding, rounding / 8 if coarse else 0.0
    for found, true, given, rough in zip(mine, exact, (mine[0], *inputs), limits, strict=True):
        assert found.dtype == given.dtype
        assert found.shape == true.shape
        allowed = max(1e-5, rough) * float(true.abs().max())
        torch.testing.assert_close(found.double(), true, rtol=max(1e-5, rough), atol=allowed)


@each_target
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("rows", "dim"), [(70, 19), (131, 64)])
def test_losses_and_gradients_are_those_of_the_reference(
    target: Target, case: str, rows: int, dim: int
) -> None:
    inputs = [unit(rows, dim), unit(rows, dim), torch.tensor(7.0)]
    assert_right(target, CASES[case], inputs)


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["clip", "supcon", "siglip"])
def test_features_of_16_bits_are_summed_in_32(
    target: Target, case: str, dtype: torch.dtype
) -> None:
    inputs = [unit(150, 72).to(dtype), unit(150, 72).to(dtype), torch.tensor(12.0)]
    assert_right(target, CASES[case], inputs)


@each_target
@pytest.mark.parametrize("case", ["clip", "nt_xent", "siglip"])
def test_strided_features_give_the_same_loss(target: Target, case: str) -> None:
    a, b = torch.randn(24, 90).T, torch.randn(90, 60)[:, 3:51:2]
    inputs = [0.3 * a, 0.3 * b, torch.tensor(2.0)]
    plain = [x.contiguous() for x in inputs]
    views, copies = (
        found_by(CASES[case], each, target, backend=target.backend) for each in (inputs, plain)
    )
    for x, y in zip(views, copies, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))


@each_target
@pytest.mark.parametrize("case", CASES)
def test_two_runs_give_equal_bits(target: Target, case: str) -> None:
    inputs = [unit(140, 33), unit(140, 33), torch.tensor(9.0)]
    first, second = (
        found_by(CASES[case], inputs, target, backend=target.backend) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@each_target
def test_similarities_that_would_overflow_are_refused(target: Target) -> None:
    huge = target(torch.full((3, 2), 1e19))
    with pytest.raises(ValueError, match=r"must be at most 1e\+36"):
        clip_loss(huge, huge, 1.0, backend=target.backend)


@pytest.mark.slow
@each_gpu_target
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_large_batches_are_right_within_the_workspace(
    target: Target, case: str, dtype: torch.dtype
) -> None:
    loss, device = CASES[case], target.device
    inputs = [unit(9_000, 112).to(device, dtype) for _ in range(2)]
    inputs.append(torch.tensor(20.0, device=device))

    def both_ways(leaves: list[Tensor], **options: Any) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        value = loss(*leaves, **options)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    both_ways(inputs, backend=target.backend)  # loads the library that multiplies
    taken = peak_beyond_inputs(lambda: both_ways(inputs, backend=target.backend), device)
    # In float32: the gradients, and vectors for each row and column.
    kept = sum(x.numel() * (4 + x.element_size()) + 200 * len(x) for x in inputs[:2])
    assert taken <= kept + (64 << 20)
    exact = both_ways([x.double() for x in inputs], backend="reference")
    mine = both_ways(inputs, backend=target.backend)
    for found, true in zip(mine, exact, strict=True):
        rough = max(1e-5, 4 * UNITS[dtype]) if true.ndim else 1e-5
        allowed = rough * float(true.abs().max())
        torch.testing.assert_close(found.double(), true, rtol=rough, atol=allowed)
