"""``pyfeat.deform_attn`` on the backends of a GPU, against the float64 reference on the CPU."""

import math

import pytest
import torch
from torch import Tensor

import pyfeat
from tests.support_attention import (
    EMPTY,
    MODES,
    SHAPES,
    Inputs,
    Mode,
    assert_close_enough,
    attend_exactly,
    gradients_of,
    make_inputs,
    with_gradients,
)
from tests.support_gpu import Target, each_target


def found_on(target: Target, inputs: Inputs, mode: Mode, grad_output: Tensor) -> list[Tensor]:
    """The result and its gradients by value, locations and weights, back on the CPU."""
    leaves = [target(x.detach()).requires_grad_() for x in inputs.tensors()]
    out = pyfeat.deform_attn(
        leaves[0],
        inputs.spatial_shapes,
        *leaves[1:],
        num_points=inputs.num_points,
        backend=target.backend,
        **mode._asdict(),
    )
    assert out.device == target.device
    found = gradients_of(out, leaves, target(grad_output.to(out.dtype)))
    return [x.cpu() for x in (out.detach(), *found)]


def assert_right(target: Target, inputs: Inputs, mode: Mode, dtype: torch.dtype) -> None:
    """Fail unless errors are at most twice those of torch; ``inputs`` are float64.

    Values and weights are rounded to ``dtype``; locations, and sums until the end, are float32 or float64.
    """
    working = torch.promote_types(dtype, torch.float32)
    rounded = inputs.to(dtype, working)
    batch, queries, heads = inputs.sampling_locations.shape[:3]
    grad_output = torch.randn(batch, queries, heads * inputs.value.shape[3]).to(dtype)
    mine = found_on(target, rounded, mode, grad_output)
    plain = with_gradients(attend_exactly, rounded.to(working), mode, grad_output)
    exact = with_gradients(attend_exactly, rounded.to(torch.float64), mode, grad_output.double())
    names = ("result", "value", "locations", "weights")
    for name, found, theirs, true in zip(names, mine, plain, exact, strict=True):
        assert found.dtype == (working if name == "locations" else dtype)
        assert found.shape == true.shape
        # What float32 makes of it is rounded to 16 bits once.
        assert_close_enough(name, found, theirs.to(found.dtype), true)


@each_target
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_sums_and_gradients_are_as_good_as_those_of_torch(
    target: Target, ndim: int, mode: Mode
) -> None:
    inputs = make_inputs(
        SHAPES[ndim],
        queries=37,
        heads=3,
        dim=5,
        num_points=[2, 1, 3][: len(SHAPES[ndim])],
        align_corners=mode.align_corners,
        sampling=mode.sampling,
    )
    assert_right(target, inputs, mode, torch.float32)


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ndim", [2, 3])
def test_every_dtype_is_rounded_once(target: Target, ndim: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[ndim], queries=19, heads=2, dim=8)
    assert_right(target, inputs, Mode(softmax=True), dtype)


@each_target
@pytest.mark.parametrize("dim", [1, 3, 32, 100])
def test_any_number_of_channels(target: Target, dim: int) -> None:
    inputs = make_inputs([(3, 4), (9, 5)], queries=21, dim=dim)
    assert_right(target, inputs, Mode(), torch.float32)


@each_target
def test_queries_that_are_cells_of_many_levels(target: Target) -> None:
    shapes = [(1 + level % 4, 3) for level in range(9)]
    cells = sum(math.prod(shape) for shape in shapes)
    inputs = make_inputs(shapes, queries=cells, num_points=[1, 0, 2, 1, 1, 0, 1, 1, 2])
    assert_right(target, inputs, Mode(softmax=True), torch.float32)


@each_target
@pytest.mark.parametrize("case", EMPTY)
def test_nothing_is_the_sum_of_nothing(target: Target, case: str) -> None:
    inputs = EMPTY[case]().to(torch.float32)
    batch, queries, heads = inputs.sampling_locations.shape[:3]
    grad_output = torch.ones(batch, queries, heads * inputs.value.shape[3])
    for x, like in zip(
        found_on(target, inputs, Mode(), grad_output), (grad_output, *inputs.tensors()), strict=True
    ):
        assert x.shape == like.shape
        assert not x.any()


@each_target
def test_strided_inputs_give_the_same_result(target: Target) -> None:
    inputs = make_inputs(SHAPES[2], queries=9, heads=4).to(torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs.tensors()]
    grad_output = torch.randn(2, 1, 16).expand(2, 9, 16)
    views = found_on(target, inputs.of(*strided), Mode(), grad_output)
    plain = found_on(target, inputs, Mode(), grad_output.contiguous())
    for a, b in zip(views, plain, strict=True):
        assert_close_enough("strided", a, b, b.double())


@each_target
def test_points_out_of_range_count_for_nothing(target: Target) -> None:
    inputs = make_inputs([(4, 4)], batch=1, queries=3, heads=1, num_points=4).to(torch.float32)
    inputs.sampling_locations[..., 1:, :] = torch.tensor([[math.nan], [math.inf], [-9.0]])
    inputs.attention_weights[..., 3] = torch.nan
    found = found_on(target, inputs, Mode(), torch.randn(1, 3, 4))
    assert all(x.isfinite().all() for x in found)
    assert not found[2][..., 1:, :].any()


@each_target
def test_gradients_have_the_same_bits_if_torch_is_told_so(target: Target) -> None:
    # Many points of few cells, of very different size: sums in another order differ.
    inputs = make_inputs([(2, 2)], batch=2, queries=301, heads=1, num_points=3).to(torch.float32)
    grad_output = torch.randn(2, 301, 4) * torch.logspace(-6, 6, 301)[None, :, None]
    torch.use_deterministic_algorithms(True, warn_only=True)
    first, *others = (found_on(target, inputs, Mode(), grad_output) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@each_target
def test_the_op_can_be_derived_twice(target: Target) -> None:
    inputs = make_inputs(SHAPES[2], batch=1, queries=3, num_points=2)
    leaves = [target(x).requires_grad_() for x in inputs.tensors()]

    def attend(*tensors: Tensor) -> Tensor:
        return pyfeat.deform_attn(
            tensors[0],
            inputs.spatial_shapes,
            *tensors[1:],
            num_points=inputs.num_points,
            backend=target.backend,
        )

    assert torch.autograd.gradgradcheck(attend, leaves)
