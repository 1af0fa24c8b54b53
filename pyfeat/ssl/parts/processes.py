"""What processes that train together tell each other, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum tensors of one shape; the gradient of each is the sum of all processes' gradients."""
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


def rows_of_all_processes(rows: Tensor) -> Tensor:
    """Return (W B, ...), the B rows of each of W processes in their order; the rows alone.

    The gradient is the sum of all processes' gradients: of a loss that all take of the same rows, the
    mean over processes is what one process with all rows would have.

    Args:
        rows: (B, ...), with the same B in every process.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    places = rows.new_zeros(dist.get_world_size(), *rows.shape)
    places[dist.get_rank()] = rows
    return sum_over_processes(places).flatten(0, 1)


class _Sum(torch.autograd.Function):
    """The sum over processes; the gradient is the sum of all theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
