"""An optimiser for large batches."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Stochastic gradient descent whose steps are in proportion to the size of each weight.

    ``g += weight_decay w;  g *= trust |w| / |g|;  v = momentum v + g;  w -= lr v``. The second is
    left out for weights with fewer than two axes, and where a norm is 0.

    Args:
        params: Parameters or groups.
        lr: >= 0.
        momentum: In [0, 1).
        weight_decay: >= 0.
        trust: > 0.

    Raises:
        ValueError: If a value is out of range.

    Source: You et al., Large batch training of convolutional networks, 2017, arXiv:1708.03888, as
    in SimCLR, arXiv:2002.05709, and MoCo v3, arXiv:2104.02057.

    Examples:
        >>> weight = torch.ones(1, 4, requires_grad=True)
        >>> weight.grad = torch.full((1, 4), 100.0)
        >>> LARS([weight], lr=1.0, trust=0.5).step()
        >>> weight.detach()
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        for name, value, valid, wanted in (
            ("lr", lr, lr >= 0.0, "at least 0"),
            ("momentum", momentum, 0.0 <= momentum < 1.0, "in [0, 1)"),
            ("weight_decay", weight_decay, weight_decay >= 0.0, "at least 0"),
            ("trust", trust, trust > 0.0, "positive"),
        ):
            if not valid:
                message = f"LARS: {name} must be {wanted}, got {value}"
                raise ValueError(message)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        step = gradient.add(parameter, alpha=group["weight_decay"])
        if parameter.ndim > 1:
            size, slope = parameter.norm(), step.norm()
            ratio = group["trust"] * size / slope
            step = step * torch.where((size > 0) & (slope > 0), ratio, 1.0)
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        state["velocity"].mul_(group["momentum"]).add_(step)
        parameter.add_(state["velocity"], alpha=-group["lr"])
