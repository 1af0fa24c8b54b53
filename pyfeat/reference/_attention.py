"""Deformable attention by gathers of every corner of every point."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    padding: str = "zeros",
    align_corners: bool = False,
    sampling: str = "linear",
    softmax: bool = False,
) -> Tensor:
    """Weighted sums (B, Q, H D) of values sampled at fractional positions of L levels.

    A location p in a level of N cells along an axis lies at ``u = p N - 1/2``, with
    ``align_corners`` at ``u = p (N - 1)``. With ``i = floor(u)`` and ``t = u - i`` the sample is, in
    n dimensions, the sum over the corners e of {0, 1}^n of ``prod_j (e_j t_j + (1 - e_j)(1 - t_j))``
    times the value of cell ``i + e``. Cells outside are 0 under "zeros"; under "border" u is first
    clipped to [0, N - 1], without a gradient at and beyond either end. "discrete" sampling takes the
    cell ``int(p N + 1/2)``, clipped to the border, whatever the padding and the corners.

    A point counts only if its location is not NaN, its level has a cell and, under zero padding,
    ``-1 <= u < N`` along every axis. Of any other, not even a weight that is NaN comes through.

    Computes in the widest of the arguments' dtypes, at least float32; can be differentiated twice.

    Args:
        value: (B, S, H, D), the cells of level 0 first, in the order of ``spatial_shapes``.
        spatial_shapes: L tuples of n sizes, or (L, n).
        sampling_locations: (B, Q, H, L, P, n), (B, Q, H, T, n) with ``num_points``; x first, which is
            the last of a level's sizes.
        attention_weights: (B, Q, H, L, P), (B, Q, H, T) with ``num_points``.
        num_points: Points of every level, T in total.
        padding: zeros or border.
        align_corners: Whether 0 and 1 are the centres of the outermost cells, not their outer edges.
        sampling: linear or discrete.
        softmax: Whether the weights are the softmax of ``attention_weights`` over all T points.
    """
    shapes = [list(map(int, shape)) for shape in spatial_shapes]  # L lists of n
    if num_points is None:
        num_points = [sampling_locations.shape[4]] * len(shapes)
        sampling_locations = sampling_locations.flatten(3, 4)  # [B, Q, H, T, n]
        attention_weights = attention_weights.flatten(3, 4)  # [B, Q, H, T]
    ndim = sampling_locations.shape[-1]
    dtype = torch.float32
    for tensor in (value, sampling_locations, attention_weights):
        dtype = torch.promote_types(dtype, tensor.dtype)
    v, p, a = value.to(dtype), sampling_locations.to(dtype), attention_weights.to(dtype)
    if softmax:
        a = a.softmax(dim=-1)

    # Of the level of every point: sizes and steps along x, y, z, and its first cell.
    level_of = [level for level, count in enumerate(num_points) for _ in range(count)]
    levels = torch.tensor(level_of, dtype=torch.int64, device=v.device)  # [T]
    sizes = torch.tensor(shapes, device=v.device).view(-1, ndim).flip(1)[levels]  # [T, n]
    steps = torch.cat([torch.ones_like(sizes[:, :1]), sizes[:, :-1].cumprod(dim=1)], dim=1)
    cells = [math.prod(shape) for shape in shapes]
    firsts = torch.tensor([0, *itertools.accumulate(cells)], device=v.device)[levels]  # [T]

    if sampling == "discrete":
        corners, counted = _nearest(p, sizes)
    else:
        corners, counted = _linear(p, sizes, padding, align_corners)
    sampled = v.new_zeros(())
    padded = torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 1)).transpose(1, 2)  # [B, H, S + 1, D]
    for corner in itertools.product(*corners):
        cell = torch.stack([index for index, _ in corner], dim=-1)  # [B, Q, H, T, n]
        weight = functools.reduce(torch.mul, [share for _, share in corner])  # [B, Q, H, T]
        inside = ((cell >= 0) & (cell < sizes)).all(dim=-1) & counted
        index = (firsts + (cell * steps).sum(dim=-1)).where(inside, value.shape[1])
        index = index.transpose(1, 2)[..., None]  # [B, H, Q, T, 1]
        values = padded.gather(2, index.flatten(2, 3).expand(-1, -1, -1, padded.shape[-1]))
        values = values.view(*index.shape[:-1], value.shape[-1])  # [B, H, Q, T, D]
        sampled = sampled + weight.transpose(1, 2)[..., None] * values
    a = a.where(counted, 0.0).transpose(1, 2)[..., None]  # [B, H, Q, T, 1]
    out = (a * sampled).sum(dim=3).transpose(1, 2).flatten(2)  # [B, Q, H D]
    return out.to(value.dtype)


# Along each axis, the candidates: cells (B, Q, H, T) and shares of the weight (B, Q, H, T).
_Corners = list[list[tuple[Tensor, Tensor]]]


def _linear(p: Tensor, sizes: Tensor, padding: str, align_corners: bool) -> tuple[_Corners, Tensor]:
    """The two cells around every location along each axis, and which points count (B, Q, H, T)."""
    u = p * (sizes - 1) if align_corners else p * sizes - 0.5  # [B, Q, H, T, n]
    if padding == "border":
        u = u.where(p.isfinite(), p)  # an infinite one times a size of 0 is NaN
        counted = ~u.isnan() & (sizes > 0)
        clipped = u.detach().clamp(torch.zeros_like(sizes), sizes - 1)
        u = u.where((u > 0) & (u < sizes - 1), clipped)
    else:
        counted = (u >= -1) & (u < sizes) & (sizes > 0)
    counted = counted.all(dim=-1)  # [B, Q, H, T]
    u = u.where(counted[..., None], 0.0)
    first = u.detach().floor()
    t = u - first
    corners = []
    for axis in range(p.shape[-1]):
        cell, share = first[..., axis].long(), t[..., axis]
        corners.append([(cell, 1.0 - share), (cell + 1, share)])
    return corners, counted


def _nearest(p: Tensor, sizes: Tensor) -> tuple[_Corners, Tensor]:
    """The one cell of every location, and which points count."""
    counted = (~p.isnan() & (sizes > 0)).all(dim=-1)  # [B, Q, H, T]
    u = (p.detach() * sizes + 0.5).clamp(torch.zeros_like(sizes), sizes - 1)
    cells = u.where(counted[..., None], 0.0).long()  # [B, Q, H, T, n]
    return [[(cell, torch.ones_like(p[..., 0]))] for cell in cells.unbind(dim=-1)], counted
