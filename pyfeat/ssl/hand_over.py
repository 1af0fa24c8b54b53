"""Trained backbones in the layouts of timm and transformers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from pyfeat._checks import check_choice
from pyfeat._storage import PathLike, replaced_folder, write_safetensors
from pyfeat.ssl.networks.resnet import ResNet
from pyfeat.ssl.networks.vit import ViT
from pyfeat.ssl.runs import Run

OP = "pyfeat export"
Format = Literal["timm", "transformers"]
FORMATS = ("timm", "transformers")
MARKER = "pyfeat.json"

# Names of checkpoints, which every version of transformers reads; modules are named after others since 5.
_VIT_NAMES = {
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^blocks\.": "encoder.layer.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
    r"^norm\.": "layernorm.",
}
# "pre_layrnorm" is how transformers spells it.
_CLIP_NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding.weight",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm_pre\.": "pre_layrnorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"^norm\.": "post_layernorm.",
    "^": "vision_model.",
}
_RESNET_NAMES = {
    r"^conv1\.": "embedder.embedder.convolution.",
    r"^bn1\.": "embedder.embedder.normalization.",
    r"\.conv1\.": ".layer.0.convolution.",
    r"\.bn1\.": ".layer.0.normalization.",
    r"\.conv2\.": ".layer.1.convolution.",
    r"\.bn2\.": ".layer.1.normalization.",
    r"\.downsample\.0\.": ".shortcut.convolution.",
    r"\.downsample\.1\.": ".shortcut.normalization.",
}


@dataclass(frozen=True)
class Export:
    """A backbone as another library has it.

    Attributes:
        format: Of which library.
        weights: By the names of its checkpoints; what follows the features, such as a classifier, is
            left out.
        config: What its ``config.json`` says of the network.
        processing: What its ``preprocessor_config.json`` says of pixels; empty for timm, whose
            ``config.json`` has that too.
    """

    format: Format
    weights: dict[str, Tensor]
    config: dict[str, Any]
    processing: dict[str, Any]

    def save(self, folder: PathLike, *, force: bool = False) -> None:
        """Write a folder that the library loads from.

        With timm by ``create_model("local-dir:FOLDER", pretrained=True)``, with transformers by
        ``AutoModel.from_pretrained("FOLDER")``.

        Args:
            folder: Appears whole or not at all.
            force: Replace what an earlier export wrote.

        Raises:
            FileExistsError: If the folder exists and may not be replaced.
            ImportError: If safetensors is not installed.
        """
        weights = {name: value.contiguous() for name, value in self.weights.items()}
        with replaced_folder(OP, Path(folder), marker=MARKER, force=force) as partial:
            # Without this note, transformers does not read the file.
            write_safetensors(OP, partial / "model.safetensors", weights, {"format": "pt"})
            texts = {"config.json": self.config, MARKER: {"format": self.format}}
            if self.processing:
                texts["preprocessor_config.json"] = self.processing
            for name, text in texts.items():
                (partial / name).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def export(run: Run | PathLike, *, format: Format) -> Export:
    """Return the backbone of a run as timm or transformers have it.

    In evaluation mode the other library's network has the features of ours, if it is given pixels as
    ``config`` or ``processing`` say. timm builds a ``ViT`` of any size, and of a ``ResNet`` those with
    ``width=64, stem="7x7"`` and four stages; transformers builds a ``ViT`` of any size, and a ``ResNet``
    with ``stem="7x7"``; both with batch norm. Neither has volumes. A ``ViT`` whose features are means
    of patches has these features in timm; the pooler of transformers is another, and the mean of
    ``last_hidden_state[:, 1:]`` is theirs. One with ``pre_norm`` is a ``CLIPVisionModel`` there, whose
    ``pooler_output`` is the class token; its last states are not yet normalised.

    Args:
        run: A run, or its folder, of which the newest checkpoint is taken.
        format: "timm" or "transformers".

    Returns:
        Weights and configuration; ``save`` writes them.

    Raises:
        FileNotFoundError: If there is no run, or no checkpoint in it.
        ValueError: If the format is unknown, or the library has no such network; says why.
    """
    check_choice(OP, "format", format, FORMATS)
    run = run if isinstance(run, Run) else Run(run)
    network = run.backbone()
    reasons = _obstacles(network, format)
    if reasons:
        message = f"{OP}: network must be one that {format} has, got {run.folder}: "
        raise ValueError(message + "; ".join(reasons))
    pixels = _pixels(network, run.sample_shape)
    weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
    if format == "timm":
        return Export(format, weights, _timm_config(network, pixels), {})
    if isinstance(network, ViT):
        renamed = (_clip_weights if network.options.pre_norm else _vit_weights)(weights)
        return Export(format, renamed, _vit_config(network), _processing(pixels))
    return Export(format, _resnet_weights(weights), _resnet_config(network), _processing(pixels))


def _obstacles(network: nn.Module, format: Format) -> list[str]:
    """Say why a library cannot build a network."""
    if not isinstance(network, ResNet | ViT):
        return [f"it is neither a ResNet nor a ViT but a {type(network).__name__}"]
    if network.options.ndim != 2:
        return ["it is one of volumes"]
    if isinstance(network, ViT):
        return []
    options, found = network.options, []
    if options.norm != "batch":
        found.append(f"its norm is {options.norm}, not batch")
    if options.stem != "7x7":
        found.append(f"its stem is {options.stem}, not 7x7")
    if format == "timm" and options.width != 64:
        found.append(f"its width is {options.width}, not 64")
    if format == "timm" and len(options.blocks) != 4:
        found.append(f"it has {len(options.blocks)} stages, not 4")
    return found


def _pixels(network: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Size, mean and standard deviation of the pixels that a network takes."""
    intensities: Any = network.intensities
    return {
        "size": [network.options.image_size] * 2 if isinstance(network, ViT) else list(shape[-2:]),
        "mean": [round(float(x), 6) for x in intensities.mean],
        "std": [round(float(x), 6) for x in intensities.std],
    }


def _timm_config(network: Any, pixels: Mapping[str, Any]) -> dict[str, Any]:
    options = network.options
    arguments: dict[str, Any] = {"in_chans": options.in_channels}
    if isinstance(network, ViT):
        name, classifier, first = "vit_base_patch16_224", "head", "patch_embed.proj"
        arguments |= {
            "img_size": options.image_size,
            "patch_size": options.patch_size,
            "embed_dim": options.width,
            "depth": options.depth,
            "num_heads": options.heads,
            "mlp_ratio": options.mlp_ratio,
            "global_pool": "token" if options.pool == "class" else "avg",
            "fc_norm": False,
        }
        if options.pre_norm:
            arguments["pre_norm"] = True
        if options.activation != "gelu":
            arguments["act_layer"] = options.activation
    else:
        name, classifier, first = "resnet18", "fc", "conv1"
        arguments |= {"layers": list(options.blocks)}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": network.feature_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [options.in_channels, *pixels["size"]],
            "fixed_input_size": isinstance(network, ViT),
            "mean": pixels["mean"],
            "std": pixels["std"],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            "classifier": classifier,
            "first_conv": first,
        },
    }


def _vit_config(network: ViT) -> dict[str, Any]:
    options = network.options
    if options.pre_norm:
        model = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
        rest = {"attention_dropout": 0.0, "projection_dim": options.width}
    else:
        model = {"architectures": ["ViTModel"], "model_type": "vit"}
        rest = {"qkv_bias": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        **model,
        "hidden_size": options.width,
        "num_hidden_layers": options.depth,
        "num_attention_heads": options.heads,
        "intermediate_size": round(options.width * options.mlp_ratio),
        "hidden_act": options.activation,
        "layer_norm_eps": network.norm.eps,
        "image_size": options.image_size,
        "patch_size": options.patch_size,
        "num_channels": options.in_channels,
        **rest,
    }


def _resnet_config(network: Any) -> dict[str, Any]:
    options = network.options
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": options.in_channels,
        "embedding_size": options.width,
        "hidden_sizes": list(network.map_dims),
        "depths": list(options.blocks),
        "layer_type": "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
    }


def _processing(pixels: Mapping[str, Any]) -> dict[str, Any]:
    height, width = pixels["size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear, as Pillow numbers it
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
    }


def _vit_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
    return {_renamed(n, _VIT_NAMES): value for n, value in _split_qkv(weights, parts).items()}


def _clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = [f"self_attn.{part}_proj" for part in "qkv"]
    flat = {
        **weights,
        "cls_token": weights["cls_token"].flatten(),
        "pos_embed": weights["pos_embed"].squeeze(0),
    }
    return {_renamed(n, _CLIP_NAMES): value for n, value in _split_qkv(flat, parts).items()}


def _split_qkv(weights: Mapping[str, Tensor], parts: Sequence[str]) -> dict[str, Tensor]:
    """Queries, keys and values of each block under names of their own."""
    split: dict[str, Tensor] = {}
    for name, value in weights.items():
        block, joined, kind = name.partition("attn.qkv.")
        if joined:
            for part, rows in zip(parts, value.chunk(3), strict=True):
                split[f"{block}{part}.{kind}"] = rows.clone()
        else:
            split[name] = value
    return split


def _resnet_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def stage(match: re.Match[str]) -> str:
        return f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}."

    pattern = re.compile(r"^layer(\d+)\.(\d+)\.")
    return {
        pattern.sub(stage, _renamed(name, _RESNET_NAMES)): value for name, value in weights.items()
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for pattern, text in names.items():
        name = re.sub(pattern, text, name)
    return name
