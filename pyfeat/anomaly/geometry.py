"""What points look like from where they lie: normals, and fast point feature histograms."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._checks import check_count
from pyfeat.search import knn

BINS = 11  # of each of the three angles
FPFH_DIM = 3 * BINS
_CHUNK = 1 << 14  # points whose neighbours are gathered at a time


class Neighbourhoods(NamedTuple):
    """The points near every point, itself left out."""

    indices: Tensor  # (P, k) int64
    distances: Tensor  # (P, k) float32, ascending
    near: Tensor  # (P, k) bool: within the radius


def neighbourhoods(points: Tensor, *, k: int, radius: float = math.inf) -> Neighbourhoods:
    """Find the k nearest points of every point, exactly, within a radius.

    Of points that coincide, each counts as a neighbour of the others.

    Args:
        points: (P, 3) float32, finite.
        k: Neighbours at most, >= 1; P - 1 where there are fewer.
        radius: > 0, in the unit of the points.

    Raises:
        TypeError: If points are not float32, or k is no integer.
        ValueError: If the shape is another one, or an argument is out of range.
    """
    op = "neighbourhoods"
    check_count(op, "k", k)
    _check_points(op, "points", points)
    if not radius > 0:
        message = f"{op}: radius must be positive, got {radius}"
        raise ValueError(message)
    count = len(points)
    if count < 2:
        nothing = points.new_empty((count, 0))
        return Neighbourhoods(nothing.long(), nothing, nothing.bool())
    found = knn(points, points, min(k + 1, count))
    itself = found.indices == torch.arange(count)[:, None]
    # More than k points on top of one may push it out of its own list; the farthest goes then.
    itself[~itself.any(dim=1), -1] = True
    others = (count, itself.shape[1] - 1)
    distances = found.distances[~itself].view(others)
    return Neighbourhoods(found.indices[~itself].view(others), distances, distances <= radius)


def estimate_normals(points: Tensor, around: Neighbourhoods) -> Tensor:
    """Unit normals of the planes that fit points and their neighbours best, towards the sensor.

    The direction of least variance; of the two signs the one with z at most 0, which looks at a
    sensor on the side of small z.

    Args:
        points: (P, 3) float32.
        around: Of the same points.

    Returns:
        (P, 3) float32; (0, 0, -1) where fewer than two neighbours lie within the radius.

    Memory: a few times 12 k bytes for each of 16,384 points at a time.
    """
    _check_points("estimate_normals", "points", points)
    normals = torch.empty_like(points)
    for first in range(0, len(points), _CHUNK):
        part = slice(first, first + _CHUNK)
        near = around.near[part, :, None]  # [p, k, 1]
        # Differences before anything is squared: far from the origin, squares would lose the digits.
        offsets = (points[around.indices[part]] - points[part, None]).double() * near  # [p, k, 3]
        count = near.sum(dim=1) + 1  # [p, 1]: the point itself, at offset 0, is one of them
        mean = offsets.sum(dim=1) / count
        centred = (offsets - mean[:, None]) * near
        scatter = centred.mT @ centred + mean[:, :, None] * mean[:, None]  # [p, 3, 3]
        least = torch.linalg.eigh(scatter).eigenvectors[:, :, 0]  # [p, 3]
        least = least * torch.where(least[:, 2:] > 0, -1.0, 1.0)
        flat = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)
        normals[part] = torch.where(count > 2, least, flat).float()
    return normals


def fpfh(points: Tensor, normals: Tensor, around: Neighbourhoods) -> Tensor:
    """Fast point feature histograms: how the normals around a point turn against each other.

    For a point p with normal n and a neighbour q with normal m, those exchanged where m makes the
    smaller angle with the line between them: with the direction d from the one to the other,
    ``v = d x n / |d x n|`` and ``w = n x v``, the three angles are ``atan2(w.m, n.m)``, ``v.m`` and
    ``n.d``. Each fills a histogram of 11 bins over all neighbours, of sum 100; to the histograms of p
    are added those of its neighbours, weighted by one over their squared distance and scaled to sum
    100 again. Pairs without a frame (d along n) have all angles 0, and a neighbour at distance 0
    does not spread its histograms, as in Open3D.

    Args:
        points: (P, 3) float32.
        normals: (P, 3) float32, unit vectors.
        around: Of the same points.

    Returns:
        (P, 33) float32, in [0, 200]; 0 for points without neighbours.

    Raises:
        ValueError: If shapes disagree.

    Precision: angles in float64.
    Memory: a few times 100 k bytes for each of 16,384 points at a time.
    Source: Rusu et al., Fast point feature histograms for 3D registration, ICRA 2009, with the
    weights of Open3D (Zhou et al., 2018, arXiv:1801.09847).
    """
    op = "fpfh"
    _check_points(op, "points", points)
    _check_points(op, "normals", normals)
    if len(normals) != len(points) or len(around.indices) != len(points):
        message = (
            f"{op}: normals and neighbourhoods must be of {len(points)} points, got "
            f"{len(normals)} and {len(around.indices)}"
        )
        raise ValueError(message)
    exact, exact_normals = points.double(), normals.double()
    simple = points.new_zeros((len(points), FPFH_DIM), dtype=torch.float64)
    for first in range(0, len(points), _CHUNK):
        part = slice(first, first + _CHUNK)
        indices, near = around.indices[part], around.near[part]
        angles = _pair_angles(
            exact[part, None], exact_normals[part, None], exact[indices], exact_normals[indices]
        )
        simple[part] = _histograms(angles, near)
    result = torch.empty_like(simple)
    for first in range(0, len(points), _CHUNK):
        part = slice(first, first + _CHUNK)
        squared = around.distances[part].double().square()
        used = around.near[part] & (squared > 0)
        weights = torch.where(used, 1 / squared.where(used, 1.0), 0.0)  # [p, k]
        spread = torch.einsum("pk,pkh->ph", weights, simple[around.indices[part]])
        parts = spread.view(-1, 3, BINS)
        total = parts.sum(dim=2, keepdim=True)
        result[part] = (100 * parts / total.where(total > 0, 1.0)).flatten(1) + simple[part]
    return result.float()


def _pair_angles(p: Tensor, n: Tensor, q: Tensor, m: Tensor) -> Tensor:
    """The three angles (..., k, 3) of points p, normals n (..., 1, 3) and q, m (..., k, 3)."""
    between = q - p
    length = between.norm(dim=-1, keepdim=True)
    d = between / length.where(length > 0, 1.0)
    n = n.expand_as(d)
    mine, its = (n * d).sum(-1, keepdim=True), (m * d).sum(-1, keepdim=True)
    swapped = mine.abs() < its.abs()  # a smaller cosine is a larger angle
    n, m = torch.where(swapped, m, n), torch.where(swapped, n, m)
    d = torch.where(swapped, -d, d)
    third = torch.where(swapped, -its, mine)
    v = torch.linalg.cross(d, n)
    v_length = v.norm(dim=-1, keepdim=True)
    v = v / v_length.where(v_length > 0, 1.0)
    w = torch.linalg.cross(n, v)
    first = torch.atan2((w * m).sum(-1, keepdim=True), (n * m).sum(-1, keepdim=True))
    second = (v * m).sum(-1, keepdim=True)
    framed = (length > 0) & (v_length > 0)
    return torch.cat([first, second, third], dim=-1).where(framed, 0.0)


def _histograms(angles: Tensor, near: Tensor) -> Tensor:
    """(p, 33): of angles (p, k, 3) of neighbours that are near (p, k), each of sum 100."""
    count = near.sum(dim=1)  # [p]
    low = torch.tensor([-math.pi, -1.0, -1.0], dtype=angles.dtype)
    span = torch.tensor([2 * math.pi, 2.0, 2.0], dtype=angles.dtype)
    bins = ((angles - low) / span * BINS).floor().clamp(0, BINS - 1).long()  # [p, k, 3]
    bins = bins + BINS * torch.arange(3)
    share = near * (100.0 / count.clamp_min(1))[:, None]  # [p, k]
    histograms = angles.new_zeros((len(angles), FPFH_DIM))
    weights = share[:, :, None].expand(-1, -1, 3).flatten(1).to(angles.dtype)
    return histograms.scatter_add_(1, bins.flatten(1), weights)


def _check_points(op: str, name: str, points: Tensor) -> None:
    if points.dtype != torch.float32:
        message = f"{op}: {name} must be float32, got {points.dtype}"
        raise TypeError(message)
    if points.ndim != 2 or points.shape[1] != 3:
        message = f"{op}: {name} must have shape (P, 3), got {tuple(points.shape)}"
        raise ValueError(message)
