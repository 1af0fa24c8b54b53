"""Exports to ONNX, run by onnxruntime, against the plain definition in float64."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deformable_detr import modeling_deformable_detr

from pyfeat import deform_attn, reference
from pyfeat.attention import DeformableAttention1D, DeformableEncoderLayer
from pyfeat.integrations.onnx import translation_table
from pyfeat.integrations.transformers import patch, unpatch
from tests.support_detection import SMALL

pytestmark = [
    pytest.mark.slow,
    # From within torch's exporter, about the libraries and the Python that it meets.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# The last level has no cell.
PYRAMIDS: dict[int, list[tuple[int, ...]]] = {
    1: [(7,), (1,), (0,)],
    2: [(4, 5), (2, 1), (3, 0)],
    3: [(3, 4, 5), (2, 1, 2), (0, 1, 1)],
}
POINTS = [3, 2, 1]
SPECIAL = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, 1.0, 0.5])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding": "border"},
    {"align_corners": True},
    {"padding": "border", "align_corners": True},
    {"sampling": "discrete"},
    {"softmax": True},
]
# Levels of any number of axes read options at the same places: here these are set all, and none.
FEW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding": "border", "align_corners": True, "softmax": True},
    {"sampling": "discrete"},
]


class Attention(nn.Module):
    """One output for each of several sets of options."""

    def __init__(self, shapes: Sequence[Sequence[int]], *options: dict[str, Any]) -> None:
        super().__init__()
        self.shapes, self.options = shapes, options

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
        return [
            deform_attn(value, self.shapes, locations, weights, num_points=POINTS, **options)
            for options in self.options
        ]


def exported(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any = None, **options: Any
) -> onnxruntime.InferenceSession:
    program = torch.onnx.export(
        model.eval(),
        inputs,
        dynamo=True,
        custom_translation_table=translation_table(),
        dynamic_shapes=dynamic,
        verbose=False,
        **options,
    )
    assert program is not None
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString())


def run(session: onnxruntime.InferenceSession, *inputs: Tensor) -> list[Tensor]:
    names = [given.name for given in session.get_inputs()]
    feed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(output)) for output in session.run(None, feed)]


def example(
    ndim: int, batch: int, queries: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    cells = sum(math.prod(shape) for shape in PYRAMIDS[ndim])
    value = torch.randn(batch, cells, 3, 4).to(dtype)
    locations = torch.rand(batch, queries, 3, sum(POINTS), ndim) * 1.6 - 0.3
    weights = torch.randn(batch, queries, 3, sum(POINTS))
    return value, locations, weights


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_an_export_computes_the_attention_with_every_option(ndim: int) -> None:
    several = OPTIONS if ndim == 2 else FEW_OPTIONS
    model, dim = Attention(PYRAMIDS[ndim], *several), torch.export.Dim.DYNAMIC
    dynamic = ({0: dim}, {0: dim, 1: dim}, {0: dim, 1: dim})
    session = exported(model, example(ndim, 2, 5, torch.float32), dynamic)
    value, locations, weights = example(ndim, 3, 9, torch.float32)
    # Every special coordinate along every axis, at points of the first two levels.
    for axis in range(ndim):
        locations[axis % 3, : len(SPECIAL), 0, 0, axis] = SPECIAL
        locations[axis % 3, : len(SPECIAL), 1, 4, axis] = SPECIAL
    outputs = run(session, value, locations, weights)
    for options, output in zip(several, outputs, strict=True):
        exact, plain = (
            reference.deform_attn(
                value.to(dtype),
                PYRAMIDS[ndim],
                locations.to(dtype),
                weights.to(dtype),
                num_points=POINTS,
                **options,
            )
            for dtype in (torch.float64, torch.float32)
        )
        assert output.dtype == torch.float32
        assert output.shape == exact.shape
        # At most twice the error of torch; GridSample goes by 2 p - 1, which moves a place by a
        # rounding of p, times up to 7 cells and the slope of the values.
        allowed = 2 * (plain - exact).abs().max() + 7 * 2**-24 * 12
        assert ((output - exact).abs() <= allowed).all(), options


@pytest.mark.parametrize(
    ("ndim", "dtype"), [(2, torch.float16), (2, torch.float64), (3, torch.float64)], ids=str
)
def test_an_export_rounds_once_to_the_dtype_of_values(ndim: int, dtype: torch.dtype) -> None:
    value, locations, weights = example(ndim, 2, 5, dtype)
    if dtype == torch.float64:
        locations, weights = locations.double(), weights.double()
    model = Attention(PYRAMIDS[ndim], {})
    (output,) = run(exported(model, (value, locations, weights)), value, locations, weights)
    exact = reference.deform_attn(
        value.double(), PYRAMIDS[ndim], locations.double(), weights.double(), num_points=POINTS
    )
    assert output.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    error = (output.double() - exact).abs()
    assert (error <= half * exact.abs() + (1e-5 if dtype == torch.float16 else 1e-13)).all()


def test_an_export_without_points_or_cells_gives_zeros() -> None:
    class Nothing(nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return deform_attn(value, [(0, 3)], locations, weights)

    inputs = torch.zeros(2, 0, 3, 4), torch.zeros(2, 5, 3, 1, 2, 2), torch.zeros(2, 5, 3, 1, 2)
    (output,) = run(exported(Nothing(), inputs), *inputs)
    torch.testing.assert_close(output, torch.zeros(2, 5, 12), rtol=0, atol=0)


@pytest.mark.parametrize("opset", [18, 20])
def test_an_encoder_layer_exports_with_any_batch(opset: int) -> None:
    layer = DeformableEncoderLayer(8, 2, 2, 2, ffn_dim=8).eval()

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(features, [(3, 4), (2, 2)])  # type: ignore[no-any-return]

    model = Encoder()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    session = exported(model, (torch.randn(2, 16, 8),), dynamic, opset_version=opset)
    features = torch.randn(3, 16, 8)
    (output,) = run(session, features)
    torch.testing.assert_close(output, model(features), rtol=1e-5, atol=1e-5)


def test_dense_attention_exports() -> None:
    model = DeformableAttention1D(8, 2, head_dim=4).eval()
    session = exported(model, (torch.randn(2, 16, 8),))
    x = torch.randn(2, 16, 8)
    (output,) = run(session, x)
    torch.testing.assert_close(output, model(x), rtol=1e-5, atol=1e-5)


def test_a_patched_layer_of_transformers_exports() -> None:
    config = transformers.DeformableDetrConfig(num_feature_levels=2, **SMALL)
    layer = modeling_deformable_detr.DeformableDetrMultiscaleDeformableAttention(config, 4, 2)
    shapes = [(3, 4), (2, 2)]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, query: Tensor, value: Tensor, points: Tensor) -> Tensor:
            options = {"spatial_shapes": torch.tensor(shapes), "spatial_shapes_list": shapes}
            output: Tensor = self.layer(
                query, encoder_hidden_states=value, reference_points=points, **options
            )[0]
            return output

    inputs = torch.randn(1, 5, 32), torch.randn(1, 16, 32), torch.rand(1, 5, 2, 2)
    expected = Layer()(*inputs)
    patch()
    try:
        (output,) = run(exported(Layer(), inputs), *inputs)
    finally:
        unpatch()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_without_onnxscript_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnx.translation_table: needs onnxscript, .*\[onnx\]"):
        translation_table()
