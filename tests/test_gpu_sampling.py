"""Deformable attention by the kernels of both GPU backends against the float64 reference."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import reference
from tests.support_attention import EMPTY, SHAPES, Inputs, make_inputs
from tests.support_sampling import MODES, Kernels, SamplingOps, assert_right, kernels_of

if importlib.util.find_spec("triton") is not None:
    importlib.import_module("tests.support_triton")  # says how triton is to run


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Those of a backend, with several programs a head for few queries and points."""
    made = kernels_of(request.param)
    if made.backend == "triton":
        from tests.support_triton import sampling, sampling_arguments, sampling_gradient

        monkeypatch.setattr(sampling_arguments, "_SMALL_ELEMENTS", 64)
        monkeypatch.setattr(sampling, "BLOCK_T", 2)
        monkeypatch.setattr(sampling_gradient, "BLOCK_T", 2)
    return made


@pytest.fixture(params=["atomic", "sorted"])
def order(request: pytest.FixtureRequest) -> str:
    """How values get their gradient."""
    torch.use_deterministic_algorithms(request.param == "sorted", warn_only=True)
    return str(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(map(str, modes.values())))
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_sums_and_gradients_are_as_good_as_those_of_torch(
    kernels: Kernels, ndim: int, modes: dict[str, Any]
) -> None:
    corners = modes.get("align_corners", False)
    inputs = make_inputs(
        SHAPES[ndim],
        batch=1 if ndim == 3 else 2,
        queries=19,
        dim=5,
        num_points=[2, 1, 2][: len(SHAPES[ndim])],
        align_corners=corners,
        sampling=modes.get("sampling", "linear"),
    )
    assert_right(kernels, inputs, torch.float32, **modes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_of_16_bits_are_rounded_once_and_those_of_64_keep_theirs(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    inputs = make_inputs(SHAPES[2], batch=1, queries=9, heads=2, dim=8)
    assert_right(kernels, inputs, dtype, softmax=True)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 3, 32, 100])
def test_any_number_of_channels(kernels: Kernels, dim: int) -> None:
    inputs = make_inputs([(3, 4)], batch=1, queries=6, heads=2, dim=dim, num_points=2)
    assert_right(kernels, inputs, torch.float32)


@pytest.mark.slow
def test_more_levels_than_one_launch_takes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels.backend == "cuda":
        monkeypatch.setattr("pyfeat._cuda_ops.sampling.MAX_LEVELS", 4)
    shapes = [(1 + level % 3, 2) for level in range(9)]
    counts = [1, 0, 2, 1, 1, 0, 1, 1, 2]
    inputs = make_inputs(shapes, batch=1, queries=19, heads=2, num_points=counts)
    assert_right(kernels, inputs, torch.float32, softmax=True)
    assert_right(kernels, inputs, torch.bfloat16)


# Edges

# Positions along x on a level of 4 cells: at the ends, on a cell, and out of range.
POSITIONS = [-1.0, 4.0, 0.0, 3.0, 2.0, -1.5, math.inf, -math.inf, math.nan, 1e30, -0.25, 3.5]


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(map(str, modes.values())))
def test_points_at_the_ends_and_out_of_range_are_as_in_the_reference(
    kernels: Kernels, modes: dict[str, Any]
) -> None:
    corners = modes.get("align_corners", False)
    x = torch.tensor(POSITIONS)
    x = x / 3 if corners else (x + 0.5) / 4
    locations = torch.stack([x, torch.full_like(x, 0.4)], dim=-1)[None, None, None]
    locations = torch.cat([locations, locations.flip(-1)], dim=1)  # [1, 2, 1, T, 2]
    weights = torch.randn(1, 2, 1, len(x))
    inputs = Inputs(torch.randn(1, 16, 1, 2), [(4, 4)], locations, weights, [len(x)])
    assert_right(kernels, inputs.to(torch.float64), torch.float32, **modes)


def test_what_does_not_count_has_no_weight_and_no_value(kernels: Kernels, order: str) -> None:
    inputs = make_inputs([(4,)], batch=1, queries=1, heads=1, num_points=2).to(torch.float32)
    inputs.value[0, 3] = torch.inf  # a cell that no point touches
    inputs.sampling_locations[..., 0] = torch.tensor([0.3, -9.0])
    inputs.attention_weights[0, 0, 0, 1] = torch.nan
    found = kernels.all(inputs, torch.randn(1, 1, 4))
    assert all(x.isfinite().all() for x in found)


def test_a_softmax_that_is_not_a_number_does_not_reach_points_out_of_range(
    kernels: Kernels, order: str
) -> None:
    inputs = make_inputs([(4,)], batch=1, queries=1, heads=1, num_points=2).to(torch.float32)
    inputs.sampling_locations[:] = -9.0
    inputs.attention_weights[..., 1] = torch.nan
    needs = (True, True, False)
    found = kernels.gradients(inputs, torch.randn(1, 1, 4), needs, softmax=True)
    assert all(not x.any() for x in (kernels.sums(inputs, softmax=True), *found))


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("softmax", [False, True])
def test_nothing_is_launched_for_nothing(
    kernels: Kernels, case: str, softmax: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in kernels.launched:
        monkeypatch.setattr(name, None)
    inputs = EMPTY[case]().to(torch.float32)
    batch, queries, heads = inputs.sampling_locations.shape[:3]
    out = kernels.sums(inputs, softmax=softmax)
    assert out.shape == (batch, queries, heads * inputs.value.shape[3])
    gradients = kernels.gradients(inputs, out, softmax=softmax)
    for x, given in zip((out, *gradients), (out, *inputs.tensors()), strict=True):
        assert x.shape == given.shape
        assert not x.any()


def test_a_gradient_that_is_not_needed_is_not_made(kernels: Kernels, order: str) -> None:
    inputs = make_inputs([(3, 2)], batch=1, queries=2, heads=1).to(torch.float32)
    grad_output = torch.randn(1, 2, 4)
    together = kernels.gradients(inputs, grad_output)
    for place, given in enumerate(inputs.tensors()):
        needs = (place == 0, place == 1, place == 2)
        alone = kernels.gradients(inputs, grad_output, needs)
        assert torch.equal(alone[place], together[place])
        assert alone[place].shape == given.shape
        assert all(x.shape == (0,) for i, x in enumerate(alone) if i != place)


@pytest.mark.slow
def test_strided_inputs_give_the_same_bits(kernels: Kernels, order: str) -> None:
    shapes = [(3, 2), (1, 2)]
    inputs = make_inputs(shapes, batch=2, queries=3, heads=2, num_points=2).to(torch.float32)
    strided = [
        inputs.value.transpose(1, 2).contiguous().transpose(1, 2),
        inputs.sampling_locations.transpose(3, 4).contiguous().transpose(3, 4),
        inputs.attention_weights.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    grad_output = torch.randn(2, 1, 8).expand(2, 3, 8)
    for x in strided:
        assert not x.is_contiguous()
    views = inputs.of(*strided)
    assert torch.equal(kernels.sums(views), kernels.sums(inputs))
    expected = kernels.gradients(inputs, grad_output.contiguous())
    for found, wanted in zip(kernels.gradients(views, grad_output), expected, strict=True):
        assert torch.equal(found, wanted)
    spread = inputs.of(inputs.value.mT.contiguous().mT, *inputs.tensors()[1:])
    assert spread.value.stride(-1) != 1
    assert torch.equal(kernels.sums(spread), kernels.sums(inputs))


@pytest.mark.parametrize("most_terms", [1, 32, 10**6])  # 16 of one query
def test_sorted_terms_come_in_parts_that_may_span_batches(
    kernels: Kernels, most_terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs([(3,)], batch=3, queries=3, heads=2, dim=3, num_points=4)
    monkeypatch.setattr(kernels.max_terms, most_terms)
    assert_right(kernels, inputs, torch.float32, softmax=True)


# The public op


@pytest.mark.slow
def test_the_op_can_be_derived_twice(kernels: Kernels) -> None:
    inputs = make_inputs(SHAPES[2], batch=1, queries=3, heads=2, num_points=2)
    leaves = [x.to(kernels.device).requires_grad_() for x in inputs.tensors()]
    grad_output = torch.randn(
        1, 3, 8, dtype=torch.float64, device=kernels.device, requires_grad=True
    )
    modes: dict[str, Any] = {"num_points": inputs.num_points, "softmax": True}

    def twice(op: Any) -> list[Tensor]:
        value, locations, weights = leaves
        out = op(value, inputs.spatial_shapes, locations, weights, **modes)
        first = torch.autograd.grad(out, leaves, grad_output, create_graph=True)
        total = torch.stack([(x * x.detach().sin()).sum() for x in first]).sum()
        return list(torch.autograd.grad(total, [*leaves, grad_output]))

    expected = twice(reference.deform_attn)
    with SamplingOps(kernels):
        found = twice(pyfeat.deform_attn)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
