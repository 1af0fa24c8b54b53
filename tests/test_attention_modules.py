"""The attention modules against loops over the plain definition, in float64."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.attention import (
    DeformableAttention1D,
    DeformableEncoderLayer,
    MultiScaleDeformAttn,
    grid_points,
)
from pyfeat.attention._multi_scale import head_directions
from tests.support_attention_modules import (
    PYRAMIDS,
    SAME,
    expected_attention,
    num_cells,
    randomized,
)


@pytest.mark.parametrize("kind", ["points", "level points", "boxes", "level boxes"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_attention_samples_at_reference_plus_offset(ndim: int, kind: str) -> None:
    shapes = PYRAMIDS[ndim]
    module = randomized(MultiScaleDeformAttn(6, 2, 2, [3, 1], ndim))
    assert isinstance(module, MultiScaleDeformAttn)
    query, value = torch.randn(2, 3, 6).double(), torch.randn(2, num_cells(shapes), 6).double()
    size = 2 * ndim if "boxes" in kind else ndim
    levels = (2,) if "level" in kind else ()
    points = torch.rand(2, 3, *levels, size).double()
    mask = torch.rand(2, num_cells(shapes)) < 0.3
    ratios = torch.rand(2, 2, ndim).double() + 0.5
    output = module(query, points, value, shapes, padding_mask=mask, valid_ratios=ratios)
    expected = expected_attention(module, query, points, value, shapes, mask, ratios)
    torch.testing.assert_close(output, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "border"},
        {"align_corners": True},
        {"padding": "border", "align_corners": True},
        {"sampling": "discrete"},
        {"offset_scale": 1.5},
        {"bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 4], ids=["points", "boxes"])
def test_every_option_of_the_attention_acts(options: dict[str, Any], size: int) -> None:
    shapes = PYRAMIDS[2]
    module = randomized(MultiScaleDeformAttn(6, 2, 2, 2, **options))
    plain = MultiScaleDeformAttn(6, 2, 2, 2).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    assert isinstance(module, MultiScaleDeformAttn)
    query, value = torch.randn(2, 5, 6).double(), torch.randn(2, num_cells(shapes), 6).double()
    points = torch.rand(2, 5, size).double()
    output = module(query, points, value, shapes)
    expected = expected_attention(module, query, points, value, shapes)
    torch.testing.assert_close(output, expected, rtol=0, atol=SAME)
    without_effect = (size == 2 and "offset_scale" in options) or "bias" in options
    if not without_effect:
        assert (output - plain(query, points, value, shapes)).abs().max() > 1e-3
    assert (module.value_proj.bias is None) == (module.output_proj.bias is None)
    assert (module.value_proj.bias is None) == ("bias" in options)


def test_shapes_may_be_a_tensor_and_sizes_may_be_empty() -> None:
    module = randomized(MultiScaleDeformAttn(6, 2, 2, 2))
    shapes = PYRAMIDS[2]
    query, value = torch.randn(1, 3, 6).double(), torch.randn(1, num_cells(shapes), 6).double()
    points = torch.rand(1, 3, 2).double()
    torch.testing.assert_close(
        module(query, points, value, torch.tensor(shapes)),
        module(query, points, value, shapes),
        rtol=0,
        atol=0,
    )
    for batch, queries in ((0, 3), (1, 0)):
        empty = module(query[:batch, :queries], points[:batch, :queries], value[:batch], shapes)
        assert empty.shape == (batch, queries, 6)


def test_the_attention_is_differentiable_by_all_it_takes() -> None:
    shapes = [(3, 2), (1, 2)]
    module = randomized(MultiScaleDeformAttn(4, 2, 2, [1, 2]))
    names = [name for name, _ in module.named_parameters()]

    def attention(query: Tensor, points: Tensor, value: Tensor, *weights: Tensor) -> Any:
        arguments = (query, points, value, shapes)
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), arguments)

    inputs = [torch.randn(1, 2, 4), torch.rand(1, 2, 4) * 0.6 + 0.1, torch.randn(1, 8, 4)]
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    arguments = [x.double().requires_grad_() for x in (*inputs, *weights)]
    assert torch.autograd.gradcheck(attention, arguments, fast_mode=True)


def test_parameters_and_their_first_values_are_those_of_deformable_detr() -> None:
    heads, levels, points = 8, 4, 3
    module = MultiScaleDeformAttn(16, heads, levels, points)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "sampling_offsets.weight": (heads * levels * points * 2, 16),
        "sampling_offsets.bias": (heads * levels * points * 2,),
        "attention_weights.weight": (heads * levels * points, 16),
        "attention_weights.bias": (heads * levels * points,),
        "value_proj.weight": (16, 16),
        "value_proj.bias": (16,),
        "output_proj.weight": (16, 16),
        "output_proj.bias": (16,),
    }
    angles = torch.arange(heads) * (2.0 * math.pi / heads)
    grid = torch.stack([angles.cos(), angles.sin()], -1)
    grid = (grid / grid.abs().max(-1, keepdim=True)[0]).view(heads, 1, 1, 2)
    grid = grid.repeat(1, levels, points, 1)
    for i in range(points):
        grid[:, :, i, :] *= i + 1
    torch.testing.assert_close(module.sampling_offsets.bias.detach(), grid.view(-1))
    for zero in (
        module.sampling_offsets.weight,
        module.attention_weights.weight,
        module.attention_weights.bias,
        module.value_proj.bias,
        module.output_proj.bias,
    ):
        assert not zero.any()
    assert module.value_proj.weight.std() > 0.1


def test_directions_of_heads_differ_and_reach_the_next_cell() -> None:
    for ndim, heads in ((1, 2), (2, 8), (2, 5), (3, 6), (3, 26), (3, 1)):
        directions = head_directions(heads, ndim)
        assert directions.shape == (heads, ndim)
        torch.testing.assert_close(directions.abs().amax(1), torch.ones(heads))
        unit = nn.functional.normalize(directions, dim=1)
        cosines = unit @ unit.T - 2 * torch.eye(heads)
        # Evenly: no two are nearer than half the angle at which the sphere is full of caps.
        cap = {1: -1.0, 2: math.cos(2 * math.pi / heads), 3: 1 - 1 / heads}[ndim]
        assert cosines.max() <= cap + 1e-6
    assert head_directions(4, 1)[:, 0].tolist() == [1.0, -1.0, 1.0, -1.0]


def test_a_module_of_16_bits_keeps_locations_in_float32() -> None:
    shapes, width = [(1, 4096)], 4096
    module = MultiScaleDeformAttn(2, 1, 1, 1).bfloat16()
    nn.init.eye_(module.value_proj.weight)
    nn.init.eye_(module.output_proj.weight)
    # A ramp: what is sampled is the place. In bfloat16 a location is only known to 8 of 4096 cells.
    value = torch.arange(width).view(1, width, 1).expand(1, width, 2) % 256
    points = torch.tensor([[0.5 + 100.5 / width, 0.5]]).view(1, 1, 2)
    output = module(torch.zeros(1, 1, 2).bfloat16(), points, value.bfloat16(), shapes)
    assert output.tolist() == [[[101.0, 101.0]]]  # the first offset is one cell to the right


MODULES: dict[str, Callable[[], nn.Module]] = {
    "multi-scale": lambda: MultiScaleDeformAttn(8, 2, 2, [2, 1]),
    "dense": lambda: DeformableAttention1D(8, 2, head_dim=4),
    "encoder": lambda: DeformableEncoderLayer(8, 2, 2, 2, ffn_dim=8, dropout=0.0),
}


def call(kind: str, module: Callable[..., Any], dtype: torch.dtype = torch.float32) -> Tensor:
    shapes = PYRAMIDS[2]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, num_cells(shapes), 8, generator=generator).to(dtype)
    if kind == "multi-scale":
        return module(features, grid_points(shapes).expand(2, -1, -1), features, shapes)  # type: ignore[no-any-return]
    return module(features, shapes) if kind == "encoder" else module(features)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", MODULES)
def test_modules_can_be_copied_and_pickled(kind: str) -> None:
    module = MODULES[kind]()
    output = call(kind, module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(call(kind, other), output, rtol=0, atol=0)
    assert repr(module).startswith(type(module).__name__ + "(")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES)
def test_modules_compile_as_one_graph(kind: str) -> None:
    module = MODULES[kind]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = call(kind, compiled)
    torch.testing.assert_close(output, call(kind, module), rtol=0, atol=1e-6)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(module.parameters()))
        for y in (output, call(kind, module))
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_compute_in_16_bits_and_under_autocast(kind: str, dtype: torch.dtype) -> None:
    module = MODULES[kind]()
    exact = call(kind, copy.deepcopy(module).double(), torch.float64)
    # A dozen roundings in a row, of numbers around 1.
    bound = 12 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        output = call(kind, module)
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=bound)
    output = call(kind, module.to(dtype), dtype)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 7}, "embed_dim must be a multiple of num_heads = 2, got 7"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_levels": 2.0}, "num_levels must be an integer, got 2.0"),
        ({"num_points": [1]}, r"num_points must have a count for 2 levels, got \[1\]"),
        ({"num_points": [1, 0]}, r"num_points\[1\] must be at least 1, got 0"),
        ({"ndim": 4}, "ndim must be one of 1, 2, 3, got 4"),
        ({"padding": "reflection"}, "padding must be one of 'zeros', 'border', got 'reflection'"),
        ({"sampling": "nearest"}, "sampling must be one of 'linear', 'discrete', got 'nearest'"),
        ({"offset_scale": 0.0}, "offset_scale must be positive and finite, got 0.0"),
        ({"offset_scale": math.nan}, "offset_scale must be positive and finite, got nan"),
    ],
)
def test_the_attention_refuses(options: dict[str, Any], message: str) -> None:
    given = {"embed_dim": 8, "num_heads": 2, "num_levels": 2, "num_points": 1, **options}
    with pytest.raises((ValueError, TypeError), match=f"^MultiScaleDeformAttn: {message}$"):
        MultiScaleDeformAttn(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(1, 3, 5)}, r"query must have shape \(B, Q, 6\), got \(1, 3, 5\)"),
        ({"query": None}, "query must be a tensor, got NoneType"),
        ({"value": torch.zeros(2, 8, 6)}, r"value must have shape \(1, S, 6\), got \(2, 8, 6\)"),
        (
            {"reference_points": torch.zeros(1, 3, 3)},
            r"reference_points must have shape \(1, 3, 2\) or .*, got \(1, 3, 3\)",
        ),
        (
            {"spatial_shapes": [(2, 4)]},
            r"spatial_shapes must be 2 tuples of 2 sizes, got \[\(2, 4\)\]",
        ),
        (
            {"padding_mask": torch.zeros(1, 7, dtype=torch.bool)},
            r"padding_mask must have shape \(1, 8\), got \(1, 7\)",
        ),
        ({"padding_mask": torch.zeros(1, 8)}, "padding_mask must be bool, got float32"),
        (
            {"valid_ratios": torch.ones(1, 2)},
            r"valid_ratios must have shape \(1, 2, 2\), got \(1, 2\)",
        ),
    ],
)
def test_the_attention_refuses_inputs(changes: dict[str, Any], message: str) -> None:
    inputs = {
        "query": torch.zeros(1, 3, 6),
        "reference_points": torch.zeros(1, 3, 2),
        "value": torch.zeros(1, 8, 6),
        "spatial_shapes": [(2, 3), (1, 2)],
        **changes,
    }
    with pytest.raises((ValueError, TypeError), match=f"^MultiScaleDeformAttn: {message}$"):
        MultiScaleDeformAttn(6, 2, 2, 2)(**inputs)
