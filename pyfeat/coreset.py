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
    with_contiguous_rows,
)
from pyfeat._extras import require


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
    progress: bool = False,
) -> Coreset:
    """Pick rows that cover all others: always the row farthest from those already picked.

    The k-centre greedy of Gonzalez: its covering radius is at most twice the best possible for the
    same number of rows. Ties go to the lower index; no row is picked twice. Say exactly one of
    ``size``, ``ratio`` and ``radius``.

    Args:
        features: (N, D) float32, N >= 1.
        size: Number of rows, 1 <= size <= N.
        ratio: Fraction of rows in (0, 1]; at least one row is picked.
        radius: Stop as soon as every row lies within this distance of a pick; >= 0.
        start: First pick; None draws it from ``seed``.
        seed: For the first pick.
        progress: Show a progress bar with the remaining time (needs tqdm).

    Returns:
        ``indices`` (size,) int64 in the order of picking, and the covering ``radius``.

    Raises:
        TypeError: If features are not a float32 matrix.
        ValueError: If a value is out of range, or a feature is NaN or infinite.

    Precision: distances by direct differences in float64: the picks equal those of a float64
    reference from the same start.
    Memory: 12 N bytes beyond the result. One pass over the rows for each pick, in which those that the
    triangle inequality proves to be no nearer to it are passed over.
    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; used for
    memory banks by Roth et al., PatchCore, CVPR 2022, arXiv:2106.08265.

    Examples:
        >>> greedy_coreset(torch.tensor([[0.0], [1.0], [5.0]]), size=2, start=0).indices
        tensor([0, 2])
    """
    op = "greedy_coreset"
    x = as_tensor(op, "features", features)
    check_features(op, "features", x)
    num_rows = x.shape[0]
    if num_rows == 0:
        message = f"{op}: features must have at least one row, got shape {tuple(x.shape)}"
        raise ValueError(message)
    wanted = _coreset_size(num_rows, size=size, ratio=ratio, radius=radius)
    if start is None:
        start = int(np.random.default_rng(seed).integers(num_rows))
    if not 0 <= start < num_rows:
        message = f"{op}: start must be in [0, {num_rows}), got {start}"
        raise ValueError(message)
    select_backend(op, "cpu", x)
    check_finite(op, "features", x)
    x = with_contiguous_rows(x)
    stop = -1.0 if radius is None else math.nextafter(radius * radius, math.inf)

    squared = torch.full((num_rows,), math.inf, dtype=torch.float64)
    owners = torch.zeros(num_rows, dtype=torch.int32)
    picks = torch.empty(wanted, dtype=torch.int64)
    squared_radii = torch.empty(wanted, dtype=torch.float64)
    picks[0] = start
    done, batch = 0, 1
    with _progress_bar(progress, wanted) as bar:
        while True:
            began = time.perf_counter()
            count, following, _ = _C.farthest_cpu(
                as_matrix(x),
                squared.data_ptr(),
                owners.data_ptr(),
                picks.data_ptr(),
                squared_radii.data_ptr(),
                done,
                batch,
                stop,
                torch.get_num_threads(),
            )
            elapsed = time.perf_counter() - began
            done += count
            bar.update(count)
            reached = float(squared_radii[done - 1])
            if done == wanted or reached <= stop:
                return Coreset(picks[:done].clone(), math.sqrt(reached))
            picks[done] = following
            # As many picks as take a fifth of a second: the bar moves, the calls cost nothing.
            batch = min(wanted - done, max(1, round(0.2 * count / max(elapsed, 1e-6))), 4 * count)


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
