"""The ops of deformable attention on a GPU, by kernels that are imported on first use."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat._checks import with_contiguous_rows
from pyfeat._sampling_inputs import SamplingInputs
from pyfeat._sampling_second import second_gradients


class _Kernels(NamedTuple):
    """Of a backend."""

    max_levels: int  # of one launch
    inputs: Callable[..., SamplingInputs]
    sums: Callable[[Any, torch.dtype], Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _kernels(backend: str) -> _Kernels:
    if backend == "cuda":
        from pyfeat._cuda_ops import sampling

        return _Kernels(
            sampling.MAX_LEVELS,
            SamplingInputs,
            sampling.sampled_sums,
            sampling.sampling_gradients,
        )
    from pyfeat._triton.sampling import sampled_sums
    from pyfeat._triton.sampling_arguments import MAX_LEVELS, Sampling
    from pyfeat._triton.sampling_gradient import sampling_gradients

    return _Kernels(MAX_LEVELS, Sampling, sampled_sums, sampling_gradients)


def forward(
    value: Tensor,
    shapes: Sequence[int],
    num_points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    border: bool,
    align_corners: bool,
    discrete: bool,
    softmax: bool,
    backend: str,
) -> Tensor:
    """Weighted sums (B, Q, H D) in the dtype of ``value``, each rounded once.

    Args:
        value: (B, S, H, D) float; copied unless its last axis is contiguous.
        shapes: Sizes of all levels, n for each, z before y before x.
        num_points: Points of every level, T in total.
        locations: (B, Q, H, T, n) float, x first.
        weights: (B, Q, H, T) float, logits with ``softmax``.
        border: Whether positions are clipped to the outermost cells.
        align_corners: Whether 0 and 1 are the centres of the outermost cells.
        discrete: Whether the one nearest cell is taken.
        softmax: Whether weights are the softmax of ``weights`` over all T points.
        backend: "cuda" or "triton".

    Raises:
        ValueError: If Triton gets a level with an axis of 2^24 cells (2^16 in three dimensions) or
            2^15 points, or CUDA 2^30 cells in all.

    Precision: sums in float32, in float64 for float64 values. Bit-identical between runs.
    Memory: the result; for more than 8 levels in Triton, 64 in CUDA, as much in the dtype of sums; in
    CUDA locations and weights once more if they are not of that dtype.
    """
    kernels, modes = _kernels(backend), (border, align_corners, discrete, softmax)
    with _device_of(value):
        parts, _ = _parts(kernels, value, shapes, num_points, locations, weights, modes)
        if len(parts) == 1:
            return kernels.sums(parts[0], value.dtype)
        sums = sum(kernels.sums(part, part.accumulator) for part in parts)
        return torch.as_tensor(sums).to(value.dtype)


def backward(value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by ``value``, ``locations`` and ``weights`` in their dtypes, (0,) if not needed.

    Args:
        value: As in ``forward``.
        arguments: All others of ``forward``; the gradient (B, Q, H D) by the sums; and whether those
            by values, by locations and by weights are needed.

    Precision: sums in float32, in float64 for float64 values, each rounded once. Additions to the
    gradient by values are in no fixed order, unless torch is asked for deterministic algorithms.
    Memory: gradients, those of the dtype of sums too; at most 128 MB and 16 bytes for each cell and
    head if additions are sorted.
    """
    shapes, num_points, locations, weights, *modes, backend = arguments[:9]
    grad_output, need_value, need_locations, need_weights = arguments[9:]
    kernels = _kernels(backend)
    with _device_of(value):
        parts, fused = _parts(kernels, value, shapes, num_points, locations, weights, modes)
        gradients = [
            kernels.gradients(
                part,
                grad_output.contiguous(),
                need_value=need_value,
                need_locations=need_locations,
                need_weights=need_weights,
            )
            for part in parts
        ]
        by_value, by_locations, by_weights = (
            each[0] if len(each) == 1 or each[0].ndim == 1 else torch.cat(each, dim)
            for each, dim in zip(zip(*gradients, strict=True), (1, 3, 3), strict=True)
        )
        if modes[3] and need_weights and not fused:
            a = weights.to(by_weights.dtype).softmax(dim=-1)
            by_weights = a * (by_weights - (a * by_weights).sum(dim=-1, keepdim=True))
        return by_value.to(value.dtype), by_locations, by_weights.to(weights.dtype)


def second(value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second derivatives, by plain torch: see ``second_gradients``, also for the last arguments.

    Raises:
        NotImplementedError: If weights are logits.
    """
    *points, softmax, _backend = arguments[:9]
    if softmax:
        message = "deform_attn: softmax must be False for second derivatives, got True"
        raise NotImplementedError(message)
    return second_gradients(value, *points, *arguments[9:])


def _parts(
    kernels: _Kernels,
    value: Tensor,
    shapes: Sequence[int],
    num_points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    modes: Sequence[bool],
) -> tuple[list[SamplingInputs], bool]:
    """The levels of each launch with their cells and points, and whether it takes the softmax."""
    ndim, most = locations.shape[4], kernels.max_levels
    levels = [tuple(shapes[at : at + ndim]) for at in range(0, len(shapes), ndim)]
    value = with_contiguous_rows(value)
    if len(levels) <= most:
        inputs = (locations.contiguous(), weights.contiguous())
        return [kernels.inputs(value, tuple(levels), tuple(num_points), *inputs, *modes)], True
    if modes[3]:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        weights = weights.to(dtype).softmax(dim=-1)
    first_cells = [0, *itertools.accumulate(math.prod(level) for level in levels)]
    first_points = [0, *itertools.accumulate(num_points)]
    parts = []
    for first in range(0, len(levels), most):
        last = min(first + most, len(levels))
        points = slice(first_points[first], first_points[last])
        part = kernels.inputs(
            value[:, first_cells[first] : first_cells[last]],
            tuple(levels[first:last]),
            tuple(num_points[first:last]),
            locations[:, :, :, points].contiguous(),
            weights[:, :, :, points].contiguous(),
            *modes[:3],
            False,
        )
        parts.append(part)
    return parts, False


def _device_of(value: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()
