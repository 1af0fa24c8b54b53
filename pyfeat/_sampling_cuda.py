"""The ops of deformable attention on a GPU, by kernels in Triton, imported on first use."""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyfeat._checks import with_contiguous_rows
from pyfeat._sampling_second import second_gradients

if TYPE_CHECKING:
    from pyfeat._triton.sampling_arguments import Sampling


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

    Raises:
        ValueError: If a level has an axis of 2^24 cells (2^16 in three dimensions) or 2^15 points.

    Precision: sums in float32, in float64 for float64 values. Bit-identical between runs.
    Memory: the result, and for more than 8 levels as much in the dtype of sums.
    """
    from pyfeat._triton.sampling import sampled_sums

    with _device_of(value):
        modes = (border, align_corners, discrete, softmax)
        parts, _ = _parts(value, shapes, num_points, locations, weights, modes)
        if len(parts) == 1:
            return sampled_sums(parts[0], value.dtype)
        sums = sum(sampled_sums(part, part.accumulator) for part in parts)
        return torch.as_tensor(sums).to(value.dtype)


def backward(
    value: Tensor,
    shapes: Sequence[int],
    num_points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    border: bool,
    align_corners: bool,
    discrete: bool,
    softmax: bool,
    grad_output: Tensor,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by ``value``, ``locations`` and ``weights`` in their dtypes, (0,) if not needed.

    Args:
        value: As in ``forward``, as are all up to ``softmax``.
        shapes: See above.
        num_points: See above.
        locations: See above.
        weights: See above.
        border: See above.
        align_corners: See above.
        discrete: See above.
        softmax: See above.
        grad_output: (B, Q, H D), by the sums.
        need_value: Whether the first gradient is needed.
        need_locations: Whether the second is.
        need_weights: Whether the third is.

    Precision: sums in float32, in float64 for float64 values, each rounded once. Additions to the
    gradient by values are in no fixed order, unless torch is asked for deterministic algorithms.
    Memory: gradients, that by values in the dtype of sums too; at most 128 MB and 16 bytes for each
    cell and head if additions are sorted.
    """
    from pyfeat._triton.sampling_gradient import sampling_gradients

    with _device_of(value):
        modes = (border, align_corners, discrete, softmax)
        parts, fused = _parts(value, shapes, num_points, locations, weights, modes)
        gradients = [
            sampling_gradients(
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
        if softmax and need_weights and not fused:
            a = weights.to(by_weights.dtype).softmax(dim=-1)
            by_weights = a * (by_weights - (a * by_weights).sum(dim=-1, keepdim=True))
        return by_value.to(value.dtype), by_locations, by_weights.to(weights.dtype)


def second(
    value: Tensor,
    shapes: Sequence[int],
    num_points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    border: bool,
    align_corners: bool,
    discrete: bool,
    softmax: bool,
    *gradients: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second derivatives, by plain torch: see ``second_gradients``, also for ``gradients``.

    Raises:
        NotImplementedError: If weights are logits.
    """
    if softmax:
        message = "deform_attn: softmax must be False for second derivatives, got True"
        raise NotImplementedError(message)
    modes = (border, align_corners, discrete)
    return second_gradients(value, shapes, num_points, locations, weights, *modes, *gradients)


def _parts(
    value: Tensor,
    shapes: Sequence[int],
    num_points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    modes: tuple[bool, bool, bool, bool],
) -> tuple[list["Sampling"], bool]:
    """The levels of each launch with their cells and points, and whether it takes the softmax."""
    from pyfeat._triton.sampling_arguments import MAX_LEVELS, Sampling

    ndim = locations.shape[4]
    levels = [tuple(shapes[at : at + ndim]) for at in range(0, len(shapes), ndim)]
    value = with_contiguous_rows(value)
    if len(levels) <= MAX_LEVELS:
        inputs = (locations.contiguous(), weights.contiguous())
        return [Sampling(value, tuple(levels), tuple(num_points), *inputs, *modes)], True
    if modes[3]:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        weights = weights.to(dtype).softmax(dim=-1)
    first_cells = [0, *itertools.accumulate(math.prod(level) for level in levels)]
    first_points = [0, *itertools.accumulate(num_points)]
    parts = []
    for first in range(0, len(levels), MAX_LEVELS):
        last = min(first + MAX_LEVELS, len(levels))
        points = slice(first_points[first], first_points[last])
        part = Sampling(
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
