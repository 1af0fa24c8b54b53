"""What tests of the losses over prototypes share: inputs, the usual loop, and what is stored."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support_losses import unit


def usual_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """As in SwAV's code, less the largest score of all."""
    q = torch.exp((scores - scores.max()) / epsilon).T
    num_prototypes, num_rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_rows
    return (q * num_rows).T


def inputs_of(
    rows: int, prototypes: int, dim: int, teacher_dim: int, views: int, teacher_views: int
) -> list[Tensor]:
    student = [unit(rows, dim) for _ in range(views)]
    teacher = [unit(rows, teacher_dim) for _ in range(teacher_views)]
    heads = [unit(prototypes, dim), unit(prototypes, teacher_dim)]
    return [*student, *teacher, *heads, 0.1 * torch.randn(prototypes)]


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the largest tensor that an operation makes, and elements."""

    num_bytes = num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, list | tuple) else (made,):
            # A view of what was there before makes nothing.
            if isinstance(x, Tensor) and not any(
                isinstance(y, Tensor)
                and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
                for y in args
            ):
                self.num_bytes = max(self.num_bytes, x.numel() * x.element_size())
                self.num_elements = max(self.num_elements, x.numel())
        return made
