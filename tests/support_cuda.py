"""The CUDA kernels for the tests: on an NVIDIA GPU where there is one, else emulated on the CPU.

The emulation runs the same launchers, bindings and kernels on tensors of the CPU: slowly, so sizes
are small. Launchers are imported here, after the module that they call.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from pyfeat._cuda_ops.loading import missing_for_cuda
from tests.support_emulation import Emulation, emulated_module

DEVICE = "cuda" if torch.cuda.is_available() and not missing_for_cuda() else "cpu"
EMULATION = Emulation(emulated_module()) if DEVICE == "cpu" else None

frame: Any = importlib.import_module("pyfeat._cuda_ops.frame")


def _emulate_tensors(emulation: Emulation) -> None:
    """Let kernels touch the tensors of the CPU whose addresses they are given, and no others."""
    address_of = frame.address_of

    def allowed_address_of(tensor: Tensor | None) -> int:
        if tensor is not None:
            emulation.allow(tensor)
        return int(address_of(tensor))

    frame.address_of = allowed_address_of
    frame.queue_of = lambda tensor: (0, 0)


if EMULATION is not None:
    _emulate_tensors(EMULATION)
