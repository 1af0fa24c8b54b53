"""Small networks that train on a CPU in minutes; each enters itself in ``NETWORKS``."""

from typing import Any

from pyfeat.ssl.networks.resnet import ResNet, ResNetOptions
from pyfeat.ssl.networks.vit import ViT, ViTOptions
from pyfeat.ssl.options import read_options
from pyfeat.ssl.registry import NETWORKS

__all__ = ["ResNet", "ResNetOptions", "ViT", "ViTOptions", "build"]


def build(name: str, **options: Any) -> Any:
    """Make a network by its name.

    Args:
        name: As in a configuration, such as "resnet" or "vit".
        options: Its options by name.

    Returns:
        The network: images to features (B, D), with ``maps`` and ``feature_dim``.

    Raises:
        ValueError: If the name or an option is unknown, or a value is of another type or out of
            range.

    Examples:
        >>> build("resnet", width=8).feature_dim
        64
    """
    entry = NETWORKS.find(name)
    return entry.make(read_options("build", name, entry.options, options))
