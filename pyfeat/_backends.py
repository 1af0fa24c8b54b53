"""Which backend runs an op, and why the others cannot.

Each backend lists what stands in its way for the inputs at hand; the first with nothing in its
way runs. A backend asked for by name runs or raises: it is never replaced in silence.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

Backend = Literal["cpu", "reference"]
Obstacles = Callable[[Tensor], list[str]]


def _cpu_obstacles(features: Tensor) -> list[str]:
    if features.device.type != "cpu":
        return [f"inputs are on {features.device}"]
    return []


def _no_obstacles(features: Tensor) -> list[str]:
    return []


# In order of preference. The reference is slow by design and runs only when it is asked for.
_OBSTACLES: Mapping[Backend, Obstacles] = {"cpu": _cpu_obstacles, "reference": _no_obstacles}
BACKENDS: tuple[Backend, ...] = tuple(_OBSTACLES)


def select_backend(op: str, backend: Backend | None, features: Tensor) -> Backend:
    """The backend to run ``op`` on inputs like ``features``.

    Raises:
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.
    """
    candidates = (
        [name for name in BACKENDS if name != "reference"] if backend is None else [backend]
    )
    reasons = []
    for name in candidates:
        obstacles = _OBSTACLES[name](features)
        if not obstacles:
            return name
        reasons.append(f"{name}: {'; '.join(obstacles)}")
    asked = "no backend supports" if backend is None else f"backend {backend!r} does not support"
    message = f"{op}: {asked} these inputs ({' | '.join(reasons)})"
    raise NotImplementedError(message)
