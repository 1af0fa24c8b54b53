"""The k-centre greedy coreset: few rows that cover many."""

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat import _C
from pyfeat._backends import select_backend
from pyfeat._checks import (
    as_matrix,
    as_tensor,
    check_features,
    check_finite,
    distance_dtype_of,
    dtype_name,
    with_contiguous_rows,
)
from pyfeat._extras import require
from pyfeat._ops import search_cpu

# Bytes of the float64 rows that are projected at a time.
_CHUNK_BYTES = 32 << 20


class Coreset(NamedTuple):
    """Rows that cover a set of features."""

    indices: Tensor  # (size,) int64, in the order of picking
    radius: float  # largest distance of any row to its nearest pick


def greedy_coreset(
    features: Tensor | NDArray[Any],
    *,
    size: int | None = None,
    ratio: float | None = None,
    radius: float | None = None,
    start: int | None = None,
    seed: int = 0,
    projection: int | None = None,
    progress: bool = False,
) -> Coreset:
    """Pick rows that cover all others: always the row farthest from those already picked.

    The k-centre greedy of Gonzalez: its covering radius is at most twice the best possible for the
    same number of rows. Ties go to the lower index; no row is picked twice. Say exactly one of
    ``size``, ``ratio`` and ``radius``.

    Args:
        features: (N, D) float32, float64, float16 or bfloat16, N >= 1.
        size: Number of rows, 1 <= size <= N.
        ratio: Fraction of rows in (0, 1]; at least one row is picked.
        radius: Stop as soon as every row lies within this distance of a pick; >= 0.
        start: First pick; None draws it from ``seed``.
        seed: For the first pick and the projection.
        projection: Pick in a random projection to so many dimensions (Gaussian, as of Johnson and
            Lindenstrauss) where D is larger, as PatchCore does with 128. The picks are then only nearly
            the farthest rows, and the time saved is little. Not together with ``radius``.
        progress: Show a progress bar with the remaining time (needs tqdm).

    Returns:
        ``indices`` (size,) int64 in the order of picking, and the covering ``radius``, which is that
        of the features themselves also if the picks are made in a projection of them.

    Raises:
        TypeError: If features are not a matrix of floats.
        ValueError: If a value is out of range, or a feature is NaN or infinite.

    Precision: distances by direct differences in float64: the picks equal those of a float64
    reference from the same start. A projection is taken in float64 and kept in float32, or float64
    for float64 features.
    Memory: 20 N bytes and a copy of N / 32 rows (at least 4,096) beyond the result, and a workspace
    below 128 MB. A projection is a copy of the features in ``projection`` dimensions, and its radius a
    ``knn`` of all rows.
    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; used for
    memory banks, in 128 random projections, by Roth et al., PatchCore, CVPR 2022, arXiv:2106.08265.

    Examples:
        >>> greedy_coreset(torch.tensor([[0.0], [1.0], [5.0]]), size=2, start=0).indices
        tensor([0, 2])
    """
    op = "greedy_coreset"
    x = as_tensor(op, "features", features).detach()
    check_features(op, "features", x)
    num_rows = x.shape[0]
    if num_rows == 0:
        message = f"{op}: features must have at least one row, got shape {tuple(x.shape)}"
        raise ValueError(message)
    wanted = _coreset_size(num_rows, size=size, ratio=ratio, radius=radius)
    if projection is not None and (radius is not None or projection < 1):
        reason = "None with radius" if radius is not None else "at least 1"
        message = f"{op}: projection must be {reason}, got {projection}"
        raise ValueError(message)
    if start is None:
        start = int(np.random.default_rng(seed).integers(num_rows))
    if not 0 <= start < num_rows:
        message = f"{op}: start must be in [0, {num_rows}), got {start}"
        raise ValueError(message)
    select_backend(op, "cpu", x)
    check_finite(op, "features", x)
    x = with_contiguous_rows(x)
    stop = -1.0 if radius is None else _largest_square(radius)
    if projection is None or projection >= x.shape[1]:
        picks, squared = _pick(x, wanted, start=start, stop=stop, progress=progress)
        return Coreset(picks, math.sqrt(squared))
    projected = _project(x, projection, seed)
    check_finite(op, "projected features", projected)
    picks, _ = _pick(projected, wanted, start=start, progress=progress)
    del projected
    nearest = search_cpu(x, x[picks], 1, "euclidean", distance_dtype=torch.float64)[0]
    return Coreset(picks, float(nearest.max()))


def cover(features: Tensor, squared_distances: Tensor, radius: float) -> Tensor:
    """Pick rows until all lie within a radius of a pick, or of what they were near before.

    Always the row farthest from both, of equals the lowest; rows within the radius are not picked.

    Args:
        features: (N, D) float32, float64, float16 or bfloat16, finite.
        squared_distances: (N,) float64, of every row to what it was near before; infinite if to
            nothing.
        radius: >= 0.

    Returns:
        (m,) int64, in the order of picking.

    Raises:
        ValueError: If the radius is out of range, or the squared distances are negative or NaN, or of
            another shape or dtype.
    """
    op = "cover"
    select_backend(op, "cpu", features)
    if not 0.0 <= radius < math.inf:
        message = f"{op}: radius must be finite and at least 0, got {radius}"
        raise ValueError(message)
    num_rows = features.shape[0]
    if squared_distances.shape != (num_rows,) or squared_distances.dtype != torch.float64:
        message = (
            f"{op}: squared_distances must be float64 of shape ({num_rows},), "
            f"got {dtype_name(squared_distances.dtype)} of {tuple(squared_distances.shape)}"
        )
        raise ValueError(message)
    if not (squared_distances >= 0.0).all():
        message = f"{op}: squared_distances must be at least 0, got negative values or NaN"
        raise ValueError(message)
    stop = _largest_square(radius)
    if not (squared_distances > stop).any():
        return torch.empty(0, dtype=torch.int64)
    rows = with_contiguous_rows(features.detach())
    return _pick(rows, num_rows, squared_distances=squared_distances, stop=stop)[0]


def _pick(
    x: Tensor,
    wanted: int,
    *,
    start: int = -1,
    squared_distances: Tensor | None = None,
    stop: float = -1.0,
    progress: bool = False,
) -> tuple[Tensor, float]:
    """Picks (at most ``wanted``,) and the squared covering radius, which ends the search at ``stop``.

    The first pick is ``start``, or -1 for the row with the largest of ``squared_distances``.
    """
    initial = None if squared_distances is None else squared_distances.contiguous()
    search = _C.FarthestSearch(as_matrix(x), start, 0 if initial is None else initial.data_ptr())
    picks = torch.empty(wanted, dtype=torch.int64)
    squared_radii = torch.empty(wanted, dtype=torch.float64)
    done, batch = 0, 1
    with _progress_bar(progress, wanted) as bar:
        while True:
            began = time.perf_counter()
            count = search.advance(
                batch,
                stop,
                picks[done:].data_ptr(),
                squared_radii[done:].data_ptr(),
                torch.get_num_threads(),
            )
            elapsed = time.perf_counter() - began
            done += count
            bar.update(count)
            reached = float(squared_radii[done - 1])
            if done == wanted or reached <= stop:
                return picks[:done].clone(), reached
            # As many picks as take a fifth of a second: the bar moves, the calls cost nothing.
            batch = min(wanted - done, max(1, round(0.2 * count / max(elapsed, 1e-6))), 4 * count)


def _project(x: Tensor, dim: int, seed: int) -> Tensor:
    """(N, dim): differences of rows keep their lengths but for a factor near 1.

    The first row is taken away before rounding, so that features far from zero lose no digits.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(x.shape[1], dim, generator=generator, dtype=torch.float64)
    matrix /= math.sqrt(dim)
    origin = x[0].double()
    projected = torch.empty((x.shape[0], dim), dtype=distance_dtype_of(x))
    chunk = max(1, _CHUNK_BYTES // (8 * x.shape[1]))
    for first in range(0, x.shape[0], chunk):
        part = slice(first, first + chunk)
        projected[part] = (x[part].double() - origin) @ matrix
    return projected


def _largest_square(radius: float) -> float:
    """The largest float64 whose square root is at most ``radius``."""
    square = radius * radius
    while math.sqrt(square) > radius:
        square = math.nextafter(square, 0.0)
    while math.sqrt(math.nextafter(square, math.inf)) <= radius:
        square = math.nextafter(square, math.inf)
    return square


def _coreset_size(
    num_rows: int, *, size: int | None, ratio: float | None, radius: float | None
) -> int:
    given = {"size": size, "ratio": ratio, "radius": radius}
    if sum(value is not None for value in given.values()) != 1:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        message = (
            f"greedy_coreset: exactly one of size, ratio and radius must be given, got {shown}"
        )
        raise ValueError(message)
    if ratio is not None:
        if not 0.0 < ratio <= 1.0:
            message = f"greedy_coreset: ratio must be in (0, 1], got {ratio}"
            raise ValueError(message)
        return max(1, int(num_rows * ratio))
    if radius is not None:
        if not 0.0 <= radius < math.inf:
            message = f"greedy_coreset: radius must be finite and at least 0, got {radius}"
            raise ValueError(message)
        return num_rows
    if size is None or not 1 <= size <= num_rows:
        message = f"greedy_coreset: size must be in [1, N = {num_rows}], got {size}"
        raise ValueError(message)
    return size


def _progress_bar(shown: bool, total: int) -> Any:
    if not shown:
        return _SilentBar()
    tqdm = require("tqdm", extra="anomaly", op="greedy_coreset")
    return tqdm.tqdm(total=total, desc="coreset", unit="pick")


class _SilentBar:
    def __enter__(self) -> "_SilentBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass
