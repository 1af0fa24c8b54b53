"""Clock and environment of every benchmark.

Rivals take turns within one run, each with the same number of threads, and only ratios of their
medians are compared: other work on the machine then slows all of them alike.
"""

import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import pyfeat
from pyfeat import _C

# What any exact method must execute: 2 Q N D for the products.
GIGA = 1e9


@dataclass(frozen=True)
class Times:
    """Seconds of the repetitions of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range, relative to the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median


def take_turns(contenders: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Times]:
    """Run every contender once to warm up, then ``rounds`` times in turn."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def in_fresh_process(measure: Callable[..., float], *arguments: object) -> float:
    """Call a function of a module in a process of its own, which has no memory to use again."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def peak_memory_mb(run: Callable[[], object]) -> float:
    """Growth in MB of the largest resident size of this process while ``run`` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    before = _resident_kb("VmRSS")
    run()
    return (_resident_kb("VmHWM") - before) / 1024


def environment() -> list[str]:
    """What the numbers depend on, as Markdown list items."""
    return [
        f"processor: {_processor()}, {torch.get_num_threads()} threads, "
        f"instruction sets {', '.join(_C.isas())}",
        f"commit: {_commit()}",
        f"pyfeat {pyfeat.__version__}, torch {torch.__version__}, faiss-cpu "
        f"{version('faiss-cpu')}, Python {platform.python_version()}, {platform.system()}",
    ]


def _resident_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    message = f"no {field} in /proc/self/status"
    raise RuntimeError(message)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
