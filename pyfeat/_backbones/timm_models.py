"""Models of timm, by ``features_only``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyfeat._backbones.body import IMAGENET_MEAN, IMAGENET_STD, Body, hash_weights
from pyfeat._backbones.layers import OP, default_layers
from pyfeat._extras import require


class _TimmBody(Body):
    """A timm model made with ``features_only``."""

    def __init__(self, network: Any, layers: tuple[str, ...], order: Sequence[int]) -> None:
        super().__init__(layers, hash_weights(network))
        config = getattr(network, "pretrained_cfg", {})
        self.mean = config.get("mean", IMAGENET_MEAN)
        self.std = config.get("std", IMAGENET_STD)
        self.network = network
        self.order = order
        self.is_nhwc = getattr(network, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = self.network(images)
        maps = [outputs[index] for index in self.order]
        return [features.permute(0, 3, 1, 2) for features in maps] if self.is_nhwc else maps


def load_timm(name: str, layers: tuple[str, ...] | None) -> Body:
    """Load a pretrained model; None takes its default layers."""
    timm = require("timm", extra="timm", op=OP)
    try:
        if layers is None:
            # Without weights and at every depth, only to learn the strides.
            info = timm.create_model(name, pretrained=False, features_only=True).feature_info.info
            strides = [int(stage["reduction"]) for stage in info]
            layers = default_layers([str(index) for index in range(len(info))], strides)
        indices = sorted(int(layer) for layer in layers)
        network = timm.create_model(
            name, pretrained=True, features_only=True, out_indices=tuple(indices)
        )
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        message = (
            f"{OP}: spec and layers must be a timm model with features_only and indices of its "
            f"maps, got 'timm:{name}' and {layers} ({error})"
        )
        raise ValueError(message) from error
    return _TimmBody(network, layers, [indices.index(int(layer)) for layer in layers])
