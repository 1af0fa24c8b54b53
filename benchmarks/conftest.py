"""Fixtures and options of ``python -m pytest benchmarks/bench_<family>.py``.

``@pytest.mark.sizes(name, full=[...], quick=[...])`` runs a benchmark once for each size.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.harness import Harness
from benchmarks.machine import Peaks, describe_machine, measure_peaks, use_threads
from benchmarks.timing import QUICK_PACE, Pace

_PEAKS = pytest.StashKey[Peaks]()
_PACKAGES = pytest.StashKey[set[str]]()
_LOAD = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes, to try the benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sizes(name, full, quick): sizes of a benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    for marker in metafunc.definition.iter_markers("sizes"):
        values = marker.kwargs["quick" if quick else "full"]
        metafunc.parametrize(marker.args[0], values, ids=str)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Replaces the plugin's own, which takes seconds."""
    peaks = config.stash.get(_PEAKS, Peaks({}, "no benchmark ran"))
    packages, load = config.stash.get(_PACKAGES, set()), config.stash.get(_LOAD, 0.0)
    return {
        "machine": describe_machine(torch.get_num_threads(), peaks, packages, load),
        "peaks": {name: asdict(peak) for name, peak in peaks.rates.items()},
    }


@pytest.fixture(scope="session", autouse=True)
def _machine(request: pytest.FixtureRequest, quick: bool) -> Iterator[None]:
    """Sets the threads, after all benchmarks and with them all peers are imported.

    Peaks are measured before and, unless quick, again after all benchmarks.
    """
    num_threads, stash = torch.get_num_threads(), request.config.stash
    use_threads(num_threads)
    stash[_LOAD] = os.getloadavg()[0]
    modules = {item.getparent(pytest.Module) for item in request.session.items}
    stash[_PACKAGES] = {
        name for module in modules if module for name in getattr(module.obj, "PACKAGES", ())
    }
    print("\nmeasuring the peaks of this machine", flush=True)
    stash[_PEAKS] = measure_peaks(num_threads, quick=quick)
    yield
    if not quick:
        stash[_PEAKS] |= measure_peaks(num_threads)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the run only tries the machinery."""
    return bool(request.config.getoption("quick"))


@pytest.fixture
def harness(benchmark: Any, request: pytest.FixtureRequest, quick: bool) -> Harness:
    """Races and values that end up in the results."""
    position = request.session.items.index(request.node) + 1
    print(f"\n[{position}/{len(request.session.items)}] {request.node.originalname}", flush=True)
    pace = QUICK_PACE if quick else Pace()
    return Harness(benchmark, request.function, request.module, pace, torch.get_num_threads())
