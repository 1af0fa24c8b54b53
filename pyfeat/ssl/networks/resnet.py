"""Residual networks of images and volumes that give the maps of all stages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.ssl.networks.intensities import Intensities
from pyfeat.ssl.options import AT_LEAST_ONE
from pyfeat.ssl.parts.batch_norm import BatchNorm
from pyfeat.ssl.registry import NETWORKS


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": BatchNorm, "group": _group_norm}
_CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class ResNetOptions:
    """Options of ``ResNet``; as they stand, a network for minutes on a CPU."""

    width: Annotated[
        int, "Channels of the first stage; each other has twice more.", AT_LEAST_ONE
    ] = 32
    blocks: Annotated[tuple[int, ...], "Residual blocks of each stage.", AT_LEAST_ONE] = (
        1,
        1,
        1,
        1,
    )
    stem: Annotated[
        Literal["7x7", "3x3"], "A stride of 4 to begin with, or of 2 for small images."
    ] = "3x3"
    in_channels: Annotated[int, "Channels of the input.", AT_LEAST_ONE] = 3
    ndim: Annotated[Literal[2, 3], "2 for images, 3 for volumes."] = 2
    norm: Annotated[
        Literal["batch", "group"],
        "batch takes statistics over the samples of a batch; group does not: samples tell nothing of "
        "each other, as losses with a queue need on one device. In groups of 8 channels, or all.",
    ] = "batch"

    def __post_init__(self) -> None:
        if not self.blocks:
            message = "blocks must be given for one stage at least, got none"
            raise ValueError(message)


@NETWORKS.register("resnet", ResNetOptions)
class ResNet(nn.Module):
    """A residual network of basic blocks, with the parameter names of torchvision and timm.

    With ``width=64, blocks=(2, 2, 2, 2), stem="7x7"`` its state is that of ``resnet18`` without its
    classifier. Batch statistics in training are those of all processes.

    Args:
        options: As ``ResNetOptions``.

    Attributes:
        feature_dim: Channels of the last stage.
        map_dims: Channels of every stage.

    Source: He et al., Deep residual learning, CVPR 2016, arXiv:1512.03385.

    Examples:
        >>> network = ResNet(ResNetOptions(width=8, blocks=(1, 1)))
        >>> network(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 16])
        >>> [tuple(features.shape) for features in network.maps(torch.ones(2, 3, 32, 32))]
        [(2, 8, 16, 16), (2, 16, 8, 8)]
    """

    def __init__(self, options: ResNetOptions | None = None) -> None:
        super().__init__()
        options = ResNetOptions() if options is None else options
        self.options = options
        ndim, width = options.ndim, options.width
        self.intensities = Intensities(options.in_channels)
        side = int(options.stem[0])
        self.conv1 = _CONVOLUTIONS[ndim](
            options.in_channels, width, side, stride=2, padding=side // 2, bias=False
        )
        norm = _NORMS[options.norm]
        self.bn1 = norm(width)
        self.map_dims = [width * 2**i for i in range(len(options.blocks))]
        previous = width
        for i, (channels, count) in enumerate(zip(self.map_dims, options.blocks, strict=True)):
            stage = [
                _Block(
                    previous if j == 0 else channels, channels, 2 if i and not j else 1, ndim, norm
                )
                for j in range(count)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            previous = channels
        self.feature_dim = previous
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block):  # a block begins as the identity
                nn.init.zeros_(module.bn2.get_parameter("weight"))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the maps (B, C, h, w) of all stages, (B, C, d, h, w) of volumes, fine to coarse.

        Args:
            images: (B, C, H, W), or (B, C, D, H, W) if ``ndim`` is 3, in [0, 1].

        Raises:
            ValueError: If the shape does not suit.
        """
        options = self.options
        if images.ndim != options.ndim + 2 or images.shape[1] != options.in_channels:
            axes = "H, W" if options.ndim == 2 else "D, H, W"
            message = (
                f"ResNet: images must have shape (B, {options.in_channels}, {axes}), "
                f"got {tuple(images.shape)}"
            )
            raise ValueError(message)
        x = functional.relu(self.bn1(self.conv1(self.intensities(images))))
        if options.stem == "7x7":
            pool = functional.max_pool2d if options.ndim == 2 else functional.max_pool3d
            x = pool(x, 3, stride=2, padding=1)
        maps = []
        for i in range(len(self.map_dims)):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return maps

    def features_and_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the means of the last map, (B, D), and its places row by row, (B, P, D)."""
        patches = self.maps(images)[-1].flatten(2).mT
        return patches.mean(dim=1), patches

    def forward(self, images: Tensor) -> Tensor:
        """Compute the means of the last map, (B, D)."""
        return self.maps(images)[-1].flatten(2).mean(dim=2)


class _Block(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        ndim: int,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[ndim]
        self.conv1 = convolution(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = convolution(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                convolution(in_channels, channels, 1, stride=stride, bias=False),
                norm(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        short = x if self.downsample is None else self.downsample(x)
        return functional.relu(y + torch.as_tensor(short))
