"""Multi-scale deformable attention in one, two and three dimensions."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pyfeat import _sampling, reference
from pyfeat._backends import BACKENDS, Backend, select_backend
from pyfeat._checks import DTYPES, check_choice, dtype_name
from pyfeat._sampling import Levels

Padding = Literal["zeros", "border"]
Sampling = Literal["linear", "discrete"]

_OP = "deform_attn"
_AXES = {1: "x", 2: "x, y", 3: "x, y, z"}


def deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    padding: Padding = "zeros",
    align_corners: bool = False,
    sampling: Sampling = "linear",
    softmax: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Weighted sum of the values of every head at P fractional positions on each of L levels.

    For query q and head h it is :math:`\sum_{l,p} A_{lp}\, V_l(u_{lp})`, where :math:`V_l(u)` is the
    multilinear interpolation of level l between its :math:`2^n` cells around u, for n = 1, 2 or 3.
    Differentiable twice by values, locations and weights.

    Args:
        value: (B, S, H, D) float32, float64, float16 or bfloat16, the cells of all levels one after
            another, each with its last axis fastest; S is the number of cells, any D.
        spatial_shapes: The n sizes of each of the L levels in the order of the axes in memory:
            (height, width) in 2-D, (depth, height, width) in 3-D. As a tensor (L, n) it is copied to
            the host, which waits for a GPU.
        sampling_locations: (B, Q, H, L, P, n) float; the last axis is x, y, z, so the reverse of
            ``spatial_shapes``, as ``torch.nn.functional.grid_sample`` has it. 0 and 1 are the borders
            of a level, or with ``align_corners`` the centres of its first and last cells. Used in
            float32, in float64 where the values are: half a mantissa would move a point by up to 0.4
            cells on a level of 100.
        attention_weights: (B, Q, H, L, P) float, used in float32 or float64 likewise.
        num_points: Number of points of each level where they differ; locations are then
            (B, Q, H, T, n) and weights (B, Q, H, T), T their sum, those of the first level first.
        padding: Beyond the border a level is zero ("zeros"), or goes on as its last cell ("border").
        align_corners: Whether location p on an axis of N cells is p (N - 1), not p N - 1/2.
        sampling: "linear"; or "discrete", which takes the one cell int(p N + 1/2), clipped to the
            level, and has no gradient by the locations (RT-DETRv2).
        softmax: ``attention_weights`` are logits, whose softmax over all L P points of a query and head
            is taken on the way.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the best for the inputs.

    Returns:
        (B, Q, H D), dtype of ``value``.

    Raises:
        TypeError: If a dtype is not a float, or a size or number of points no integer.
        ValueError: If shapes or devices do not fit, or an option is unknown.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    A location that is NaN counts as out of range, infinities too (with border padding they lie on the
    border); a point out of range adds 0 and has no gradient, whatever its weight is. On a grid line the
    derivative is that to the right. Sums are in float32 (float64 for float64 values) and rounded once.

    Memory: O(inputs + outputs). On the CPU at most 16 MB beside, or the values of two heads for every
    thread if that is more, and of half-precision tensors, but for the values, copies in float32;
    results do not depend on the number of threads.

    Source: Zhu et al., Deformable DETR, ICLR 2021; Lv et al., RT-DETRv2, 2024.

    Examples:
        >>> import torch
        >>> value = torch.arange(6.0).reshape(1, 6, 1, 1)  # a level of 2 x 3
        >>> locations = torch.tensor([[0.5, 0.5]]).reshape(1, 1, 1, 1, 1, 2)
        >>> deform_attn(value, [(2, 3)], locations, torch.ones(1, 1, 1, 1, 1))
        tensor([[[2.5000]]])
    """
    check_choice(_OP, "padding", padding, ("zeros", "border"))
    check_choice(_OP, "sampling", sampling, ("linear", "discrete"))
    check_choice(_OP, "backend", backend, (None, *BACKENDS))
    _check_float("value", value, value, 4, "(B, S, H, D)")
    rank = 6 if num_points is None else 5
    layout = "L, P" if num_points is None else "T"
    _check_float("sampling_locations", sampling_locations, value, rank, f"(B, Q, H, {layout}, n)")
    _check_float("attention_weights", attention_weights, value, rank - 1, f"(B, Q, H, {layout})")
    sizes = _checked_shapes(spatial_shapes, sampling_locations.shape[-1], value.shape[1])
    counts = _checked_counts(num_points, sampling_locations, len(sizes))
    _check_points(value, sampling_locations, attention_weights, sum(counts))
    chosen = "" if value.device.type == "meta" else select_backend(_OP, backend, value)
    if chosen == "reference":
        return reference.deform_attn(
            value,
            sizes,
            sampling_locations,
            attention_weights,
            num_points=num_points,
            padding=padding,
            align_corners=align_corners,
            sampling=sampling,
            softmax=softmax,
        )
    levels = Levels(
        [size for shape in sizes for size in shape],
        counts,
        padding == "border",
        align_corners,
        sampling == "discrete",
        softmax,
        chosen,
    )
    if num_points is None:
        sampling_locations = sampling_locations.flatten(3, 4)
        attention_weights = attention_weights.flatten(3, 4)
    return _sampling.attend(value, sampling_locations, attention_weights, levels)


def _check_float(name: str, tensor: Tensor, value: Tensor, rank: int, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        message = f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}"
        raise TypeError(message)
    if tensor.dtype not in DTYPES:
        wanted = " or ".join(map(dtype_name, DTYPES))
        message = f"{_OP}: {name} must be {wanted}, got {dtype_name(tensor.dtype)}"
        raise TypeError(message)
    if tensor.ndim != rank:
        message = f"{_OP}: {name} must have shape {shape}, got {tuple(tensor.shape)}"
        raise ValueError(message)
    if tensor.device != value.device:
        message = f"{_OP}: {name} must be on {value.device}, got {tensor.device}"
        raise ValueError(message)


def _checked_shapes(
    spatial_shapes: Sequence[Sequence[int]] | Tensor, num_dims: int, num_cells: int
) -> list[tuple[int, ...]]:
    if num_dims not in _AXES:
        message = (
            f"{_OP}: sampling_locations must have 1, 2 or 3 coordinates on the last axis, "
            f"got {num_dims}"
        )
        raise ValueError(message)
    given: Any = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    if not isinstance(given, Sequence) or not all(_are_integers(shape) for shape in given):
        message = (
            f"{_OP}: spatial_shapes must hold {num_dims} integers for each level, got {given!r}"
        )
        raise TypeError(message)
    sizes = [tuple(shape) for shape in given]
    if any(len(shape) != num_dims or any(size < 0 for size in shape) for shape in sizes):
        message = (
            f"{_OP}: spatial_shapes must hold {num_dims} sizes of at least 0 for each level, as "
            f"sampling_locations have the coordinates {_AXES[num_dims]}, got {sizes}"
        )
        raise ValueError(message)
    total = 0
    for shape in sizes:
        cells = 1
        for size in shape:
            cells *= size
        total += cells
    if total != num_cells:
        message = (
            f"{_OP}: spatial_shapes must hold as many cells as value, S = {num_cells}, "
            f"got {sizes} with {total}"
        )
        raise ValueError(message)
    return sizes


def _are_integers(values: object) -> bool:
    return isinstance(values, Sequence) and all(
        isinstance(x, int | torch.SymInt | np.integer) for x in values
    )


def _checked_counts(
    num_points: Sequence[int] | None, locations: Tensor, num_levels: int
) -> list[int]:
    if num_points is None:
        if locations.shape[3] != num_levels:
            message = (
                f"{_OP}: sampling_locations must have L = {num_levels} levels on axis 3, "
                f"got {tuple(locations.shape)}"
            )
            raise ValueError(message)
        return [locations.shape[4]] * num_levels
    if not _are_integers(num_points):
        message = f"{_OP}: num_points must hold an integer for each level, got {num_points!r}"
        raise TypeError(message)
    counts = list(num_points)
    if len(counts) != num_levels or any(count < 0 for count in counts):
        message = (
            f"{_OP}: num_points must hold a number of at least 0 for each of {num_levels} levels, "
            f"got {counts}"
        )
        raise ValueError(message)
    return counts


def _check_points(value: Tensor, locations: Tensor, weights: Tensor, num_points: int) -> None:
    batch, _, heads, _ = value.shape
    layout = tuple(locations.shape[3:-1])
    if locations.shape[0] != batch or locations.shape[2] != heads:
        message = (
            f"{_OP}: sampling_locations must have shape ({batch}, Q, {heads}, ...) to go with value, "
            f"got {tuple(locations.shape)}"
        )
        raise ValueError(message)
    if len(layout) == 1 and layout[0] != num_points:
        message = (
            f"{_OP}: sampling_locations must have T = {num_points} points on axis 3, the sum of "
            f"num_points, got {tuple(locations.shape)}"
        )
        raise ValueError(message)
    if weights.shape != locations.shape[:-1]:
        message = (
            f"{_OP}: attention_weights must have shape {tuple(locations.shape[:-1])} to go with "
            f"sampling_locations, got {tuple(weights.shape)}"
        )
        raise ValueError(message)
