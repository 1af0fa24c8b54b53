"""What the compactness of one training step of LSFA takes, at the sizes of the paper."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.data import patch_like_features
from benchmarks.memory import in_fresh_process, peak_memory_mb
from benchmarks.methods.proofs import Figure
from pyfeat import bank_min_distance

TITLE = "LSFA: one training step against full memories"
ABOUT = """
Compactness of one sample, both modalities, distances and their gradients: 3,136 patches against 60,000 rows of
1,152 features and 60,000 of 768, which lie as patches of objects do (`benchmarks/data.py`). The rival is
`torch.cdist(...).amin` and autograd. Seconds of one core's time; memory is what the process grows by, in a process of its own,
and the bound of 300 MB is the one to keep. The matrix of all pairs alone has 753 MB for each modality.
"""

_BOUND_MB = 300.0
_MAX_DISTANCE = 7.07


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    sizes = (64, 2000, (96, 64)) if short else (3136, 60_000, (1152, 768))
    measured = _here if short else in_fresh_process
    seconds = measured(_seconds, "pyfeat", sizes, seed)
    rival = measured(_seconds, "cdist", sizes, seed)
    yield Figure(
        "seconds", "bank_min_distance", seconds, "cdist", rival, better="lower", factor=0.2
    )
    memory = measured(_peak_mb, "pyfeat", sizes, seed)
    yield Figure(
        "extra memory in MB", "bank_min_distance", memory, "the bound", _BOUND_MB, better="lower"
    )
    rival = measured(_peak_mb, "cdist", sizes, seed)
    yield Figure("extra memory in MB", "bank_min_distance", memory, "cdist", rival, better="lower")


def _here(measure: Callable[..., float], *arguments: object) -> float:
    return measure(*arguments)


def _step(name: str, sizes: tuple[int, int, tuple[int, int]], seed: int) -> Callable[[], None]:
    """A step on data that are there."""
    torch.set_num_threads(1)
    num_patches, num_rows, dims = sizes
    pairs = []
    for dim in dims:
        rows = patch_like_features(num_rows + num_patches, dim, seed=seed)
        pairs.append((rows[:num_patches].clone().requires_grad_(), rows[num_patches:].clone()))

    def distance(queries: Tensor, bank: Tensor) -> Tensor:
        if name == "pyfeat":
            return bank_min_distance(queries, bank, max_distance=_MAX_DISTANCE)
        return torch.cdist(queries, bank).amin(dim=1).clamp(max=_MAX_DISTANCE).mean()

    def step() -> None:
        for queries, bank in pairs:
            queries.grad = None
            torch.autograd.backward(distance(queries, bank))

    return step


def _seconds(name: str, sizes: tuple[int, int, tuple[int, int]], seed: int) -> float:
    step = _step(name, sizes, seed)
    times = []
    for _ in range(2 if name == "pyfeat" else 1):  # the rival takes a minute
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    return min(times)


def _peak_mb(name: str, sizes: tuple[int, int, tuple[int, int]], seed: int) -> float:
    return max(peak_memory_mb(_step(name, sizes, seed)), 0.1)
