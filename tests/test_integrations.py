"""Deformable attention of other libraries, as they compute it and as this one does."""

import copy
import importlib
import math
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.deformable_detr import modeling_deformable_detr as detr
from transformers.models.rt_detr_v2 import modeling_rt_detr_v2

from pyfeat.attention import (
    DeformableEncoderLayer,
    MultiScaleDeformAttn,
    deform_attn,
    grid_points,
)
from pyfeat.integrations import mmcv
from pyfeat.integrations import transformers as integration
from pyfeat.integrations.transformers import patch, unpatch
from tests.support_detection import MODELS, SMALL, d_fine, deformable_detr, outputs_and_gradients

SHAPES = [(4, 6), (2, 3), (1, 2)]
NUM_CELLS = 24 + 6 + 2


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    unpatch()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of every call of this library's attention by a patched model."""
    made: list[dict[str, Any]] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        made.append(options)
        return deform_attn(*arguments, **options)

    monkeypatch.setattr(integration, "deform_attn", counted)
    return made


def modules_of(models: tuple[str, ...]) -> list[ModuleType]:
    return [importlib.import_module(f"transformers.models.{m}.modeling_{m}") for m in models]


def everything(module: ModuleType) -> dict[str, Any]:
    """Every attribute of a module and of its classes."""
    found = dict(vars(module))
    for name, kind in vars(module).items():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            found.update({f"{name}.{key}": value for key, value in vars(kind).items()})
    return found


def example(dtype: torch.dtype, points: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.randn(2, NUM_CELLS, 4, 8, dtype=dtype)
    locations = torch.rand(2, 5, 4, len(SHAPES), points, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.randn(2, 5, 4, len(SHAPES), points, dtype=dtype)
    return value, locations, weights


# Sums of float64 in another order, through the layers of a model and the squares of what it gives; and
# of gradients that are 0 on paper, such as that of a bias before a norm, what is left of large terms.
SAME, LEFT = 1e-9, 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_when_patched(name: str, calls: list[dict[str, Any]]) -> None:
    model = MODELS[name]().double().eval()
    images = torch.randn(2, 3, 64, 64).double()
    expected = outputs_and_gradients(model, images)
    assert any("sampling_offsets" in key for key in expected) or "discrete" in name
    assert not calls
    patch()
    for patched in (model, copy.deepcopy(model)):
        calls.clear()
        found = outputs_and_gradients(patched, images)
        assert calls
        assert all(c.get("sampling") == "discrete" for c in calls) == ("discrete" in name)
        assert found.keys() == expected.keys()
        scales = {k: x.where(x.isfinite(), 0.0).abs().max().item() for k, x in expected.items()}
        for key, value in expected.items():
            allowed = SAME * scales[key] + LEFT * max(scales.values())
            infinite = value.isinf()
            assert torch.equal(found[key].isinf(), infinite), key
            assert ((found[key] - value)[~infinite].abs() <= allowed).all(), key
    unpatch()
    calls.clear()
    again = outputs_and_gradients(model, images)
    assert not calls
    for key, value in expected.items():
        assert torch.equal(again[key], value), key


def test_deformable_detr_gives_the_same_boxes_and_trains_the_same_in_float32(
    calls: list[dict[str, Any]],
) -> None:
    model = deformable_detr(dropout=0.0).train()
    images, rate = torch.randn(2, 3, 64, 64), 0.01
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.3]])

    def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        model = copy.deepcopy(model)
        labels = [
            {"class_labels": torch.tensor([i]), "boxes": boxes.to(images.dtype)} for i in range(2)
        ]
        output = model(pixel_values=images, labels=labels)
        torch.autograd.backward(output.loss)
        found = {"boxes": output.pred_boxes.detach(), "loss": output.loss.detach()}
        found |= {
            f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None
        }
        torch.optim.SGD(model.parameters(), lr=rate).step()
        return found | {f"new {name}": p.detach() for name, p in model.named_parameters()}

    exact = step(copy.deepcopy(model).double(), images.double())
    before = step(model, images)
    patch()
    after = step(model, images)
    assert calls
    # Gradients that are 0 on paper, such as that of a bias before a norm, are what rounding leaves.
    largest = max(x.abs().max() for name, x in exact.items() if name.startswith("grad "))
    left = {"grad": largest, "new": rate * largest}
    for name, value in exact.items():
        allowed = 2 * (before[name] - value).abs().max()
        allowed = allowed + 2**-24 * (left.get(name.split()[0], 0.0) + value.abs().max())
        assert (after[name] - value).abs().max() <= allowed, name


def test_every_layer_and_function_of_transformers_computes_the_same() -> None:
    value, locations, weights = example(torch.float64)
    flat = (locations.flatten(3, 4), weights.flatten(3, 4))
    layers: dict[str, list[Tensor]] = {}

    def run(module: ModuleType) -> list[Tensor]:
        found = []
        if hasattr(module, "MultiScaleDeformableAttention"):
            layer = module.MultiScaleDeformableAttention()
            shapes = torch.tensor(SHAPES)
            starts = torch.tensor([0, 24, 30])
            found.append(layer(value, shapes, SHAPES, starts, locations, weights, 64))
        if hasattr(module, "multi_scale_deformable_attention"):
            found.append(module.multi_scale_deformable_attention(value, SHAPES, locations, weights))
        function = getattr(module, "multi_scale_deformable_attention_v2", None)
        if function is not None:
            for method in ("default", "discrete"):
                found.append(function(value, SHAPES, *flat, [3, 3, 3], method))
        return found

    models = patch()
    unpatch()
    expected = {module.__name__: run(module) for module in modules_of(models)}
    patch()
    for module in modules_of(models):
        layers[module.__name__] = run(module)
    assert sum(map(len, expected.values())) >= len(models)
    for name, outputs in expected.items():
        for mine, theirs in zip(layers[name], outputs, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_points_by_level_go_to_their_levels() -> None:
    value, locations, weights = example(torch.float64)
    arguments = (
        value,
        SHAPES,
        locations.flatten(3, 4)[:, :, :, :6],
        weights.flatten(3, 4)[..., :6],
    )
    expected = modeling_rt_detr_v2.multi_scale_deformable_attention_v2(*arguments, [3, 1, 2])
    patch()
    output = modeling_rt_detr_v2.multi_scale_deformable_attention_v2(*arguments, [3, 1, 2])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_patching_names_the_models_and_is_idempotent() -> None:
    first = patch()
    assert {"deformable_detr", "rt_detr", "rt_detr_v2", "mask2former", "oneformer"} <= set(first)
    assert {"grounding_dino", "d_fine"} <= set(first)
    state = everything(detr)
    assert patch() == first
    after = everything(detr)
    assert all(after[name] is value for name, value in state.items())


def test_unpatching_restores_every_attribute() -> None:
    models = patch()
    unpatch()
    before = {module.__name__: everything(module) for module in modules_of(models)}
    patch()
    changed = [
        f"{module.__name__}.{name}"
        for module in modules_of(models)
        for name, value in everything(module).items()
        if before[module.__name__].get(name) is not value
    ]
    assert len(changed) == len(models)  # nothing else was touched
    unpatch()
    for module in modules_of(models):
        after = everything(module)
        assert after.keys() == before[module.__name__].keys()
        assert all(after[name] is value for name, value in before[module.__name__].items())
    unpatch()  # does nothing


def test_a_model_made_while_patched_is_itself_again_afterwards(calls: list[dict[str, Any]]) -> None:
    patch()
    model = d_fine().double().eval()
    images = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        model(pixel_values=images)
        assert calls
        unpatch()
        calls.clear()
        model(pixel_values=images)
    assert not calls


def test_what_somebody_else_put_there_stays() -> None:
    original = modeling_rt_detr_v2.multi_scale_deformable_attention_v2
    patch()
    try:
        modeling_rt_detr_v2.multi_scale_deformable_attention_v2 = len
        unpatch()
        assert modeling_rt_detr_v2.multi_scale_deformable_attention_v2 is len
    finally:
        modeling_rt_detr_v2.multi_scale_deformable_attention_v2 = original


def test_threads_may_patch_at_once() -> None:
    patch()
    unpatch()
    original = detr.MultiScaleDeformableAttention.forward
    threads = [threading.Thread(target=patch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert detr.MultiScaleDeformableAttention.forward is not original
    unpatch()
    assert detr.MultiScaleDeformableAttention.forward is original


def test_without_transformers_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers.patch: needs transformers, .*\[hf\]"):
        patch()


def test_a_version_without_the_hook_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    other = ModuleType("transformers")
    other.__file__ = str(tmp_path / "__init__.py")
    other.__version__ = "9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", other)
    with pytest.raises(RuntimeError, match=r"transformers must have .* got version 9.9 without"):
        patch()
    assert not integration._replaced


def test_a_hook_with_other_arguments_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, value: Tensor, locations: Tensor) -> Tensor:
        return value

    patch()
    unpatch()
    original = modeling_rt_detr_v2.multi_scale_deformable_attention_v2
    mask2former = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    first = detr.MultiScaleDeformableAttention.forward
    monkeypatch.setattr(mask2former, "multi_scale_deformable_attention", forward)
    with pytest.raises(
        RuntimeError, match=r"must take \(value, .*\), got \(self, value, locations\)"
    ):
        patch()
    assert modeling_rt_detr_v2.multi_scale_deformable_attention_v2 is original
    assert detr.MultiScaleDeformableAttention.forward is first


def test_16_bit_models_keep_their_dtype() -> None:
    value, locations, weights = (x.bfloat16() for x in example(torch.float32))
    exact = detr.MultiScaleDeformableAttention().forward(
        value.double(), None, SHAPES, None, locations.double(), weights.double(), 64
    )
    patch()
    output = detr.MultiScaleDeformableAttention().forward(
        value, None, SHAPES, None, locations, weights, 64
    )
    assert output.dtype == torch.bfloat16
    # Summed in float32 and rounded once.
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4], ids=["points", "boxes"])
def test_weights_of_deformable_detr_load_and_give_its_outputs(size: int) -> None:
    config = transformers.DeformableDetrConfig(num_feature_levels=3, **SMALL)
    theirs = detr.DeformableDetrMultiscaleDeformableAttention(config, 4, 2).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    mine = MultiScaleDeformAttn(32, 4, 3, 2).double()
    mine.load_state_dict(theirs.state_dict())
    query, value = torch.randn(2, 5, 32).double(), torch.randn(2, NUM_CELLS, 32).double()
    points = torch.rand(2, 5, 3, size).double()
    mask = torch.rand(2, NUM_CELLS) < 0.2  # True is padding here, and False there
    expected, _ = theirs(
        query,
        attention_mask=~mask,
        encoder_hidden_states=value,
        reference_points=points,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
    )
    output = mine(query, points, value, SHAPES, padding_mask=mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_the_encoder_layer_is_that_of_deformable_detr() -> None:
    config = transformers.DeformableDetrConfig(num_feature_levels=3, **SMALL)
    theirs = detr.DeformableDetrEncoderLayer(config).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    mine = DeformableEncoderLayer(32, 4, 3, 4, ffn_dim=16).double().eval()
    names = {
        "self_attn_layer_norm": "norm1",
        "final_layer_norm": "norm2",
        "mlp.fc1": "linear1",
        "mlp.fc2": "linear2",
    }
    state = theirs.state_dict()
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    mine.load_state_dict(state)
    features, position = torch.randn(2, 2, NUM_CELLS, 32).double()
    ratios = torch.rand(2, 3, 2).double() / 2 + 0.5
    references = detr.DeformableDetrEncoder.get_reference_points(SHAPES, ratios, "cpu")
    own = grid_points(SHAPES, ratios, dtype=torch.float64)
    torch.testing.assert_close(own[:, :, None] * ratios[:, None], references.double())
    expected = theirs(
        features,
        torch.ones(2, NUM_CELLS, dtype=torch.bool),
        spatial_position_embeddings=position,
        reference_points=references,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=SHAPES,
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    output = mine(features, SHAPES, position=position, reference_points=references)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)


def starts_of(shapes: list[tuple[int, int]]) -> Tensor:
    sizes = [math.prod(shape) for shape in shapes]
    return torch.tensor([sum(sizes[:level]) for level in range(len(sizes))])


def test_the_function_of_mmcv_is_that_of_its_reference() -> None:
    arguments = [x.requires_grad_() for x in example(torch.float64)]
    value, locations, weights = arguments
    shapes = torch.tensor(SHAPES)
    expected = detr.MultiScaleDeformableAttention().forward(
        value, shapes, SHAPES, None, locations, weights, 64
    )
    expected_gradients = torch.autograd.grad(expected.square().sum(), arguments)
    for step in (64, 1, 7):
        output = mmcv.multi_scale_deformable_attn(
            value, shapes, starts_of(SHAPES), locations, weights, step
        )
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(output.square().sum(), arguments)
        torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-10)


def test_the_function_of_mmcv_refuses_starts_of_other_shapes() -> None:
    value, locations, weights = example(torch.float32)
    for wrong in ([0, 24, 31], [0, 24], [24, 30, 32]):
        with pytest.raises(ValueError, match=r"value_level_start_index must be \[0, 24, 30\]"):
            mmcv.multi_scale_deformable_attn(
                value, torch.tensor(SHAPES), torch.tensor(wrong), locations, weights
            )
