"""Backbones that ``pyfeat train`` has trained."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import Body, hash_weights
from pyfeat._backbones.layers import OP, check_known, default_layers

if TYPE_CHECKING:
    from pyfeat.ssl.networks.slices import VolumeEncoder


class _TrainedBody(Body):
    """The stages of a network that takes pixels as they are, in [0, 1]."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, network: nn.Module, layers: tuple[str, ...], channels: int) -> None:
        super().__init__(layers, hash_weights(network))
        self.network, self.channels = network, channels

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.channels == 1:
            images = images.mean(dim=1, keepdim=True)
        maps: list[Tensor] = self.network.maps(images)  # type: ignore[operator]
        return [maps[int(layer)] for layer in self.layers]


def load_trained(folder: str, layers: tuple[str, ...] | None) -> Body:
    """Load the newest backbone of a run folder; None takes its default layers."""
    from pyfeat.ssl import Run

    run = Run(folder)
    channels, *size = run.sample_shape
    if len(size) == 3 and getattr(run.config.network.options, "ndim", 3) == 2:
        size = size[1:]  # a network of slices
    if len(size) != 2 or channels not in (1, 3):
        message = f"{OP}: spec must be a run on images, got {folder} on {run.sample_shape}"
        raise ValueError(message)
    network = run.backbone()
    with torch.no_grad():
        maps = network.maps(torch.zeros(1, channels, *size))  # type: ignore[operator]
    names = [str(index) for index in range(len(maps))]
    if layers is None:
        layers = default_layers(names, [round(size[0] / features.shape[2]) for features in maps])
    check_known(layers, names, f"run:{folder}")
    return _TrainedBody(network, layers, channels)


def load_trained_volumes(folder: str) -> "VolumeEncoder":
    """Load network and encoder of a run folder of ``image_volume``."""
    from pyfeat.ssl.networks.slices import SliceEncoder, VolumeEncoder
    from pyfeat.ssl.runs import Run

    run = Run(folder)
    objective = run.config.objective
    if objective.name != "image_volume":
        message = f"load_volumes: run must be of image_volume, got {folder} of {objective.name}"
        raise ValueError(message)
    network: Any = run.backbone()
    with torch.random.fork_rng():
        slices = SliceEncoder(list(network.map_dims), run.sample_shape[1], objective.options)
    slices = run.load_part(slices, "slices", "encoder of slices")
    return VolumeEncoder(network, slices).eval().requires_grad_(False)
