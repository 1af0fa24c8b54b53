"""What a network makes of pixel values before it looks at them."""

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import IMAGENET_MEAN, IMAGENET_STD


class Intensities(nn.Module):
    """``(x - mean) / std`` of every channel, from [0, 1].

    Three channels have the statistics of ImageNet, as with timm; others 0.5 and 0.25. They are no
    part of a state dict.

    Args:
        channels: C.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean = IMAGENET_MEAN if channels == 3 else (0.5,) * channels
        std = IMAGENET_STD if channels == 3 else (0.25,) * channels
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same."""
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)
