"""Which backend runs an op, and why the others cannot.

Each backend lists what stands in its way for the inputs at hand; the first with nothing in its
way runs. A backend asked for by name runs or raises: it is never replaced in silence.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from pyfeat._cuda_ops.loading import missing_for_cuda
from pyfeat._cuda_ops.served import SERVED
from pyfeat._gpu import PAIR_OPS
from pyfeat._triton import MAX_K

Backend = Literal["cpu", "cuda", "triton", "reference"]

# op, features, k
Obstacles = Callable[[str, Tensor, int], list[str]]

_TRITON_OPS = ("knn", "deform_attn", *PAIR_OPS)
_TRITON_CAPABILITY = (8, 0)  # bfloat16 on tensor cores


def _cpu_obstacles(op: str, features: Tensor, k: int) -> list[str]:
    if features.device.type != "cpu":
        return [f"inputs are on {features.device}"]
    return []


def _cuda_obstacles(op: str, features: Tensor, k: int) -> list[str]:
    obstacles = SERVED[op](features, k) if op in SERVED else [f"it has no {op}"]
    if features.device.type != "cuda":
        obstacles.append(f"inputs are on {features.device}")
    else:
        obstacles += missing_for_cuda(features.device)
    return obstacles


def _triton_obstacles(op: str, features: Tensor, k: int) -> list[str]:
    obstacles = []
    if op not in _TRITON_OPS:
        obstacles.append(f"it has no {op}")
    if k > MAX_K:
        obstacles.append(f"k must be at most {MAX_K}, got {k}")
    if features.device.type != "cuda":
        obstacles.append(f"inputs are on {features.device}")
    else:
        obstacles += _missing_for_triton(features.device)
    return obstacles


def _missing_for_triton(device: torch.device | None = None) -> list[str]:
    if find_spec("triton") is None:
        return ["triton is not installed: pip install 'pyfeat-kernels[gpu]'"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA GPU"]
    capability = torch.cuda.get_device_capability(device)
    if capability < _TRITON_CAPABILITY:
        return [f"the GPU must have compute capability 8.0 or more, got {capability}"]
    return []


def _no_obstacles(op: str, features: Tensor, k: int) -> list[str]:
    return []


# In order of preference. The reference is slow by design and runs only when it is asked for.
_OBSTACLES: Mapping[Backend, Obstacles] = {
    "cpu": _cpu_obstacles,
    "cuda": _cuda_obstacles,
    "triton": _triton_obstacles,
    "reference": _no_obstacles,
}
BACKENDS: tuple[Backend, ...] = tuple(_OBSTACLES)


def select_backend(op: str, backend: Backend | None, features: Tensor, *, k: int = 1) -> Backend:
    """The backend to run ``op`` on inputs like ``features``.

    Raises:
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.
    """
    candidates = (
        [name for name in BACKENDS if name != "reference"] if backend is None else [backend]
    )
    reasons = []
    for name in candidates:
        obstacles = _OBSTACLES[name](op, features, k)
        if not obstacles:
            return name
        reasons.append(f"{name}: {'; '.join(obstacles)}")
    asked = "no backend supports" if backend is None else f"backend {backend!r} does not support"
    message = f"{op}: {asked} these inputs ({' | '.join(reasons)})"
    raise NotImplementedError(message)


def backend_report() -> dict[str, str]:
    """Of each backend, "available" or why it is missing here."""
    return {
        "cpu": "available",
        "cuda": _availability(missing_for_cuda()),
        "triton": _availability(_missing_for_triton()),
        "reference": "available",
    }


def _availability(missing: list[str]) -> str:
    return f"missing: {'; '.join(missing)}" if missing else "available"
