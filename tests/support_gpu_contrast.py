"""The kernels of losses over all pairs that a test runs with, of either backend of a GPU."""

import importlib
from typing import Any

import pytest

from pyfeat import _contrast_cuda

BACKENDS = ("triton", "cuda")


def kernels_of(backend: str) -> Any:
    """On an NVIDIA GPU where there is one, else interpreted or emulated."""
    importlib.import_module(f"tests.support_{backend}")
    return importlib.import_module(
        {"triton": "pyfeat._triton.contrast", "cuda": "pyfeat._cuda_ops.contrast"}[backend]
    )


def run_with(backend: str, patch: pytest.MonkeyPatch) -> None:
    """Let the ops of a GPU take the kernels of ``backend``."""
    kernels = kernels_of(backend)
    patch.setattr(_contrast_cuda, "_kernels", lambda backend: kernels)
