"""The public ops on the backends of a GPU, for tests marked gpu, and the same tests tried on the CPU.

A test of ``each_target`` runs on every GPU backend where it is available and is skipped elsewhere, with the
reason that ``pyfeat.info()`` gives; and on the CPU's kernels, which proves the test. Where the variable
PYFEAT_REQUIRED_BACKENDS names a backend, a test that would be skipped for want of it fails.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat._backends import Backend

GPU_BACKENDS: tuple[Backend, ...] = ("cuda", "triton")


@dataclass(frozen=True)
class Target:
    """Where a test runs."""

    backend: Backend
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}".removesuffix("-cpu")

    def __call__(self, tensor: Tensor) -> Tensor:
        """On its device, with the strides that it has."""
        if self.device.type == "cpu":
            return tensor
        moved = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
        )
        # An expanded tensor cannot be written to.
        return tensor.to(self.device) if 0 in tensor.stride() else moved.copy_(tensor)


def why_skipped(target: Target, count: int, required: str) -> str:
    """Why tests of ``target`` are skipped, with ``count`` GPUs; "" if they are not."""
    backends = cast("dict[str, str]", pyfeat.info()["backends"])
    if target.backend in required.split() and not target.device.index:
        return ""
    if backends[target.backend] != "available":
        return f"{target.backend}: {backends[target.backend]}"
    if (target.device.index or 0) >= count:
        return f"there is no GPU {target.device}"
    return ""


def _parameter(backend: Backend, device: str) -> Any:
    target = Target(backend, torch.device(device))
    marks: list[Any] = []
    if device != "cpu":
        required = os.environ.get("PYFEAT_REQUIRED_BACKENDS", "")
        reason = why_skipped(target, torch.cuda.device_count(), required)
        marks = [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)]
    return pytest.param(target, marks=marks, id=str(target))


_ON_GPU = [_parameter(backend, "cuda:0") for backend in GPU_BACKENDS]

each_target = pytest.mark.parametrize("target", [_parameter("cpu", "cpu"), *_ON_GPU])
each_gpu_target = pytest.mark.parametrize("target", _ON_GPU)
each_second_gpu = pytest.mark.parametrize(
    "target", [_parameter(backend, "cuda:1") for backend in GPU_BACKENDS]
)


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of the Triton kernels that are launched meanwhile."""
    names: list[str] = []
    if importlib.util.find_spec("triton") is None:
        yield names
        return
    from triton.runtime.jit import JITFunction

    run = cast("Callable[..., Any]", JITFunction.run)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", counted)
        yield names


def peak_beyond_inputs(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of device memory that ``run`` takes at most, what it returns included."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before
