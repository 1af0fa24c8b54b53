"""A U-Net whose skip connections can be switched."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class UNet(nn.Module):
    """Images to images of the same size, in (0, 1).

    Each level has two 3x3 convolutions with batch normalisation; going down halves the sides by
    the maximum, going up doubles them by the nearest.

    Args:
        width: Channels of the finest level; each level below has twice more, at most 8 times it.
        levels: How often the sides are halved, at least 1.
        channels: Of the images.

    Raises:
        ValueError: If an argument is below 1.

    Source: Ronneberger et al., U-Net, MICCAI 2015, arXiv:1505.04597.

    Examples:
        >>> UNet(width=4, levels=2)(torch.rand(1, 3, 30, 17)).shape
        torch.Size([1, 3, 30, 17])
    """

    def __init__(self, width: int = 32, levels: int = 4, channels: int = 3) -> None:
        super().__init__()
        if min(width, levels, channels) < 1:
            message = (
                f"UNet: width, levels and channels must be at least 1, got {width}, {levels} and "
                f"{channels}"
            )
            raise ValueError(message)
        dims = [width * min(8, 2**i) for i in range(levels + 1)]
        self.levels = levels
        self.down = nn.ModuleList(
            _convolutions(a, b) for a, b in zip([channels, *dims[:-2]], dims[:-1], strict=True)
        )
        self.bottom = _convolutions(dims[-2], dims[-1])
        self.up = nn.ModuleList(
            _convolutions(dims[i + 1] + dims[i], dims[i]) for i in range(levels)
        )
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor, skips: Sequence[bool] | None = None) -> Tensor:
        """Compute images (B, C, H, W) from images of any size.

        Args:
            images: (B, C, H, W).
            skips: Which skip connections are on, from the finest level down; None is all. One that
                is off passes zeros.
        """
        on = [True] * self.levels if skips is None else list(skips)
        if len(on) != self.levels:
            message = f"UNet: skips must be {self.levels} switches, got {len(on)}"
            raise ValueError(message)
        height, width = images.shape[2:]
        multiple = 2**self.levels
        x = functional.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        kept = []
        for stage in self.down:
            x = stage(x)
            kept.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for i in reversed(range(self.levels)):
            skip = kept[i] if on[i] else torch.zeros_like(kept[i])
            x = self.up[i](torch.cat([functional.interpolate(x, scale_factor=2.0), skip], dim=1))
        whole: Tensor = self.last(x).sigmoid()
        return whole[:, :, :height, :width]


def _convolutions(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )
