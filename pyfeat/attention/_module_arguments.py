"""Arguments of the attention modules, checked."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyfeat._checks import check_count


def check_heads(op: str, embed_dim: int, num_heads: int) -> None:
    """Raise unless both are counts and the heads share the features evenly."""
    check_count(op, "embed_dim", embed_dim)
    check_count(op, "num_heads", num_heads)
    if embed_dim % num_heads:
        message = f"{op}: embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}"
        raise ValueError(message)


def points_of_levels(op: str, num_points: int | Sequence[int], num_levels: int) -> list[int]:
    """The points of every level, from one count for all or a count for each."""
    check_count(op, "num_levels", num_levels)
    if not isinstance(num_points, Sequence):
        check_count(op, "num_points", num_points)
        return [num_points] * num_levels
    if len(num_points) != num_levels:
        message = f"{op}: num_points must have a count for {num_levels} levels, got {num_points}"
        raise ValueError(message)
    for level, count in enumerate(num_points):
        check_count(op, f"num_points[{level}]", count)
    return list(num_points)


def check_tensor(op: str, name: str, tensor: Any, *shapes: Sequence[int | str]) -> None:
    """Raise unless ``tensor`` has one of ``shapes``, in which letters stand for any size."""
    if not isinstance(tensor, Tensor):
        message = f"{op}: {name} must be a tensor, got {type(tensor).__name__}"
        raise TypeError(message)
    for shape in shapes:
        if len(shape) == tensor.ndim and all(
            isinstance(wanted, str) or wanted == size
            for wanted, size in zip(shape, tensor.shape, strict=True)
        ):
            return
    wanted = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
    message = f"{op}: {name} must have shape {wanted}, got {tuple(tensor.shape)}"
    raise ValueError(message)
