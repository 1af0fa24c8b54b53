"""Blocks that some samples skip."""

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Leaves out a branch for some samples in training; of the others it is scaled up as much.

    Args:
        rate: Share of samples, 0 <= rate < 1.

    Source: Huang et al., Deep networks with stochastic depth, ECCV 2016, arXiv:1603.09382.

    Examples:
        >>> StochasticDepth(0.5).eval()(torch.ones(2, 1))
        tensor([[1.],
                [1.]])
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            message = f"StochasticDepth: rate must be in [0, 1), got {rate}"
            raise ValueError(message)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same."""
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1.0 - self.rate)

    def extra_repr(self) -> str:
        """As in ``0.1``."""
        return f"{self.rate:g}"
