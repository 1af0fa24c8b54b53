"""Two clocks: CUDA events on a GPU, and that of the host for a rehearsal without one."""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Half a millisecond or more on any GPU: the host queues a whole call while the device still waits,
# so that what is timed is the device.
_LEAD_CYCLES = 2_000_000
# Twice the largest second-level cache there is.
_FLUSHED_BYTES = 256 << 20


class Clock(Protocol):
    """Times calls with caches that hold nothing of use, or what the call before has left."""

    how: str

    def seconds(self, run: Callable[[], object], *, cold: bool) -> float:
        """Of one call."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> tuple[object, int | None]:
        """What a call returns, and the device memory that it takes, its results included."""
        ...


class EventClock:
    """CUDA events around a call, on torch's current stream.

    Args:
        device: On which the call runs.
    """

    how = (
        "CUDA events around one call; the device is kept busy until the host has queued it. cold: "
        "256 MB are written before, so that no cache holds an input; warm: straight after the same call"
    )

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(_FLUSHED_BYTES // 4, dtype=torch.int32, device=device)

    def seconds(self, run: Callable[[], object], *, cold: bool) -> float:
        """Of one call."""
        with torch.cuda.device(self._device):
            began, ended = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            torch.cuda.synchronize()
            if cold:
                self._flushed.zero_()
            torch.cuda._sleep(_LEAD_CYCLES)  # type: ignore[no-untyped-call]
            began.record()
            run()
            ended.record()
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1e3

    def peak_bytes(self, run: Callable[[], object]) -> tuple[object, int | None]:
        """What a call returns, and the device memory that it takes, its results included."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        answer = run()
        torch.cuda.synchronize(self._device)
        return answer, torch.cuda.max_memory_allocated(self._device) - before


class HostClock:
    """The host's clock, for calls that run on it."""

    how = "the clock of the host: a rehearsal, whose times mean nothing"

    def __init__(self) -> None:
        self._flushed: Tensor = torch.empty(1 << 16, dtype=torch.int32)

    def seconds(self, run: Callable[[], object], *, cold: bool) -> float:
        """Of one call."""
        if cold:
            self._flushed.zero_()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def peak_bytes(self, run: Callable[[], object]) -> tuple[object, int | None]:
        """What a call returns; nobody counts its memory."""
        return run(), None
