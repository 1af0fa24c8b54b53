"""The one place where a configuration becomes an optimiser and its rate."""

from collections.abc import Iterable

import torch
from torch import nn

from pyfeat.ssl.config import Optimiser
from pyfeat.ssl.parts.optimisers import LARS
from pyfeat.ssl.parts.schedules import Schedule


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


def learning_rate(settings: Optimiser, *, steps_per_epoch: int, total: int) -> Schedule:
    """Return the factor of the learning rate in every step, counted from 0.

    It rises to 1 with the last step of the warm-up, the first of which has a share too, and falls along
    half a cosine to ``final_lr``, which the step after the last would have. A warm-up longer than the run
    takes all of it.

    Args:
        settings: Warm-up and final factor.
        steps_per_epoch: Of the run, >= 1.
        total: Steps of the run, >= 1.

    Examples:
        >>> rate = learning_rate(Optimiser(warmup_epochs=2), steps_per_epoch=1, total=5)
        >>> [round(rate(step), 3) for step in range(6)]
        [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    rise = min(total, max(1, round(settings.warmup_epochs * steps_per_epoch)))
    return Schedule(1.0, settings.final_lr, total=total + 1, warmup=rise - 1, first=1 / rise)
