"""What deformable attention takes: edges of ranges, nothing at all, and too much."""

import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyfeat
from tests.support_attention import (
    EMPTY,
    MODES,
    SHAPES,
    Inputs,
    Mode,
    assert_as_good_as_plain_torch,
    attend,
    attend_exactly,
    gradients_of,
    make_inputs,
    with_gradients,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EVERY_MODE = [
    *MODES,
    *(mode._replace(softmax=not mode.softmax) for mode in MODES[:4]),
    Mode(padding="border", align_corners=True, sampling="discrete"),
]


def edge_inputs(ndim: int, mode: Mode, dtype: torch.dtype, heads: int = 1) -> Inputs:
    """Points at ends and centres of cells, far beyond, and not finite, on every axis."""
    size = 5 if mode.align_corners else 4
    u = torch.tensor([-1, -0.5, 0, 1, size - 1, size - 0.5, size, 1e30, math.inf, math.nan])
    u = torch.cat([u, torch.tensor([-math.inf, -3e38, -1.5])])
    p = u / (size - 1) if mode.align_corners else (u + 0.5) / size
    points = torch.cartesian_prod(*[p] * ndim).view(1, -1, 1, 1, ndim)
    points = points.expand(-1, -1, heads, -1, -1)
    return Inputs(
        torch.randn(1, size**ndim, heads, 5).to(dtype),
        [(size,) * ndim],
        points.to(torch.float64 if dtype == torch.float64 else torch.float32),
        torch.randn(points.shape[:4]).to(dtype),
        [1],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_at_every_edge_values_and_gradients_are_those_of_the_reference(
    ndim: int, mode: Mode, dtype: torch.dtype
) -> None:
    inputs = edge_inputs(ndim, mode, dtype, heads=16 if ndim == 1 else 2)
    _, queries, heads = inputs.sampling_locations.shape[:3]
    grad_output = torch.randn(1, queries, heads * 5).to(dtype)
    assert_as_good_as_plain_torch(inputs, mode, grad_output)


@pytest.mark.parametrize("mode", EVERY_MODE, ids=str)
def test_second_derivatives_at_every_edge_are_finite_and_those_of_the_reference(
    mode: Mode,
) -> None:
    inputs = edge_inputs(2, mode, torch.float64)
    found = []
    for attention in (attend, attend_exactly):
        leaves = [x.detach().requires_grad_() for x in inputs.tensors()]
        grad_output = torch.linspace(-1, 2, 169 * 5).double().view(1, 169, 5).requires_grad_()
        out = attention(inputs.of(*leaves), mode)
        first = torch.autograd.grad(
            out, leaves, grad_output, create_graph=True, allow_unused=True, materialize_grads=True
        )
        total = torch.stack([gradient.square().sum() for gradient in first]).sum()
        found.append(gradients_of(total, [*leaves, grad_output], torch.ones_like(total)))
    for mine, true in zip(*found, strict=True):
        assert true.isfinite().all()
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("mode", [m for m in EVERY_MODE if not m.softmax], ids=str)
def test_a_weight_that_is_not_a_number_comes_through_where_its_point_counts_only(
    mode: Mode,
) -> None:
    inputs = make_inputs([(2, 3)], queries=2, batch=1, heads=1, num_points=2).to(torch.float32)
    inputs.sampling_locations[0, :, 0, 0] = torch.tensor([0.4, math.nan])
    inputs.attention_weights[0, 0, 0, 0] = math.nan
    inputs.sampling_locations[0, :, 0, 1] = 0.5
    inputs.attention_weights[0, 1, 0, 1] = math.nan
    found = with_gradients(attend, inputs, mode, torch.ones(1, 2, 4))
    expected = with_gradients(attend_exactly, inputs, mode, torch.ones(1, 2, 4))
    assert found[0][0, 0].isfinite().all()
    assert found[0][0, 1].isnan().all()
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_infinite_cells_that_no_point_touches_leave_no_trace(
    ndim: int, mode: Mode, dtype: torch.dtype
) -> None:
    """First and last cells, in whose place those outside the level could be read."""
    shape = (6,) * ndim
    inputs = make_inputs([shape, shape], queries=6, dim=17, num_points=2).to(torch.float64)
    inside = 0.45 + 0.1 * torch.rand_like(inputs.sampling_locations)  # cells 1 to 4 of 6
    if (mode.padding, mode.sampling) == ("zeros", "linear"):
        inside[:, ::2] += 1e3
    inputs = inputs._replace(sampling_locations=inside).to(
        dtype, torch.float64 if dtype == torch.float64 else torch.float32
    )
    cells = 6**ndim
    grad_output = torch.randn(2, 6, 34).to(dtype)
    expected = with_gradients(attend, inputs, mode, grad_output)
    value = inputs.value.clone()
    value[:, [0, cells, -1]] = math.inf
    value[:, cells - 1] = math.nan
    found = with_gradients(attend, inputs._replace(value=value), mode, grad_output)
    for mine, true in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        assert mine.equal(true)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mode", EVERY_MODE, ids=str)
@pytest.mark.parametrize("nothing", EMPTY)
def test_of_nothing_the_result_and_the_gradients_are_zeros(
    nothing: str, mode: Mode, dtype: torch.dtype
) -> None:
    inputs = EMPTY[nothing]().to(dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    batch, queries, heads = inputs.sampling_locations.shape[:3]
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    out = attend(inputs, mode)
    assert out.shape == (batch, queries, heads * inputs.value.shape[3])
    assert out.dtype == dtype
    assert not out.any()
    for leaf, gradient in zip(leaves, gradients_of(out, leaves, torch.ones_like(out)), strict=True):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        assert not gradient.any()


@pytest.mark.parametrize("mode", EVERY_MODE, ids=str)
@pytest.mark.parametrize("nothing", EMPTY)
def test_of_nothing_the_second_derivatives_are_zeros(nothing: str, mode: Mode) -> None:
    inputs = EMPTY[nothing]().to(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    out = attend(inputs, mode)
    leaves.append(torch.ones_like(out).requires_grad_())
    first = torch.autograd.grad(
        out, leaves[:3], leaves[3], create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = torch.stack([(x + 1).square().sum() for x in first]).sum()
    for leaf, gradient in zip(leaves, gradients_of(total, leaves, torch.tensor(1.0)), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("mode", EVERY_MODE, ids=str)
@pytest.mark.parametrize("empty", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_a_level_without_cells_contributes_nothing(empty: tuple[int, int], mode: Mode) -> None:
    inputs = make_inputs([empty, (3, 2), empty], num_points=[2, 3, 1]).to(torch.float32)
    inputs.sampling_locations[:, 0, :, 0] = math.nan
    assert_as_good_as_plain_torch(inputs, mode, torch.randn(2, 5, 8))


def test_levels_of_one_cell_and_of_many_stand_side_by_side() -> None:
    shapes = [(1, 1), (37, 1), (1, 41), (2, 2)]
    for mode in MODES:
        inputs = make_inputs(
            shapes, queries=20, align_corners=mode.align_corners, sampling=mode.sampling
        ).to(torch.float32)
        assert_as_good_as_plain_torch(inputs, mode, torch.randn(2, 20, 8))


def test_shapes_may_be_a_tensor_and_points_may_have_their_own_axis() -> None:
    inputs = make_inputs(SHAPES[2]).to(torch.float32)
    value, shapes, locations, weights, counts = inputs
    listed = pyfeat.deform_attn(value, shapes, locations, weights, num_points=counts)
    locations = locations.view(*locations.shape[:3], len(shapes), 3, 2)
    weights = weights.view(*weights.shape[:3], len(shapes), 3)
    for given in (shapes, torch.tensor(shapes), torch.tensor(shapes, dtype=torch.int32)):
        assert pyfeat.deform_attn(value, given, locations, weights).equal(listed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_locations_and_weights_may_be_of_other_dtypes_than_values(dtype: torch.dtype) -> None:
    """They are taken in the dtype of the sums; a gradient is of the dtype of what it is by."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = make_inputs(SHAPES[2])
    value = inputs.value.to(dtype)
    for other in DTYPES:
        mixed = inputs.of(
            value, inputs.sampling_locations.to(other), inputs.attention_weights.to(other)
        )
        alike = mixed.of(value, *(x.to(sums) for x in mixed.tensors()[1:]))
        found = with_gradients(attend, mixed, Mode(), torch.ones(2, 5, 8))
        expected = with_gradients(attend, alike, Mode(), torch.ones(2, 5, 8))
        assert [x.dtype for x in found] == [dtype, dtype, other, other]
        for mine, true in zip(found, expected, strict=True):
            assert mine.equal(true.to(mine.dtype))


def test_the_reference_backend_gives_the_same() -> None:
    inputs = make_inputs(SHAPES[2]).to(torch.float32)
    for mode in EVERY_MODE:
        plain = pyfeat.deform_attn(
            *inputs[:4], num_points=inputs.num_points, backend="reference", **mode._asdict()
        )
        assert plain.dtype == torch.float32
        torch.testing.assert_close(attend(inputs, mode), plain, rtol=1e-5, atol=1e-5)


def test_more_elements_than_an_int_counts_have_the_right_shape() -> None:
    side = 50_000  # side * side cells > 2^31
    with FakeTensorMode():
        value = torch.empty(2, side * side, 2, 4, requires_grad=True)
        locations = torch.empty(2, 70_000, 2, 1, 8000, 2, requires_grad=True)
        weights = torch.empty(2, 70_000, 2, 1, 8000, requires_grad=True)
        out = pyfeat.deform_attn(value, [(side, side)], locations, weights)
        assert out.shape == (2, 70_000, 8)
        gradients = torch.autograd.grad(out.sum(), [value, locations, weights])
    for gradient, of in zip(gradients, (value, locations, weights), strict=True):
        assert gradient.shape == of.shape
        assert gradient.numel() > 2**31


FAR = """
import torch, pyfeat
rows, D = 1 << 22, 520  # more than 2^31 elements
value = torch.empty(1, rows, 1, D)  # takes memory where it is touched only
value[0, -1], value[0, -2] = 3.0, 5.0
p = torch.tensor([1 - 1 / rows]).view(1, 1, 1, 1, 1, 1)  # half way between the two
out = pyfeat.deform_attn(value, [(rows,)], p, torch.ones(1, 1, 1, 1, 1))
print(out.unique().tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory that is not touched costs nothing")
def test_cells_beyond_two_to_the_31_elements_are_found() -> None:
    done = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[4.0]"
