"""Deformable attention of the reference: against grid_sample, finite differences and by hand."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pyfeat.reference import deform_attn
from tests.support_attention import (
    EMPTY,
    SHAPES,
    Inputs,
    by_grid_sample,
    by_nearest_cell,
    gradients_of,
    make_inputs,
)

CONVENTIONS = [
    pytest.param(padding, align_corners, id=f"{padding}-{'corners' if align_corners else 'edges'}")
    for padding in ("zeros", "border")
    for align_corners in (False, True)
]
# float64 sums of at most 8 corners of 9 points, of terms of the order of 1 to 10.
assert_close = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-13)


def assert_equals_grid_sample(inputs: Inputs, padding: str, align_corners: bool) -> None:
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    ours = deform_attn(
        *inputs[:4],
        num_points=inputs.num_points,
        padding=padding,
        align_corners=align_corners,
    )
    theirs = by_grid_sample(inputs, padding, align_corners)
    assert_close(ours, theirs)
    grad_output = torch.randn_like(ours)
    for mine, true in zip(
        gradients_of(ours, leaves, grad_output),
        gradients_of(theirs, leaves, grad_output),
        strict=True,
    ):
        assert_close(mine, true)


@pytest.mark.parametrize(("padding", "align_corners"), CONVENTIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_value_and_gradients_are_those_of_grid_sample(
    ndim: int, padding: str, align_corners: bool
) -> None:
    inputs = make_inputs(SHAPES[ndim], queries=20, align_corners=align_corners)
    assert_equals_grid_sample(inputs, padding, align_corners)


@pytest.mark.parametrize(("padding", "align_corners"), CONVENTIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_ends_and_centres_of_cells_are_those_of_grid_sample(
    ndim: int, padding: str, align_corners: bool
) -> None:
    """u of -1, 0, N - 1, N, one beyond and in between, on every axis; exact by the sizes chosen."""
    size = 5 if align_corners else 4
    u = torch.tensor([-2, -1, -0.5, 0, 1, 1.5, size - 1, size - 0.5, size, size + 1])
    p = (u / (size - 1) if align_corners else (u + 0.5) / size).double()
    points = torch.cartesian_prod(*[p] * ndim).view(1, -1, 1, 1, ndim)
    inputs = Inputs(
        torch.randn(1, size**ndim, 1, 2).double(),
        [(size,) * ndim],
        points,
        torch.randn(points.shape[:4]).double(),
        [1],
    )
    assert_equals_grid_sample(inputs, padding, align_corners)


def test_at_the_outer_end_the_derivative_is_that_from_within() -> None:
    value = torch.tensor([3.0, 5.0]).double().view(1, 2, 1, 1)
    p = torch.tensor([-0.25]).double().view(1, 1, 1, 1, 1, 1).requires_grad_()  # u = -1
    out = deform_attn(value, [(2,)], p, torch.ones(1, 1, 1, 1, 1).double())
    assert out.item() == 0.0
    assert gradients_of(out, [p], torch.ones_like(out))[0].item() == 2 * 3.0  # N V[0]


@pytest.mark.parametrize("softmax", [False, True], ids=["weights", "logits"])
@pytest.mark.parametrize(("padding", "align_corners"), CONVENTIONS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    ndim: int, padding: str, align_corners: bool, softmax: bool
) -> None:
    inputs = make_inputs(
        SHAPES[ndim],
        batch=1,
        queries=1,
        dim=2,
        heads=1,
        num_points=[2, 1, 2][: len(SHAPES[ndim])],
        align_corners=align_corners,
    )

    def out(*tensors: Tensor) -> Tensor:
        return deform_attn(
            *inputs.of(*tensors)[:4],
            num_points=inputs.num_points,
            padding=padding,
            align_corners=align_corners,
            softmax=softmax,
        )

    leaves = [x.requires_grad_() for x in inputs.tensors()]
    assert gradcheck(out, leaves)
    assert gradgradcheck(out, leaves)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_the_last_axis_of_locations_is_the_reverse_of_a_shape(ndim: int) -> None:
    """A point at the centre of a cell finds that cell, of levels that are no squares."""
    shapes = [(2, 3, 5)[:ndim], (4, 1, 2)[:ndim]]
    total = sum(math.prod(shape) for shape in shapes)
    value = torch.arange(total).double().view(1, total, 1, 1)
    row = 0
    for level, shape in enumerate(shapes):
        for cell in itertools.product(*map(range, shape)):
            centre = [(i + 0.5) / size for i, size in zip(cell, shape, strict=True)]
            p = torch.tensor(centre[::-1], dtype=torch.float64).view(1, 1, 1, 1, ndim)
            counts = [1 - level, level]
            weights = torch.ones(1, 1, 1, 1).double()
            out = deform_attn(value, shapes, p, weights, num_points=counts)
            assert_close(out.item(), float(row))
            row += 1
    assert row == total


def test_shapes_may_be_a_tensor_and_points_may_have_their_own_axis() -> None:
    inputs = make_inputs(SHAPES[2])
    listed = deform_attn(*inputs[:4], num_points=inputs.num_points)
    value, shapes, locations, weights, _ = inputs
    apart = deform_attn(
        value,
        torch.tensor(shapes),
        locations.view(*locations.shape[:3], len(shapes), 3, 2),
        weights.view(*weights.shape[:3], len(shapes), 3),
    )
    assert apart.equal(listed)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_discrete_sampling_takes_the_cell_of_rt_detr_v2(
    ndim: int, align_corners: bool, padding: str
) -> None:
    inputs = make_inputs(SHAPES[ndim], sampling="discrete")
    inputs.sampling_locations[:, 0] = 0.0
    inputs.sampling_locations[:, 1] = 1.0
    inputs.sampling_locations[:, 2] = 0.5  # (N + 1) / 2: exact, truncated
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    ours = deform_attn(
        *inputs[:4],
        num_points=inputs.num_points,
        padding=padding,
        align_corners=align_corners,
        sampling="discrete",
    )
    theirs = by_nearest_cell(inputs)
    assert_close(ours, theirs)
    grad_output = torch.randn_like(ours)
    found = gradients_of(ours, leaves, grad_output)
    expected = gradients_of(theirs, leaves, grad_output)
    assert not found[1].any()
    for mine, true in zip(found, expected, strict=True):
        assert_close(mine, true)


def test_softmax_is_over_the_points_of_all_levels() -> None:
    inputs = make_inputs(SHAPES[2], num_points=[4, 2])
    value, shapes, locations, logits, counts = inputs
    fused = deform_attn(value, shapes, locations, logits, num_points=counts, softmax=True)
    weights = logits.exp() / logits.exp().sum(dim=3, keepdim=True)
    apart = deform_attn(value, shapes, locations, weights, num_points=counts)
    assert_close(fused, apart)


@pytest.mark.parametrize(("padding", "align_corners"), CONVENTIONS)
@pytest.mark.parametrize("sampling", ["linear", "discrete"])
def test_a_location_that_is_not_finite_is_out_of_range_or_at_the_border(
    sampling: str, padding: str, align_corners: bool
) -> None:
    """Gradients by every input are 0 where it counts for nothing, finite everywhere."""
    shapes = [(3, 2), (1, 1)]
    bad = torch.tensor([math.nan, math.inf, -math.inf, 0.3]).double()
    points = torch.cartesian_prod(bad, bad)[:-1]  # [15, 2], x and y
    value = torch.randn(1, 7, 1, 3).double().requires_grad_()
    for counts in ([1, 0], [0, 1]):
        p = points.view(1, 15, 1, 1, 2).clone().requires_grad_()
        weights = torch.randn(1, 15, 1, 1).double()
        clips = padding == "border" or sampling == "discrete"
        nowhere = points.isnan().any(dim=1) if clips else torch.ones(15, dtype=torch.bool)
        weights[0, nowhere] = math.nan  # must not come through
        weights.requires_grad_()

        def out(p: Tensor, counts: list[int] = counts, weights: Tensor = weights) -> Tensor:
            return deform_attn(
                value,
                shapes,
                p,
                weights,
                num_points=counts,
                padding=padding,
                align_corners=align_corners,
                sampling=sampling,
            )

        found = out(p)
        grad_output = torch.randn_like(found)
        by_value, by_p, by_weight = gradients_of(found, [value, p, weights], grad_output)
        assert not found[0, nowhere].any()
        assert not by_weight[0, nowhere].any()
        assert by_value.isfinite().all()
        assert by_p.isfinite().all()
        assert not by_p[:, nowhere].any()
        assert not by_p[~p.isfinite()].any()
        if clips:
            far = out(p.detach().clamp(-1e6, 1e6))
            assert_close(found[0, ~nowhere], far[0, ~nowhere])


@pytest.mark.parametrize(("padding", "align_corners"), CONVENTIONS)
@pytest.mark.parametrize("sampling", ["linear", "discrete"])
@pytest.mark.parametrize("empty", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_a_level_without_cells_contributes_nothing(
    empty: tuple[int, int], sampling: str, padding: str, align_corners: bool
) -> None:
    attend = functools.partial(
        deform_attn, padding=padding, align_corners=align_corners, sampling=sampling
    )
    inputs = make_inputs([(3, 2)], num_points=2)
    value, shapes, locations, weights, _ = inputs
    more = torch.tensor([0.1, 0.7, math.nan]).double().expand(*weights.shape[:3], 3)
    p = torch.cat([more[..., None].expand(-1, -1, -1, -1, 2), locations], dim=3).requires_grad_()
    a = torch.cat([torch.full_like(more, math.nan), weights], dim=3).requires_grad_()
    out = attend(value, [empty, *shapes], p, a, num_points=[3, 2])
    alone = attend(value, shapes, locations, weights, num_points=[2])
    assert_close(out, alone)
    for gradient in gradients_of(out, [p, a], torch.ones_like(out)):
        assert gradient.isfinite().all()
        assert not gradient[:, :, :, :3].any()


@pytest.mark.parametrize("softmax", [False, True], ids=["weights", "logits"])
@pytest.mark.parametrize("nothing", EMPTY)
def test_of_nothing_the_result_is_zeros(nothing: str, softmax: bool) -> None:
    inputs = EMPTY[nothing]()
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    out = deform_attn(*inputs[:4], num_points=inputs.num_points, softmax=softmax)
    assert out.shape == (*inputs.sampling_locations.shape[:2], math.prod(inputs.value.shape[2:]))
    assert not out.any()
    for leaf, gradient in zip(leaves, gradients_of(out, leaves, torch.ones_like(out)), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_an_infinite_value_is_seen_by_the_points_that_touch_it_only() -> None:
    value = torch.tensor([math.inf, 1.0, 2.0, math.nan]).double().view(1, 4, 1, 1)
    p = torch.tensor([-1.0, 0.5, 1.5, 0.2, 0.9]).double().view(1, 5, 1, 1, 1, 1)
    weights = torch.ones(1, 5, 1, 1, 1).double()
    out = deform_attn(value, [(4,)], p, weights).flatten()
    assert out[:3].tolist() == [0.0, 1.5, 0.0]
    assert out[3] == math.inf
    assert out[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_values_are_summed_in_the_dtype_of_the_locations(dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[2], dim=16).to(dtype, torch.float64)
    out = deform_attn(*inputs[:4], num_points=inputs.num_points)
    exact = deform_attn(*inputs.to(torch.float64)[:4], num_points=inputs.num_points)
    assert out.dtype == dtype
    assert out.equal(exact.to(dtype))
