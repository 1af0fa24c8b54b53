"""How kernels behave on a GPU: which run, on which device and stream, in graphs, and in what memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat._backends import BACKENDS, select_backend
from pyfeat._gpu import PAIR_OPS
from pyfeat.losses import clip_loss, siglip_loss
from tests.support_attention import SHAPES, make_inputs
from tests.support_gpu import (
    GPU_BACKENDS,
    Target,
    counted_launches,
    each_gpu_target,
    each_second_gpu,
    each_target,
    peak_beyond_inputs,
    why_skipped,
)

# Inputs on the CPU, and a call that takes them on any device.
Call = tuple[list[Tensor], Callable[..., Any]]


def call_of(op: str, backend: Any) -> Call:
    """One call of an op with gradients; ``Call`` returns a list of tensors."""
    if op == "knn":
        inputs = [torch.randn(65, 40), torch.randn(517, 40)]
        return inputs, lambda q, m: list(pyfeat.knn(q, m, 5, nonfinite="skip", backend=backend))
    if op == "deform_attn":
        made = make_inputs(SHAPES[2], queries=37).to(torch.float32)

        def attend(*tensors: Tensor) -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in tensors]
            shapes, counts = made.spatial_shapes, made.num_points
            out = pyfeat.deform_attn(
                leaves[0], shapes, *leaves[1:], num_points=counts, backend=backend
            )
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

        return list(made.tensors()), attend
    losses: dict[str, Callable[..., Tensor]] = {
        "clip_loss": lambda a, b: clip_loss(a, b, 0.5, backend=backend),
        "siglip_loss": lambda a, b: siglip_loss(a, b, 0.5, -1.0, backend=backend),
    }

    def learn(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = losses[op](*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return [torch.randn(131, 40), torch.randn(131, 40)], learn


# Those of which one call has gradients, ids, and a softplus between them.
OPS = ("knn", "deform_attn", "clip_loss", "siglip_loss")
each_op = pytest.mark.parametrize("op", OPS)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to the order of sums."""
    for x, y in zip(found, expected, strict=True):
        scale = float(y.abs().max()) if y.is_floating_point() else 0.0
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=1e-5, atol=1e-5 * scale)


# Which kernels run


@pytest.mark.parametrize("op", ["knn", "deform_attn", *PAIR_OPS])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_only_this_machine_stands_in_the_way_of_an_op(op: str, backend: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"{op}: backend '{backend}' does not") as caught:
        select_backend(op, backend, torch.zeros(2, 2))
    (reason,) = str(caught.value).partition(" (")[2].removesuffix(")").split(" | ")
    assert reason == f"{backend}: inputs are on cpu"


@each_gpu_target
@each_op
def test_the_backend_that_is_asked_for_runs(target: Target, op: str) -> None:
    inputs, call = call_of(op, target.backend)
    with counted_launches() as launched:
        call(*map(target, inputs))
    assert bool(launched) == (target.backend == "triton"), launched


@each_gpu_target
@each_op
def test_nothing_that_is_asked_for_is_as_good_as_the_best(target: Target, op: str) -> None:
    inputs, call = call_of(op, None)
    with counted_launches() as launched:
        call(*map(target, inputs))
    states: Any = pyfeat.info()["backends"]
    assert bool(launched) == (states["cuda"] != "available")


def test_a_required_backend_is_not_skipped() -> None:
    target = Target("triton", torch.device("cuda:0"))
    state: Any = pyfeat.info()["backends"]
    reason = why_skipped(target, torch.cuda.device_count(), "")
    assert (reason == "") == (state["triton"] == "available")
    if reason:
        assert reason == f"triton: {state['triton']}"
    assert why_skipped(target, 0, "cuda triton") == ""
    second = Target("triton", torch.device("cuda:1"))
    assert why_skipped(second, 1, "triton") != ""
    assert "reference" in BACKENDS


# Devices and streams


@each_target
@each_op
def test_a_call_repeats_itself(target: Target, op: str) -> None:
    inputs, call = call_of(op, target.backend)
    moved = [target(x) for x in inputs]
    assert_same(call(*moved), call_of(op, "reference")[1](*inputs))
    assert_same(call(*moved), call(*moved))


@each_second_gpu
@each_op
def test_the_device_of_the_tensors_counts_not_the_current_one(target: Target, op: str) -> None:
    inputs, call = call_of(op, target.backend)
    torch.cuda.set_device(0)
    found = call(*map(target, inputs))
    assert torch.cuda.current_device() == 0
    assert all(x.device == target.device for x in found)
    assert_same(found, call_of(op, "reference")[1](*inputs))


@each_gpu_target
@each_op
def test_kernels_run_on_the_current_stream(target: Target, op: str) -> None:
    inputs, call = call_of(op, target.backend)
    expected = call(*map(target, inputs))  # compiles what is compiled on first use
    moved = [torch.zeros_like(target(x)) for x in inputs]
    sources = [target(x) for x in inputs]
    torch.cuda.synchronize(target.device)
    stream = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        # Whoever does not wait for this stream reads zeros.
        for x, source in zip(moved, sources, strict=True):
            x.copy_(source)
        found = call(*moved)
    stream.synchronize()
    assert_same(found, expected)


@each_gpu_target
@pytest.mark.parametrize("op", ["knn", "deform_attn"])
def test_nothing_waits_for_the_device(target: Target, op: str) -> None:
    inputs, call = call_of(op, target.backend)
    moved = [target(x) for x in inputs]
    call(*moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_gpu_target
@each_op
def test_a_graph_replays_a_call_for_other_inputs(target: Target, op: str) -> None:
    inputs, call = call_of(op, target.backend)
    moved = [target(x) for x in inputs]
    side = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        call(*moved)
    torch.cuda.synchronize(target.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(*moved)
    others = [x.roll(1, dims=0) for x in inputs]
    for x, other in zip(moved, others, strict=True):
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize(target.device)
    assert_same(found, call_of(op, "reference")[1](*others))


# Memory


@pytest.mark.slow
@each_gpu_target
def test_a_search_takes_no_more_than_its_workspace(target: Target) -> None:
    queries = torch.randn(4_096, 384, device=target.device)
    memory = torch.randn(100_000, 384, device=target.device)

    def search() -> object:
        return pyfeat.knn(queries, memory, 9, backend=target.backend)

    search()
    outputs = 4_096 * 9 * (4 + 8)
    # Beside it, one flag for each feature while it is looked for NaN.
    assert peak_beyond_inputs(search, target.device) <= outputs + memory.numel() + (256 << 20)


@pytest.mark.slow
@each_gpu_target
def test_attention_takes_no_more_than_its_results(target: Target) -> None:
    shapes = [(100, 100), (50, 50), (25, 25), (13, 13)]
    made = make_inputs(shapes, batch=1, queries=13_294, heads=8, dim=32, num_points=4)
    leaves = [target(x.float()).requires_grad_() for x in made.tensors()]
    upstream = torch.randn(1, 13_294, 256, device=target.device)

    def attend() -> object:
        out = pyfeat.deform_attn(
            leaves[0], shapes, *leaves[1:], num_points=made.num_points, backend=target.backend
        )
        return out.detach(), torch.autograd.grad(out, leaves, upstream)

    torch.use_deterministic_algorithms(False)
    attend()
    results = sum(x.numel() * 4 for x in (*leaves, upstream))
    assert peak_beyond_inputs(attend, target.device) <= results + (16 << 20)


@pytest.mark.slow
@each_gpu_target
def test_a_memory_of_more_than_2_31_features_is_searched_to_its_end(target: Target) -> None:
    num_rows, dim = (1 << 23) + 77, 256
    free, _ = torch.cuda.mem_get_info(target.device)
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of device memory, got {free >> 30}")
    memory = torch.zeros(num_rows, dim, dtype=torch.bfloat16, device=target.device)
    rows = torch.tensor([5, (1 << 23) - 1, num_rows - 1], device=target.device)
    memory[rows] = torch.randn(3, dim, device=target.device).bfloat16()
    found = pyfeat.knn(memory[rows], memory, 1, nonfinite="skip", backend=target.backend)
    assert torch.equal(found.indices[:, 0], rows)
    assert not found.distances.any()
