"""Deformable attention as torch's compilers, autocast and transforms see it, and the memory it takes."""

import os
import subprocess
import sys
from typing import Any

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
    attend,
    gradients_of,
    make_inputs,
    with_gradients,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def flat_arguments(inputs: Inputs, mode: Mode) -> tuple[Any, ...]:
    """Those of the registered op."""
    return (
        inputs.value,
        [size for shape in inputs.spatial_shapes for size in shape],
        inputs.num_points,
        inputs.sampling_locations,
        inputs.attention_weights,
        mode.padding == "border",
        mode.align_corners,
        mode.sampling == "discrete",
        mode.softmax,
        "cpu",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(MODES[0], torch.float64), (MODES[2], torch.float32), (MODES[4], torch.bfloat16)],
    ids=str,
)
def test_torch_sees_well_formed_operators(mode: Mode, dtype: torch.dtype) -> None:
    inputs = make_inputs(SHAPES[2]).to(dtype, torch.promote_types(dtype, torch.float32))
    for x in inputs.tensors():
        x.requires_grad_()
    arguments = flat_arguments(inputs, mode)
    torch.library.opcheck(torch.ops.pyfeat.deform_attn.default, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    grad_output = torch.randn(2, 5, 8).to(dtype)
    for wanted in [(True, True, True), (True, False, False), (False, True, True)]:
        torch.library.opcheck(
            torch.ops.pyfeat.deform_attn_backward.default, (*detached, grad_output, *wanted)
        )
    torch.library.opcheck(
        torch.ops.pyfeat.deform_attn_second.default,
        (*detached, grad_output, *(torch.randn_like(x) for x in inputs.tensors())),
    )


@pytest.mark.parametrize("nothing", EMPTY)
def test_torch_sees_a_well_formed_operator_of_nothing(nothing: str) -> None:
    inputs = EMPTY[nothing]().to(torch.float32)
    torch.library.opcheck(
        torch.ops.pyfeat.deform_attn.default,
        flat_arguments(inputs, Mode()),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("laid_out", ["contiguous", "strided"])
@pytest.mark.parametrize("mode", [MODES[0], MODES[2], MODES[5]], ids=str)
def test_torch_compiles_value_and_gradients_in_one_graph(mode: Mode, laid_out: str) -> None:
    inputs = make_inputs(SHAPES[2]).to(torch.float32)
    if laid_out == "strided":
        inputs = inputs.of(
            *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs.tensors())
        )
    grad_output = torch.randn(2, 5, 8)

    def doubled(inputs: Inputs, mode: Mode) -> Tensor:
        return 2 * attend(inputs, mode)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled, inputs, mode, grad_output)
    expected = with_gradients(doubled, inputs, mode, grad_output)
    for mine, true in zip(found, expected, strict=True):
        assert mine.equal(true)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
def test_inductor_compiles_value_and_gradients_in_one_graph() -> None:
    inputs = make_inputs(SHAPES[3]).to(torch.float32)
    grad_output = torch.randn(2, 5, 8)

    def module(inputs: Inputs, mode: Mode) -> Tensor:
        value, locations, weights = inputs.tensors()
        return attend(inputs.of(value * 2, locations.clamp(0, 1), weights.softmax(-1)), mode) * 2

    compiled = torch.compile(module, fullgraph=True)
    for mine, true in zip(
        with_gradients(compiled, inputs, Mode(), grad_output),
        with_gradients(module, inputs, Mode(), grad_output),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)


def test_other_numbers_of_queries_and_batches_need_no_other_graph() -> None:
    graphs = []

    def count(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for batch, queries in [(3, 5), (7, 8), (9, 11)]:  # no size of another axis
        inputs = make_inputs(SHAPES[2], batch=batch, queries=queries).to(torch.float32)
        assert compiled(inputs, Mode()).equal(attend(inputs, Mode()))
    assert len(graphs) == 1


class Attention(torch.nn.Module):
    """Over two levels of fixed sizes."""

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return pyfeat.deform_attn(
            value, SHAPES[2], locations, weights, num_points=[3, 3], padding="border", softmax=True
        )


def test_torch_exports_it_for_any_number_of_queries() -> None:
    inputs = make_inputs(SHAPES[2]).to(torch.float32)
    queries = torch.export.Dim("queries", min=2, max=1000)
    exported = torch.export.export(
        Attention(),
        inputs.tensors(),
        dynamic_shapes={"value": None, "locations": {1: queries}, "weights": {1: queries}},
    )
    assert "pyfeat.deform_attn.default" in str(exported.graph)
    more = make_inputs(SHAPES[2], queries=23).to(torch.float32)
    assert exported.module()(*more.tensors()).equal(Attention()(*more.tensors()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_under_autocast_locations_keep_their_precision(dtype: torch.dtype) -> None:
    """A linear layer there gives 16-bit values and weights; what it is given stays as it is."""
    inputs = make_inputs(SHAPES[2], dim=16).to(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    with torch.autocast("cpu", dtype=dtype):
        value = torch.nn.functional.linear(inputs.value, torch.eye(16))
        assert value.dtype == dtype
        out = attend(inputs.of(value, *inputs.tensors()[1:]), Mode())
    found = gradients_of(out, leaves, torch.ones_like(out))
    narrow = inputs.of(inputs.value.detach().to(dtype), *inputs.tensors()[1:])
    expected = attend(narrow, Mode())
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.0)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()
        assert gradient.any()


PEAK = """
import torch, pyfeat
torch.set_num_threads(2)

def peak():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10

def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

shapes = [(100, 134), (50, 67), (25, 34), (13, 17)]
S = sum(h * w for h, w in shapes)
dtype = torch.{dtype}
value = torch.randn(1, S, 8, 32).to(dtype).requires_grad_({grad})
locations = torch.rand(1, S, 8, 4, 4, 2).requires_grad_({grad})
weights = torch.randn(1, S, 8, 4, 4).to(dtype).requires_grad_({grad})
grad_output = torch.ones(1, S, 256, dtype=dtype)
few = [x[:, :16].detach().requires_grad_({grad}) for x in (locations, weights)]
warm = pyfeat.deform_attn(value, shapes, *few, softmax=True)
if {grad}:
    torch.autograd.grad(warm, (value, *few), grad_output[:, :16])
reset()
before = peak()
out = pyfeat.deform_attn(value, shapes, locations, weights, softmax=True)
held = out.nbytes
if {grad}:
    gradients = torch.autograd.grad(out, (value, locations, weights), grad_output)
    held += sum(x.nbytes for x in gradients)
print(peak() - before - held)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_an_encoder_takes_no_memory_beyond_the_result_and_gradients(grad: bool, dtype: str) -> None:
    """The gathered corners of 17,821 queries alone would take 1.2 GB.

    What is summed in float32 and then rounded is there in float32 too.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(grad=grad, dtype=dtype)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )
    values, weights = 17_821 * 256, 17_821 * 128
    widened = (2 * values + 2 * weights if grad else values + weights) if dtype != "float32" else 0
    assert int(done.stdout) <= (16 << 20) + 4 * widened
