"""What the CUDA kernels serve: one line for each op, read when a backend is chosen."""

from collections.abc import Callable, Mapping

from torch import Tensor

from pyfeat._gpu import PAIR_OPS

# Obstacles of the inputs of an op, beyond those of the machine: features, k -> reasons.
InputObstacles = Callable[[Tensor, int], list[str]]


# Neighbours that the kernels keep for each query, and the widest features of which a block of rows
# fits the workspace.
_MAX_K = 64
_MAX_DIM = 1 << 17


def _search_obstacles(features: Tensor, k: int) -> list[str]:
    obstacles = []
    if k > _MAX_K:
        obstacles.append(f"k must be at most {_MAX_K}, got {k}")
    if features.shape[1] > _MAX_DIM:
        obstacles.append(f"features must have at most {_MAX_DIM} columns, got {features.shape[1]}")
    return obstacles


SERVED: Mapping[str, InputObstacles] = {
    "knn": _search_obstacles,
    "deform_attn": lambda value, k: [],
    **dict.fromkeys(PAIR_OPS, lambda features, k: []),
}
