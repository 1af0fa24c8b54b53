"""What the losses do that depends on values: ops that torch.compile takes as they are.

In a graph, traced or captured, nothing is raised while it runs: see ``_capture``.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from pyfeat._capture import is_capturing

P = ParamSpec("P")
R = TypeVar("R")


def opaque(fake: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function of tensors without gradients an op wherever a graph is traced.

    Args:
        fake: Returns new tensors of the right shape and dtype, whatever they hold.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__.lstrip("_")
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"pyfeat::{name}", schema)
        torch.library.impl(f"pyfeat::{name}", "default", function)
        torch.library.register_fake(f"pyfeat::{name}", fake)
        op = getattr(torch.ops.pyfeat, name)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return (op if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call

    return register


def zero(values: Tensor, *arguments: object) -> Tensor:
    """What an opaque check returns for ``confirmed``."""
    return values.new_zeros(())


def confirmed(values: Tensor, zero: Tensor) -> Tensor:
    """The values, which in a graph depend on their check: it is not dropped, or makes them NaN."""
    return values + zero if torch.compiler.is_compiling() or is_capturing(values) else values
