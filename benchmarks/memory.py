"""Peak memory of a call, in a process that has none to use again."""

import ctypes
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def in_fresh_process(measure: Callable[..., float], *arguments: object) -> float:
    """Call a function of a module in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def peak_memory_mb(run: Callable[[], object]) -> float:
    """Growth in MB of the largest resident size of this process while ``run`` runs (Linux).

    Memory that earlier calls have freed goes back to the system first: it would hide as much growth.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    before = _resident_kb("VmRSS")
    run()
    return (_resident_kb("VmHWM") - before) / 1024


def peak_anonymous_mb(run: Callable[[], object]) -> float:
    """Growth in MB of this process beside pages of files, sampled while ``run`` runs (Linux)."""
    before, done = _resident_kb("RssAnon"), threading.Event()
    peaks = [before]

    def sample() -> None:
        while not done.wait(0.01):
            peaks.append(_resident_kb("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        done.set()
        sampler.join()
    return (max(peaks) - before) / 1024


def _resident_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    message = f"no {field} in /proc/self/status"
    raise RuntimeError(message)
