"""Deformable attention by the Triton kernels, and its gradients, against the float64 reference."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import _sampling_cuda, reference
from tests.support_attention import EMPTY, SHAPES, Inputs, gradients_of, make_inputs
from tests.support_triton import (
    DEVICE,
    UNITS,
    TritonOps,
    sampling,
    sampling_arguments,
    sampling_gradient,
    sampling_sorted,
)

MODES = [
    {},
    {"padding": "border", "align_corners": True, "softmax": True},
    {"align_corners": True, "softmax": True},
    {"padding": "border"},
    {"sampling": "discrete", "softmax": True},
]
ALL = (True, True, True)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a head, and several reads of logits, for few queries and points."""
    monkeypatch.setattr(sampling_arguments, "_SMALL_ELEMENTS", 64)
    monkeypatch.setattr(sampling, "BLOCK_T", 2)
    monkeypatch.setattr(sampling_gradient, "BLOCK_T", 2)


@pytest.fixture(params=["atomic", "sorted"])
def order(request: pytest.FixtureRequest) -> str:
    """How values get their gradient."""
    torch.use_deterministic_algorithms(request.param == "sorted", warn_only=True)
    return str(request.param)


def arguments(inputs: Inputs, **modes: Any) -> tuple[Any, ...]:
    """Of the registered ops, on DEVICE."""
    value, locations, weights = (x.to(DEVICE) for x in inputs.tensors())
    return (
        value,
        [size for shape in inputs.spatial_shapes for size in shape],
        inputs.num_points,
        locations,
        weights,
        modes.get("padding") == "border",
        modes.get("align_corners", False),
        modes.get("sampling") == "discrete",
        modes.get("softmax", False),
    )


def triton_forward(inputs: Inputs, **modes: Any) -> Tensor:
    return _sampling_cuda.forward(*arguments(inputs, **modes)).cpu()


def triton_gradients(
    inputs: Inputs, grad_output: Tensor, needs: tuple[bool, bool, bool] = ALL, **modes: Any
) -> list[Tensor]:
    given = (*arguments(inputs, **modes), grad_output.to(DEVICE), *needs)
    return [x.cpu() for x in _sampling_cuda.backward(*given)]


def reference_all(inputs: Inputs, grad_output: Tensor, **modes: Any) -> list[Tensor]:
    """The sums and the three gradients, in the dtype of the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs.tensors()]
    value, locations, weights = leaves
    out = reference.deform_attn(
        value, inputs.spatial_shapes, locations, weights, num_points=inputs.num_points, **modes
    )
    return [out.detach(), *gradients_of(out, leaves, grad_output.to(out.dtype))]


def assert_right(inputs: Inputs, dtype: torch.dtype, **modes: Any) -> None:
    """Fail unless errors are at most twice those of torch in float32, and of rounding to ``dtype``.

    ``inputs`` are float64; values and weights are rounded to ``dtype``, locations to float32.
    """
    working = torch.promote_types(dtype, torch.float32)
    rounded = inputs.to(dtype, working)
    batch, queries, heads = rounded.sampling_locations.shape[:3]
    grad_output = torch.randn(batch, queries, heads * rounded.value.shape[3]).to(dtype)
    exact = reference_all(rounded.to(torch.float64), grad_output, **modes)
    theirs = reference_all(rounded.to(working), grad_output, **modes)
    torch.use_deterministic_algorithms(False)
    mine = [triton_forward(rounded, **modes), *triton_gradients(rounded, grad_output, **modes)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    mine += triton_gradients(rounded, grad_output, (True, False, False), **modes)[:1]
    dtypes = (dtype, dtype, working, dtype, dtype)
    pairs = [*zip(exact, theirs, strict=True), (exact[1], theirs[1])]
    for found, (true, torchs), wanted in zip(mine, pairs, dtypes, strict=True):
        assert found.dtype == wanted
        assert found.shape == true.shape
        # In float64 torch is what is exact: allow for a sum in another order.
        unit = torch.finfo(working).eps * (8 if dtype == torch.float64 else 1)
        budget = 2 * (torchs.double() - true).abs().max() + unit * true.abs().max()
        if wanted != working:
            # The interpreter cuts off what does not fit into bfloat16.
            units = 2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
            budget = budget + units * UNITS[dtype] * true.abs() + 2.0**-24
        error = (found.double() - true).abs()
        assert (error <= budget).all(), f"{float(error.max()):.2e} {float(true.abs().max()):.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(map(str, modes.values())))
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_sums_and_gradients_are_as_good_as_those_of_torch(ndim: int, modes: dict[str, Any]) -> None:
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
    assert_right(inputs, torch.float32, **modes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_of_16_bits_are_rounded_once_and_those_of_64_keep_theirs(dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[2], batch=1, queries=9, heads=2, dim=8)
    assert_right(inputs, dtype, softmax=True)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 3, 32, 100])
def test_any_number_of_channels(dim: int) -> None:
    inputs = make_inputs([(3, 4)], batch=1, queries=6, heads=2, dim=dim, num_points=2)
    assert_right(inputs, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes", [[(5, 6), (0, 3), (2, 3)], [(3, 3, 3), (1, 2, 1)]], ids=["2-D", "3-D"]
)
def test_queries_that_are_cells_give_the_same_bits_in_any_order(
    shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_cells = sum(math.prod(shape) for shape in shapes)
    inputs = make_inputs(shapes, batch=1, queries=num_cells, heads=1, num_points=1)
    inputs = inputs.to(torch.float32)
    grad_output = torch.randn(1, num_cells, 4)
    tiled = [triton_forward(inputs), *triton_gradients(inputs, grad_output)]
    blocks = sampling_arguments.QueryBlocks.of

    def plain(given: Any) -> Any:
        made = blocks(given)
        assert made.tiled
        count = -(-num_cells // made.block_q)
        assert made.count > count  # tiles reach over edges
        return sampling_arguments.QueryBlocks(
            made.block_q, made.block_d, made.num_warps, made.tile, False, count
        )

    monkeypatch.setattr(sampling_arguments.QueryBlocks, "of", plain)
    in_order = [triton_forward(inputs), *triton_gradients(inputs, grad_output)]
    for a, b in zip(tiled, in_order, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("block_q", "ndim", "tile"),
    [(32, 2, (1, 4, 8)), (1, 2, (1, 1, 1)), (4, 3, (1, 2, 2)), (128, 3, (4, 4, 8))],
)
def test_blocks_of_cells_are_near_cubes(
    block_q: int, ndim: int, tile: tuple[int, int, int]
) -> None:
    assert sampling_arguments._tile(block_q, ndim) == tile


@pytest.mark.slow
def test_more_levels_than_one_launch_takes() -> None:
    shapes = [(1 + level % 3, 2) for level in range(9)]
    counts = [1, 0, 2, 1, 1, 0, 1, 1, 2]
    inputs = make_inputs(shapes, batch=1, queries=5, heads=2, num_points=counts)
    assert_right(inputs, torch.float32, softmax=True)
    assert_right(inputs, torch.bfloat16)


@pytest.mark.slow
def test_offsets_beyond_32_bits_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SHAPES[3], batch=1, queries=5, heads=1).to(torch.float32)
    grad_output = torch.randn(1, 5, 4)
    narrow = [triton_forward(inputs), *triton_gradients(inputs, grad_output)]
    monkeypatch.setattr(sampling_arguments.Sampling, "is_wide", True)
    wide = [triton_forward(inputs), *triton_gradients(inputs, grad_output)]
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize(("cells", "stride", "wide"), [(2**20, 2**10, False), (2**21, 2**10, True)])
def test_offsets_are_wide_where_values_pass_32_bits(cells: int, stride: int, wide: bool) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    # Values may be an expanded tensor of few elements: their gradient is not.
    value = empty(1, 1, stride // 4, 4).expand(1, cells, stride // 4, 4)
    inputs = (value, ((cells,),), (1,), empty(1, 1, 8, 1, 1), empty(1, 1, 8, 1))
    assert sampling_arguments.Sampling(*inputs, *[False] * 4).is_wide == wide


# Edges

# Positions along x on a level of 4 cells: at the ends, on a cell, and out of range.
POSITIONS = [-1.0, 4.0, 0.0, 3.0, 2.0, -1.5, math.inf, -math.inf, math.nan, 1e30, -0.25, 3.5]


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(map(str, modes.values())))
def test_points_at_the_ends_and_out_of_range_are_as_in_the_reference(modes: dict[str, Any]) -> None:
    corners = modes.get("align_corners", False)
    x = torch.tensor(POSITIONS)
    x = x / 3 if corners else (x + 0.5) / 4
    locations = torch.stack([x, torch.full_like(x, 0.4)], dim=-1)[None, None, None]
    locations = torch.cat([locations, locations.flip(-1)], dim=1)  # [1, 2, 1, T, 2]
    weights = torch.randn(1, 2, 1, len(x))
    inputs = Inputs(torch.randn(1, 16, 1, 2), [(4, 4)], locations, weights, [len(x)])
    assert_right(inputs.to(torch.float64), torch.float32, **modes)


def test_what_does_not_count_has_no_weight_and_no_value(order: str) -> None:
    inputs = make_inputs([(4,)], batch=1, queries=1, heads=1, num_points=2).to(torch.float32)
    inputs.value[0, 3] = torch.inf  # a cell that no point touches
    inputs.sampling_locations[..., 0] = torch.tensor([0.3, -9.0])
    inputs.attention_weights[0, 0, 0, 1] = torch.nan
    found = [triton_forward(inputs), *triton_gradients(inputs, torch.randn(1, 1, 4))]
    assert all(x.isfinite().all() for x in found)


def test_a_softmax_that_is_not_a_number_does_not_reach_points_out_of_range(order: str) -> None:
    inputs = make_inputs([(4,)], batch=1, queries=1, heads=1, num_points=2).to(torch.float32)
    inputs.sampling_locations[:] = -9.0
    inputs.attention_weights[..., 1] = torch.nan
    needs = (True, True, False)
    found = triton_gradients(inputs, torch.randn(1, 1, 4), needs, softmax=True)
    assert all(not x.any() for x in (triton_forward(inputs, softmax=True), *found))


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("softmax", [False, True])
def test_nothing_is_launched_for_nothing(
    case: str, softmax: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, kernel in (
        (sampling, "_sampled_sums_kernel"),
        (sampling_gradient, "_sampling_gradients_kernel"),
        (sampling_sorted, "_corner_terms_kernel"),
    ):
        monkeypatch.setattr(module, kernel, None)
    inputs = EMPTY[case]().to(torch.float32)
    batch, queries, heads = inputs.sampling_locations.shape[:3]
    out = triton_forward(inputs, softmax=softmax)
    assert out.shape == (batch, queries, heads * inputs.value.shape[3])
    gradients = triton_gradients(inputs, out, softmax=softmax)
    for x, given in zip((out, *gradients), (out, *inputs.tensors()), strict=True):
        assert x.shape == given.shape
        assert not x.any()


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1 << 24, 0), 1), ((0, 1 << 24), 1), ((2, 2), 1 << 15), ((1 << 16, 0, 1), 1)],
)
def test_a_level_that_is_too_large_is_refused(shape: tuple[int, ...], count: int) -> None:
    locations = torch.zeros(1, 1, 1, 1, len(shape))
    value = torch.zeros(1, 4, 1, 1)
    given = (value, (shape,), (count,), locations, locations[..., 0], *[False] * 4)
    with pytest.raises(ValueError, match="deform_attn: spatial_shapes must have sizes below 2"):
        sampling_arguments.Sampling(*given).levels()


def test_a_gradient_that_is_not_needed_is_not_made(order: str) -> None:
    inputs = make_inputs([(3, 2)], batch=1, queries=2, heads=1).to(torch.float32)
    grad_output = torch.randn(1, 2, 4)
    together = triton_gradients(inputs, grad_output)
    for place, given in enumerate(inputs.tensors()):
        needs = (place == 0, place == 1, place == 2)
        alone = triton_gradients(inputs, grad_output, needs)
        assert torch.equal(alone[place], together[place])
        assert alone[place].shape == given.shape
        assert all(x.shape == (0,) for i, x in enumerate(alone) if i != place)


@pytest.mark.slow
def test_strided_inputs_give_the_same_bits(order: str) -> None:
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
    assert torch.equal(triton_forward(views), triton_forward(inputs))
    expected = triton_gradients(inputs, grad_output.contiguous())
    for found, wanted in zip(triton_gradients(views, grad_output), expected, strict=True):
        assert torch.equal(found, wanted)
    spread = inputs.of(inputs.value.mT.contiguous().mT, *inputs.tensors()[1:])
    assert spread.value.stride(-1) != 1
    assert torch.equal(triton_forward(spread), triton_forward(inputs))


@pytest.mark.parametrize("most_terms", [1, 32, 10**6])  # 16 of one query
def test_sorted_terms_come_in_parts_that_may_span_batches(
    most_terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs([(3,)], batch=3, queries=3, heads=2, dim=3, num_points=4)
    monkeypatch.setattr(sampling_sorted, "_MAX_TERMS", most_terms)
    assert_right(inputs, torch.float32, softmax=True)


def test_terms_of_one_cell_are_added_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([(2,)], batch=1, queries=40, heads=1, dim=2, num_points=3)
    inputs = inputs.to(torch.float32)
    grad_output = torch.randn(1, 40, 2) * torch.logspace(-6, 6, 40)[None, :, None]
    first = triton_gradients(inputs, grad_output, (True, False, False))[0]
    # A GPU may sort equal cells in another order in every run if it is not told to be stable.
    sort, stable = Tensor.sort, []

    def recorded(self: Tensor, **options: Any) -> Any:
        stable.append(options["stable"])
        return sort(self, **options)

    monkeypatch.setattr(Tensor, "sort", recorded)
    again = triton_gradients(inputs, grad_output, (True, False, False))[0]
    assert stable == [True]
    assert torch.equal(first, again)


# The public op


@pytest.mark.slow
def test_the_op_can_be_derived_twice() -> None:
    inputs = make_inputs(SHAPES[2], batch=1, queries=3, heads=2, num_points=2)
    leaves = [x.to(DEVICE).requires_grad_() for x in inputs.tensors()]
    grad_output = torch.randn(1, 3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    modes: dict[str, Any] = {"num_points": inputs.num_points, "softmax": True}

    def twice(op: Any) -> list[Tensor]:
        value, locations, weights = leaves
        out = op(value, inputs.spatial_shapes, locations, weights, **modes)
        first = torch.autograd.grad(out, leaves, grad_output, create_graph=True)
        total = torch.stack([(x * x.detach().sin()).sum() for x in first]).sum()
        return list(torch.autograd.grad(total, [*leaves, grad_output]))

    expected = twice(reference.deform_attn)
    with TritonOps():
        found = twice(pyfeat.deform_attn)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)
