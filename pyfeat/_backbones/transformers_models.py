"""Models of transformers, from a folder or the Hub."""

import copy
import inspect
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import IMAGENET_MEAN, IMAGENET_STD, Body, hash_weights
from pyfeat._backbones.layers import OP, check_known, default_layers, to_map
from pyfeat._extras import require


class _TransformersBody(Body):
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

    def size_obstacle(self, height: int, width: int) -> str | None:
        if self.patch is None or not (height % self.patch[0] or width % self.patch[1]):
            return None
        patch = f"{self.patch[0]} x {self.patch[1]}"
        return f"have sides that are multiples of the patch size {patch}"

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = self.outputs(images)
        size = images.shape[2], images.shape[3]
        return [to_map(outputs[layer], layer, size, self.patch) for layer in self.layers]

    def outputs(self, images: Tensor) -> dict[str, Any]:
        """Return whatever the model gives, by layer name."""
        output = self.model(pixel_values=images, **self.options)
        if hasattr(self.model, "out_features"):
            return dict(zip(self.model.out_features, output.feature_maps, strict=True))
        return {str(index): state for index, state in enumerate(output.hidden_states or ())}


def load_transformers(name: str, layers: tuple[str, ...] | None) -> Body:
    """Load a pretrained model; None takes its default layers."""
    transformers = require("transformers", extra="hf", op=OP)
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
        message = f"{OP}: spec must name a model of images, got 'hf:{name}'"
        raise ValueError(message)
    body = _TransformersBody(model, hash_weights(model, skip=missing))
    body.mean, body.std = _hub_normalisation(transformers, name)
    if body.patch is None:
        known, strides = _probe(body)
    else:
        depth = model.config.num_hidden_layers
        known = list(config.stage_names) if is_backbone else [str(i) for i in range(depth + 1)]
        strides = [body.patch[0]] * len(known)
    body.layers = layers or default_layers(known, strides)
    check_known(body.layers, known, f"hf:{name}")
    if is_backbone:
        model.out_features = [stage for stage in known if stage in body.layers]
    return body


def _from_pretrained(factory: Any, name: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        message = (
            f"{OP}: spec must name a transformers model in a local folder or on the Hub, "
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
            f"{OP}: spec must name a checkpoint with all weights of {type(model).__name__}, "
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
        layer: round(height / to_map(output, layer, (height, width), None).shape[2])
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
            message = f"{OP}: spec must name a model of RGB images, got 'hf:{name}' for BGR"
            raise ValueError(message)
        if not settings.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        if settings.get("image_mean") and settings.get("image_std"):
            return settings["image_mean"], settings["image_std"]
    return IMAGENET_MEAN, IMAGENET_STD
