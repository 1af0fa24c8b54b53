"""Second derivatives of deformable attention in plain torch, some queries at a time.

With G the gradient of the output, A the weight of a point, d its sample and d' that of ``by_value``
at the same position u, the first gradients times what they are to be multiplied with add up to

    Phi = sum over points of <G, A d' + by_A d + A sum_j by_u_j dd/du_j>,

of which every corner of a point has its share, and so have the derivatives by all inputs.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of the values of one corner of the points of some queries.
_BYTES = 16 << 20


class _Places(NamedTuple):
    """Where T points of queries and heads lie, along each axis from x."""

    cells: Tensor  # [B, Q, H, T, n] int64, the lower ones
    fractions: Tensor  # [B, Q, H, T, n]
    slopes: Tensor  # [B, Q, H, T, n] of positions by locations
    counted: Tensor  # [B, Q, H, T]


class _Corner(NamedTuple):
    """One cell of every point, and its weight with derivatives by positions."""

    cells: Tensor  # [B, Q, H, T, n] int64
    weight: Tensor  # [B, Q, H, T]
    first: list[Tensor]  # n of (B, Q, H, T)
    second: list[list[Tensor]]  # n times n


def second_gradients(
    value: Tensor,
    shapes: Sequence[int],
    num_points: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    border: bool,
    align_corners: bool,
    discrete: bool,
    grad_output: Tensor,
    by_value: Tensor,
    by_locations: Tensor,
    by_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of <first gradients, what they are multiplied with> by all that they come from.

    Args:
        value: (B, S, H, D) float.
        shapes: n sizes of every level, level by level, in the order of the axes in memory.
        num_points: Points of every level, T in total.
        locations: (B, Q, H, T, n), x first.
        weights: (B, Q, H, T).
        border: Whether positions are clipped to the outermost cells.
        align_corners: Whether 0 and 1 are the centres of the outermost cells.
        discrete: Whether the one nearest cell is taken.
        grad_output: (B, Q, H D).
        by_value: What the gradient by ``value`` is multiplied with, in its shape.
        by_locations: Likewise.
        by_weights: Likewise.

    Returns:
        By ``value``, ``locations``, ``weights`` and ``grad_output``, in their shapes and dtypes.

    Precision: sums in float32, float64 for float64 values. Bit-identical between runs on a GPU where
    torch is asked for deterministic algorithms.
    Memory: results, in the dtype of sums too, and at most 128 MB, or what one query takes.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    batch, num_cells, num_heads, dim = value.shape
    num_queries, total, ndim = locations.shape[1], *locations.shape[3:]
    sizes = torch.tensor(shapes).view(-1, ndim)  # [L, n]
    first_cells = sizes.prod(dim=1).cumsum(0) - sizes.prod(dim=1)  # [L]
    level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(num_points, dtype=torch.int64))
    sizes = sizes.flip(1)[level].to(value.device)  # [T, n] from x
    steps = torch.cat([torch.ones_like(sizes[:, :1]), sizes[:, :-1].cumprod(dim=1)], dim=1)
    first_rows = first_cells[level].to(value.device)  # [T]
    batches = torch.arange(batch, device=value.device).view(-1, 1, 1, 1)
    first_rows = (first_rows + batches * num_cells) * num_heads
    first_rows = first_rows + torch.arange(num_heads, device=value.device)[:, None]  # [B, 1, H, T]

    values, given = (x.to(dtype).reshape(-1, dim) for x in (value, by_value))  # [B S H, D]
    grads = grad_output.to(dtype).reshape(batch, num_queries, num_heads, 1, dim)
    grad_value, grad_grads = torch.zeros_like(values), torch.zeros_like(grads[..., 0, :])
    grad_locations = torch.zeros_like(locations, dtype=dtype)
    grad_weights = torch.zeros_like(weights, dtype=dtype)
    size = batch * num_heads * total * dim * values.element_size()  # of one query
    step = max(1, _BYTES // max(size, 1))
    for part in map(slice, range(0, num_queries, step), range(step, num_queries + step, step)):
        p, by_p = locations[:, part].to(dtype), by_locations[:, part].to(dtype)
        places = _places(p, sizes, border, align_corners, discrete)
        counted, g = places.counted, grads[:, part]  # [B, Q, H, T] and [B, Q, H, 1, D]
        a, by_a = (x[:, part].to(dtype).where(counted, 0.0) for x in (weights, by_weights))
        by_u = (by_p * places.slopes).where(counted[..., None], 0.0).unbind(dim=-1)
        for corner in _corners(places, discrete):
            cells, w, dw, ddw = corner
            inside = ((cells >= 0) & (cells < sizes)).all(dim=-1) & counted
            rows = (first_rows + (cells * steps).sum(dim=-1) * num_heads).where(inside, 0)
            v, by_v = (x[rows].where(inside[..., None], 0.0) for x in (values, given))
            sample, by_sample = (g * v).sum(dim=-1), (g * by_v).sum(dim=-1)  # [B, Q, H, T]
            moved = sum(by * d for by, d in zip(by_u, dw, strict=True))
            factor = by_a * w + a * moved
            added = (factor[..., None] * g).where(inside[..., None], 0.0)
            grad_value.index_add_(0, rows.flatten(), added.flatten(0, 3))
            grad_grads[:, part] += ((a * w)[..., None] * by_v + factor[..., None] * v).sum(dim=3)
            grad_weights[:, part] += w * by_sample + moved * sample
            for axis, turns in enumerate(ddw):
                turned = a * sum(by * d for by, d in zip(by_u, turns, strict=True))
                along = dw[axis] * (a * by_sample + by_a * sample) + turned * sample
                grad_locations[:, part, :, :, axis] += along * places.slopes[..., axis]
    return (
        grad_value.view(value.shape).to(value.dtype),
        grad_locations.to(locations.dtype),
        grad_weights.to(weights.dtype),
        grad_grads.view(grad_output.shape).to(grad_output.dtype),
    )


def _places(p: Tensor, sizes: Tensor, border: bool, align_corners: bool, discrete: bool) -> _Places:
    """Of locations (B, Q, H, T, n) on levels of ``sizes`` (T, n)."""
    last = (sizes - 1).to(p.dtype)
    slopes = last if align_corners and not discrete else sizes.to(p.dtype)
    u = p * slopes + (0.5 if discrete else 0.0 if align_corners else -0.5)
    if border or discrete:
        counted = ~p.isnan() & (sizes > 0)
        slopes = slopes.where((u > 0) & (u < last), 0.0)
        u = torch.minimum(u.nan_to_num(0.0).clamp(min=0.0), last)
    else:
        counted = (u >= -1) & (u < sizes) & (sizes > 0)
    counted = counted.all(dim=-1)
    u = u.where(counted[..., None], 0.0)
    cells = u.floor()
    fractions = u - cells
    if discrete:
        fractions, slopes = torch.zeros_like(u), torch.zeros_like(u)
    return _Places(
        cells.long(), fractions, slopes.expand_as(u).where(counted[..., None], 0.0), counted
    )


def _corners(places: _Places, discrete: bool) -> Iterator[_Corner]:
    """All corners of points; the derivatives are with respect to positions."""
    fractions = places.fractions.unbind(dim=-1)
    axes = range(len(fractions))
    for upper in itertools.product((0,) if discrete else (0, 1), repeat=len(fractions)):
        shares = [t if e else 1.0 - t for e, t in zip(upper, fractions, strict=True)]
        yield _Corner(
            places.cells + torch.tensor(upper, device=places.cells.device),
            _derivative(shares, upper),
            [_derivative(shares, upper, i) for i in axes],
            [[_derivative(shares, upper, i, j) for j in axes] for i in axes],
        )


def _derivative(shares: list[Tensor], upper: tuple[int, ...], *axes: int) -> Tensor:
    """Of the product of ``shares``, by positions along ``axes``."""
    if len(set(axes)) < len(axes):
        return torch.zeros_like(shares[0])  # linear along every axis
    sign = math.prod(1.0 if upper[axis] else -1.0 for axis in axes)
    rest = (share for axis, share in enumerate(shares) if axis not in axes)
    return math.prod(rest, start=torch.full_like(shares[0], sign))
