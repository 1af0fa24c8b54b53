"""The one place where a configuration becomes an optimiser."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pyfeat.ssl.config import Optimiser
from pyfeat.ssl.parts.optimisers import LARS


def make_optimiser(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: Optimiser
) -> torch.optim.Optimizer:
    """Make an optimiser of the parameters that need gradients.

    Args:
        parameters: Names and parameters. Those with fewer than two axes have no weight decay,
            and no trust ratio in lars.
        settings: Rule and numbers.

    Raises:
        ValueError: If no parameter needs a gradient.
    """
    wanted = [parameter for _, parameter in parameters if parameter.requires_grad]
    if not wanted:
        message = "make_optimiser: parameters must hold one that needs a gradient, got none"
        raise ValueError(message)
    groups = [
        {"params": [p for p in wanted if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in wanted if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    if settings.name == "lars":
        return LARS(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def scale_weight_decay(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set weight decays to those that the optimiser was made with, times a factor."""
    for group in optimiser.param_groups:
        first = group.setdefault("first_weight_decay", group["weight_decay"])
        group["weight_decay"] = first * factor


def warm_cosine(step: int, warmup: int, total: int, final: float) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    It rises to 1 over ``warmup`` steps, the first of which has ``1 / warmup``, and falls along half a
    cosine to ``final``, which the step after the last would have.

    Examples:
        >>> [round(warm_cosine(step, 2, 6, 0.0), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
