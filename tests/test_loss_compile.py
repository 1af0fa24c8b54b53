"""The losses compiled into one graph against themselves."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.losses import CLIPLoss, InfoNCELoss, NTXentLoss, SigLIPLoss, SupConLoss

pytestmark = pytest.mark.slow

IDS = torch.arange(12) // 2
PAIRS = torch.arange(12) % 6  # one other row of each label
TRIPLES = torch.arange(12) % 4
EXTRA = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))

# A module, and arguments of a batch.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "InfoNCE": (InfoNCELoss, {}),
    "InfoNCE normalized": (lambda: InfoNCELoss(0.3, normalize=True, reduction="none"), {}),
    "InfoNCE symmetric": (lambda: InfoNCELoss(symmetric=True, reduction="sum"), {}),
    "extra keys": (InfoNCELoss, {"extra_keys": EXTRA}),
    "targets": (InfoNCELoss, {"targets": torch.arange(12).flip(0)}),
    "spread targets": (InfoNCELoss, {"targets": torch.rand(12, 12)}),
    "ignored ids": (InfoNCELoss, {"query_ids": IDS, "key_ids": IDS}),
    "positive ids": (
        lambda: InfoNCELoss(same_ids="positive", symmetric=True),
        {"query_ids": IDS, "key_ids": IDS},
    ),
    "log probabilities": (InfoNCELoss, {"key_log_probabilities": -torch.rand(12)}),
    "hard negatives": (
        lambda: InfoNCELoss(hard_negative_beta=0.5, positive_prior=0.1),
        {"query_ids": IDS, "key_ids": IDS},
    ),
    "NTXent": (NTXentLoss, {}),
    "NTXent with hard negatives": (lambda: NTXentLoss(hard_negative_beta=0.5), {}),
    "SupCon of pairs": (SupConLoss, {"labels": PAIRS}),
    "SupCon of triples": (SupConLoss, {"labels": TRIPLES}),
    "SupCon inside": (lambda: SupConLoss(average="in"), {"labels": TRIPLES}),
    "CLIP": (CLIPLoss, {}),
    "CLIP of captions": (CLIPLoss, {"image_ids": IDS, "text_ids": IDS}),
    "SigLIP": (SigLIPLoss, {}),
    "SigLIP of captions": (SigLIPLoss, {"image_ids": IDS, "text_ids": IDS}),
    "CLIP beyond the maximum": (lambda: with_scale(CLIPLoss(), 120.0), {}),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def with_scale(module: CLIPLoss, scale: float) -> CLIPLoss:
    with torch.no_grad():
        module.logit_scale.fill_(math.log(scale))
    return module


def features(rows: int = 12) -> list[Tensor]:
    return [nn.functional.normalize(torch.randn(rows, 8), dim=1) for _ in range(2)]


def with_gradients(
    loss: Callable[..., Tensor], module: nn.Module, inputs: list[Tensor], arguments: dict[str, Any]
) -> list[Tensor]:
    """The loss, gradients of its sum by features and parameters, and what becomes of parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    value = loss(*leaves, **arguments)
    value.sum().backward()  # type: ignore[no-untyped-call]
    found = [x.grad for x in (*leaves, *module.parameters()) if x.grad is not None]
    return [x.detach().clone() for x in (value, *found, *module.parameters())]


def assert_the_same(
    compiled: Callable[..., Tensor],
    module: nn.Module,
    inputs: list[Tensor],
    arguments: dict[str, Any],
) -> None:
    eager = with_gradients(module, module, inputs, arguments)
    for ours, true in zip(with_gradients(compiled, module, inputs, arguments), eager, strict=True):
        assert ours.dtype == true.dtype
        # Without knowing that positives are single, losses keep fewer digits; and sums are fused.
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_module_compiles_into_one_graph(case: str) -> None:
    make, arguments = CASES[case]
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = features()[:1] if isinstance(module, SupConLoss) else features()
    assert_the_same(compiled, module, inputs, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_is_generated_for_what_lies_around_the_products(dtype: torch.dtype) -> None:
    module = CLIPLoss(normalize=True)
    compiled = torch.compile(module, fullgraph=True)
    inputs = [x.to(dtype) for x in features()]
    found = with_gradients(compiled, module, inputs, {})
    for ours, true in zip(found, with_gradients(module, module, inputs, {}), strict=True):
        eps = torch.finfo(true.dtype).eps
        torch.testing.assert_close(ours, true, rtol=4 * eps, atol=8 * eps)


def test_batches_of_other_sizes_take_the_same_graph() -> None:
    module = InfoNCELoss()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    for rows in (12, 7, 31):
        ids = torch.arange(rows) // 2
        assert_the_same(compiled, module, features(rows), {"query_ids": ids, "key_ids": ids})
    assert len(graphs) == 1


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_keys": EXTRA / 0.0}, r"extra_keys must be finite, got NaN or infinity in row 0"),
        ({"targets": torch.arange(12) + 1}, r"targets must be in \[0, 12\), got 1 to 12"),
        (
            {"targets": -torch.eye(12)},
            r"targets must be at least 0 and finite, got -1\.0 to -?0\.0",
        ),
        (
            {"key_log_probabilities": torch.zeros(12).log()},
            r"key_log_probabilities must be finite, got -inf",
        ),
        (
            {"temperature": torch.tensor(math.nan)},
            r"temperature must be positive and finite, got nan",
        ),
    ],
    ids=["features", "targets", "weights", "probabilities", "temperature"],
)
def test_bad_values_are_named_by_a_graph_too(
    arguments: dict[str, Any], message: str, trains: bool
) -> None:
    a, b = features()
    compiled = torch.compile(InfoNCELoss(), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=f"info_nce: {message}"):
        compiled(a.requires_grad_(trains), b, **arguments)


def test_metrics_are_those_of_the_loss_itself() -> None:
    module, a = SupConLoss(return_metrics=True), features()[0]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss, metrics = module(a, TRIPLES)
    found, found_metrics = compiled(a, TRIPLES)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(tuple(found_metrics), tuple(metrics), rtol=1e-5, atol=2e-6)


def test_autocast_changes_nothing_in_a_graph() -> None:
    module = CLIPLoss()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def loss(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = compiled(*x)
        return value

    assert_the_same(loss, module, features(), {})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("check_all_finite", (EXTRA, "op", "x")),
        ("check_scalar", (torch.tensor(2.0), "op", "x", True)),
        ("check_columns", (IDS, 12, "op")),
        ("check_weights", (torch.rand(3, 4), "op")),
        ("check_bias", (torch.rand(4), "op", "name")),
        ("places_of", (IDS.flip(0),)),
        ("places_of", (torch.stack([IDS, TRIPLES], dim=1),)),
    ],
)
def test_what_a_graph_takes_as_it_is_passes_the_checks_of_torch(
    name: str, arguments: tuple[Any, ...]
) -> None:
    op = getattr(torch.ops.pyfeat, name).default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
