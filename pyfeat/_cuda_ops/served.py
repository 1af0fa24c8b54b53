"""What the CUDA kernels serve: one line for each op, read when a backend is chosen."""

from collections.abc import Callable, Mapping

from torch import Tensor

# Obstacles of the inputs of an op, beyond those of the machine: features, k -> reasons.
InputObstacles = Callable[[Tensor, int], list[str]]

SERVED: Mapping[str, InputObstacles] = {}
