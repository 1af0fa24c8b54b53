"""A teacher that follows its student as a running mean of its weights."""

import copy
from typing import Any

import torch
from torch import nn

from pyfeat.ssl.parts.stochastic_depth import StochasticDepth


class Teacher(nn.Module):
    """A copy of a module that does not learn but follows it.

    Buffers, such as the running statistics of a batch normalisation, are its own: it sees its own
    views. Parameters that the student does not learn are followed too, and stay equal. No sample
    skips a block of it.

    Args:
        student: The module; it is copied.

    Source: Tarvainen and Valpola, Mean teachers, NeurIPS 2017, arXiv:1703.01780.

    Examples:
        >>> student = nn.Linear(1, 1)
        >>> teacher = Teacher(student)
        >>> with torch.no_grad():
        ...     student.weight += 1.0
        >>> teacher.update(student, 0.75)
        >>> (student.weight - teacher.module.weight).item()
        0.75
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False)
        for part in self.module.modules():
            if isinstance(part, StochasticDepth):
                part.rate = 0.0

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float) -> None:
        """Take ``momentum`` of each weight and the rest from the student.

        Args:
            student: The module that was copied, or one like it.
            momentum: In [0, 1]; 1 leaves everything as it is.

        Raises:
            ValueError: If the momentum is out of range, or the modules differ.
        """
        if not 0.0 <= momentum <= 1.0:
            message = f"Teacher.update: momentum must be in [0, 1], got {momentum}"
            raise ValueError(message)
        theirs = dict(student.named_parameters())
        mine = dict(self.module.named_parameters())
        if {n: p.shape for n, p in theirs.items()} != {n: p.shape for n, p in mine.items()}:
            message = "Teacher.update: student must have the parameters that were copied"
            raise ValueError(message)
        for name, parameter in mine.items():
            parameter.lerp_(theirs[name].to(parameter), 1.0 - momentum)

    @torch.no_grad()
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the module computes, without gradients."""
        return self.module(*inputs, **options)
