"""Small models of transformers with deformable attention, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 5,
    "num_labels": 3,
}
REAL_TIME: dict[str, Any] = {
    **SMALL,
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}


def _resnet(config: Any) -> Any:
    return config(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _swin(stages: list[str]) -> Any:
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=stages,
    )


def deformable_detr(**options: Any) -> nn.Module:
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=_resnet(transformers.ResNetConfig),
        **SMALL,
        **options,
    )
    return transformers.DeformableDetrForObjectDetection(config)  # type: ignore[no-any-return]


def _rt_detr() -> nn.Module:
    backbone = _resnet(transformers.RTDetrResNetConfig)
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[8, 16, 16], **REAL_TIME
    )
    return transformers.RTDetrForObjectDetection(config)  # type: ignore[no-any-return]


def _rt_detr_v2(method: str) -> nn.Module:
    config = transformers.RTDetrV2Config(
        backbone_config=_resnet(transformers.RTDetrResNetConfig),
        encoder_in_channels=[8, 16, 16],
        decoder_method=method,
        **REAL_TIME,
    )
    return transformers.RTDetrV2ForObjectDetection(config)  # type: ignore[no-any-return]


def d_fine() -> nn.Module:
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_light_block=[False] * 4,
        stage_kernel_size=[3] * 4,
        stage_numb_of_layers=[1] * 4,
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        decoder_n_points=[3, 2, 1],
        **REAL_TIME,
    )
    return transformers.DFineForObjectDetection(config)  # type: ignore[no-any-return]


def _mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin(["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        num_attention_heads=4,
        dim_feedforward=16,
        decoder_layers=2,
        num_queries=5,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)  # type: ignore[no-any-return]


def _grounding_dino() -> nn.Module:
    text = transformers.BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=_swin(["stage2", "stage3", "stage4"]), text_config=text, **SMALL
    )
    return transformers.GroundingDinoForObjectDetection(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Deformable DETR": deformable_detr,
    "RT-DETR": _rt_detr,
    "RT-DETRv2": lambda: _rt_detr_v2("default"),
    "RT-DETRv2 discrete": lambda: _rt_detr_v2("discrete"),
    "D-FINE": d_fine,
    "Mask2Former": _mask2former,
    "Grounding DINO": _grounding_dino,
}


def outputs_and_gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Everything a model gives, and the gradient of the sum of its squares by every parameter."""
    inputs: dict[str, Tensor] = {"pixel_values": images}
    if "GroundingDino" in type(model).__name__:
        inputs["input_ids"] = torch.tensor([[101, 5, 6, 102]] * len(images))
    model.zero_grad()
    found = {
        name: value
        for name, value in model(**inputs).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    # Some logits are -inf where there is no token.
    total = torch.stack([x.where(x.isfinite(), 0.0).square().sum() for x in found.values()]).sum()
    torch.autograd.backward(total)
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: x.detach().clone() for name, x in {**found, **gradients}.items()}
