"""What is particular to the CUDA kernels of deformable attention; see test_gpu_sampling.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import _sampling, _sampling_cpu
from pyfeat._sampling_inputs import SamplingInputs
from tests.support_attention import SHAPES, Inputs, make_inputs
from tests.support_cuda import EMULATION
from tests.support_sampling import Kernels, assert_right, kernels_of, reference_all


@pytest.fixture
def kernels() -> Kernels:
    return kernels_of("cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        *((4, torch.float32), (12, torch.float32), (136, torch.float32)),
        *((8, torch.bfloat16), (24, torch.bfloat16), (8, torch.float16), (12, torch.float16)),
    ],
)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_channels_are_read_16_bytes_at_a_time(
    ndim: int, dim: int, dtype: torch.dtype, kernels: Kernels
) -> None:
    shapes = SHAPES[ndim][:2]
    inputs = make_inputs(shapes, batch=1, queries=3, heads=2, dim=dim, num_points=[2, 1])
    assert_right(kernels, inputs, dtype, softmax=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_begin_at_16_bytes_give_the_same_sums(
    dtype: torch.dtype, kernels: Kernels
) -> None:
    inputs = make_inputs([(3, 2)], batch=1, queries=3, heads=2, dim=8).to(dtype, torch.float32)
    room = torch.empty(inputs.value.numel() + 1, dtype=dtype, device=kernels.device)
    shifted = room[1:].view(inputs.value.shape).copy_(inputs.value)
    assert shifted.data_ptr() % 16 != 0
    moved = inputs.of(shifted, *inputs.tensors()[1:])
    assert torch.equal(kernels.sums(moved), kernels.sums(inputs))
    grad_output = torch.randn(1, 3, 16).to(dtype)
    expected = kernels.gradients(inputs, grad_output)
    places = torch.randn(49, device=kernels.device).to(dtype)
    shifted_grad = places[1:].view(1, 3, 16).copy_(grad_output)
    found = kernels.gradients(moved, shifted_grad)
    found += kernels.gradients(inputs, shifted_grad)
    for a, b in zip(found, 2 * expected, strict=True):
        assert torch.allclose(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes", [[(5, 9), (0, 3), (2, 3)], [(3, 3, 3), (1, 2, 1)]], ids=["2-D", "3-D"]
)
def test_queries_that_are_cells_give_the_same_bits_in_any_order(
    shapes: list[tuple[int, ...]], kernels: Kernels
) -> None:
    num_cells = sum(math.prod(shape) for shape in shapes)
    more = make_inputs(shapes, batch=1, queries=num_cells + 1, heads=2, num_points=2)
    more = more.to(torch.float32)
    value, locations, weights = more.tensors()
    cells = more.of(value, locations[:, :-1], weights[:, :-1])
    in_order, tiled = kernels.sums(more), kernels.sums(cells)
    assert not tiled.isnan().any()
    assert torch.equal(tiled, in_order[:, :-1])
    grad_output = torch.randn(1, num_cells + 1, 8)
    whole = kernels.gradients(more, grad_output, (False, True, True))
    parts = kernels.gradients(cells, grad_output[:, :-1], (False, True, True))
    for a, b in zip(parts[1:], whole[1:], strict=True):
        assert torch.equal(a, b[:, :-1])


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_corner_out_of_range_takes_no_part_whatever_the_weight(
    ndim: int, kernels: Kernels
) -> None:
    inputs = make_inputs([(2,) * ndim], batch=1, queries=2, heads=1, num_points=1)
    inputs = inputs.to(torch.float32)
    inputs.value.abs_().add_(1.0)
    inputs.sampling_locations[:, 0] = 0.0  # half a cell beyond the first one
    inputs.sampling_locations[:, 1] = 1.0
    inputs.attention_weights.fill_(math.inf)
    assert (kernels.sums(inputs) == math.inf).all()
    grad_output = torch.ones(1, 2, inputs.value.shape[3])
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        by_value = kernels.gradients(inputs, grad_output, (True, False, False))[0]
        assert (by_value[0, [0, -1]] == math.inf).all()
        assert not by_value[0, 1:-1].any()


def crowded(queries: int, inside: int, *, cells: int = 1, heads: int = 1) -> Inputs:
    """One or two cells, in which all points of the first ``inside`` queries lie."""
    inputs = make_inputs([(cells,)], batch=1, queries=queries, heads=heads, dim=4, num_points=7)
    inputs.sampling_locations[:, :inside] = 0.5
    inputs.sampling_locations[:, inside:] = 7.0
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "inside"), [(40, 40), (75, 75), (400, 60)])
def test_terms_of_a_crowded_cell_are_sorted_in_windows(
    queries: int, inside: int, kernels: Kernels
) -> None:
    # 280 terms, 525, and 420 whose numbers all are among the first 840 of 5,600.
    assert_right(kernels, crowded(queries, inside), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "heads"), [(40, 2), (400, 1)])
def test_terms_at_the_edges_of_windows_are_added_once(
    queries: int, heads: int, kernels: Kernels
) -> None:
    # Cells have even and odd numbers. Of 280 terms of each cell and head, windows end at 513, which one
    # cell of the first head has, and at 1,026, which the other cell of the second one has. The 420 of
    # each cell whose numbers are among the first 840 of 5,600 do not fit at first, side by side.
    inputs = crowded(queries, min(queries, 60), cells=2, heads=heads)
    assert_right(kernels, inputs, torch.float32)


@pytest.mark.slow
def test_no_order_of_threads_changes_what_is_sorted(kernels: Kernels) -> None:
    if EMULATION is None:
        pytest.skip("there is a GPU, which has orders of its own")
    inputs = crowded(75, 75).to(torch.float32)
    grad_output = torch.randn(1, 75, 4) * torch.logspace(-6, 6, 75)[None, :, None]
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = [kernels.sums(inputs), *kernels.gradients(inputs, grad_output)]
    with EMULATION.device(backwards=True):
        again = [kernels.sums(inputs), *kernels.gradients(inputs, grad_output)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = reference_all(inputs.to(torch.float64), grad_output)[1]
    assert torch.allclose(first[1].double(), exact, rtol=1e-5)


def test_more_levels_than_the_arguments_of_a_kernel_hold_are_refused(kernels: Kernels) -> None:
    from pyfeat import _cuda
    from pyfeat._cuda_ops import sampling

    inputs = make_inputs([(1,)] * (_cuda.MAX_LEVELS + 1), batch=1, queries=1, num_points=1)
    value, shapes, num_points, *rest = kernels.arguments(inputs.to(torch.float32))
    levels = tuple((size,) for size in shapes)
    whole = SamplingInputs(value, levels, tuple(num_points), *rest[:-1])
    with pytest.raises(ValueError, match="deform_attn: a launch takes at most 64 levels, got 65"):
        sampling.sampled_sums(whole, torch.float32)
    assert_right(kernels, inputs, torch.float32)


def test_the_backend_that_was_chosen_runs_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Recorded:
        @staticmethod
        def forward(value: Tensor, *arguments: Any) -> Tensor:
            seen.append(arguments[8])
            return _sampling_cpu.forward(value, *arguments)

        @staticmethod
        def backward(value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
            seen.append(arguments[8])
            return _sampling_cpu.backward(value, *arguments)

    monkeypatch.setattr(_sampling, "_implementation", lambda value: Recorded)
    monkeypatch.setattr("pyfeat.attention._op.select_backend", lambda *given: given[1])
    inputs = make_inputs([(3,)], batch=1, queries=2).to(torch.float32)
    inputs.value.requires_grad_()
    out = pyfeat.deform_attn(*inputs[:4], num_points=inputs.num_points, backend="triton")
    torch.autograd.backward(out.sum())
    assert seen == ["triton", "triton"]
