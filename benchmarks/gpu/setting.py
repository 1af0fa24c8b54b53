"""Where the races run: the device, its clock, our backends, and the ceilings that are measured there."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TypeVar, cast

import torch

import pyfeat
from benchmarks.gpu.clock import Clock, EventClock, HostClock
from benchmarks.gpu.turns import MissingError
from benchmarks.machine import commit_name, package_version
from benchmarks.records import Peak
from benchmarks.timing import GIGA, Summary
from pyfeat._backends import Backend

# Distributions whose versions count where they are installed.
PACKAGES = (
    *("triton", "transformers", "faiss-gpu-cu12", "faiss-gpu-cu13", "faiss-cpu"),
    *("cuvs-cu12", "cuvs-cu13", "siglip-kernel", "deformops"),
)
GPU_BACKENDS: tuple[Backend, ...] = ("cuda", "triton")

Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Setting:
    """A GPU, or for a rehearsal the CPU in its place, where sizes are tiny."""

    device: torch.device
    clock: Clock
    backends: tuple[Backend, ...]
    most_rounds: int = 15

    @classmethod
    def of(cls, *, rehearse: bool) -> "Setting":
        """This machine's first GPU, or none.

        Raises:
            RuntimeError: If it has no GPU and this is no rehearsal.
        """
        if rehearse:
            return cls(torch.device("cpu"), HostClock(), ("cpu",), most_rounds=2)
        if not torch.cuda.is_available():
            message = "benchmarks.gpu: torch sees no NVIDIA GPU; --rehearse tries the machinery"
            raise RuntimeError(message)
        device = torch.device("cuda", 0)
        return cls(device, EventClock(device), GPU_BACKENDS)

    @property
    def rehearsed(self) -> bool:
        """Whether nothing of this counts."""
        return self.device.type == "cpu"

    def need(self, backend: Backend) -> None:
        """Raise ``MissingError`` with the reason that ``pyfeat.info()`` gives, if a backend is missing."""
        state = backend_states()[backend]
        if state != "available":
            raise MissingError(state.removeprefix("missing: "))

    def compiled(self, function: Function) -> Function:
        """By ``torch.compile``; in a rehearsal by its front end alone."""
        compiler = "eager" if self.rehearsed else "inductor"
        return cast("Function", torch.compile(function, backend=compiler))


def backend_states() -> dict[str, str]:
    """What ``pyfeat.info()`` says of every backend."""
    states = dict(cast("dict[str, str]", pyfeat.info()["backends"]))
    return {
        name: states.get(name, "missing: not in this version") for name in (*GPU_BACKENDS, *states)
    }


def measure_ceilings(setting: Setting) -> dict[str, Peak]:
    """Rates in ``records.UNITS``: copying, and square products in four number formats."""
    side, size = (64, 1 << 16) if setting.rehearsed else (8192, 1 << 30)
    source = torch.randint(0, 100, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    rate = 2.0 * size / _median(setting, partial(target.copy_, source))
    peaks = {"copy": Peak(rate / GIGA, f"copy of {size / 2**20:,.0f} MB, read and written")}
    del source, target  # room for the products
    operations = 2.0 * side**3
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        a, b = torch.randn(2, side, side, device=setting.device).to(dtype)
        with allow_tf32(tf32):
            rate = operations / _median(setting, partial(torch.mm, a, b))
        peaks[name] = Peak(rate / GIGA, f"torch product of {side:,} × {side:,}, random")
    return peaks


class allow_tf32:  # noqa: N801
    """Whether products of float32 may be rounded to TF32, while this lasts."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self._allowed

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before


def describe_setting(setting: Setting) -> list[str]:
    """Lines of Markdown: the device, versions, commit and date."""
    if setting.rehearsed:
        device = f"none, the CPU in its place ({platform.machine()})"
    else:
        about = torch.cuda.get_device_properties(setting.device)
        device = (
            f"{about.name}, compute capability {about.major}.{about.minor}, "
            f"{about.multi_processor_count} processors, {about.total_memory / 2**30:.0f} GiB"
        )
    found = {name: package_version(name) for name in PACKAGES}
    versions = ", ".join(f"{name} {v}" for name, v in found.items() if v != "missing")
    states = backend_states()
    shown = ", ".join(f"{name} {states[name]}" for name in GPU_BACKENDS)
    return [
        f"GPU: {device}",
        f"backends: {shown}",
        f"times: {setting.clock.how}",
        f"versions: pyfeat {pyfeat.__version__}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda or 'none'}, {versions}, Python {platform.python_version()}, "
        f"{os.cpu_count()} logical processors",
        f"commit: {commit_name()}, {datetime.now(timezone.utc):%Y-%m-%d}",
    ]


def _median(setting: Setting, run: Callable[[], object]) -> float:
    """Median of ten, after three."""
    for _ in range(3):
        run()
    return Summary(tuple(setting.clock.seconds(run, cold=False) for _ in range(10))).median
