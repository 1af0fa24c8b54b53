"""Where images stand out: attention, energy of features and distance to a memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.saliency import AttentionSaliency, EnergySaliency, MemorySaliency
from pyfeat.features import load_backbone
from pyfeat.ssl.networks import ViT, ViTOptions
from tests.support_anomaly import LAYERS, network, plates

SIZE = (32, 32)


def vit() -> ViT:
    torch.manual_seed(1)
    return ViT(ViTOptions(image_size=32, patch_size=8, width=24, heads=3, depth=2)).eval()


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_attention_is_that_of_the_class_token_to_the_patches(heads: Any) -> None:
    net, images = vit(), torch.rand(2, 3, 32, 48)
    inputs: list[Tensor] = []
    last: Any = net.blocks[-1]
    last.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    net.tokens(images)
    qkv = last.attn.qkv(inputs[0]).view(2, 25, 3, 3, 8).permute(2, 0, 3, 1, 4)
    shares = (qkv[0] @ qkv[1].mT / 8**0.5).softmax(-1)[:, :, 0, 1:]  # [B, heads, T]
    shares = shares / shares.sum(-1, keepdim=True)
    attention = net.class_attention(images)
    torch.testing.assert_close(attention, shares.view(2, 3, 4, 6))
    found = AttentionSaliency(net, heads=heads)(images)
    expected = attention.mean(1) if heads == "mean" else attention.amax(1)
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_energy_is_the_length_of_the_features_and_memory_the_distance_to_normal_ones() -> None:
    images = torch.from_numpy(plates(4, 1, SIZE)).permute(0, 3, 1, 2) / 255
    energy = EnergySaliency(network(), layers=LAYERS)
    maps = load_backbone(network(), layers=LAYERS)(images)
    torch.testing.assert_close(energy(images), maps[-1].square().sum(1).sqrt())
    memory = MemorySaliency(network(), layers=LAYERS, coreset_ratio=0.5)
    with pytest.raises(ValueError, match="MemorySaliency: it must be fitted first"):
        memory(images)
    memory.fit(images.half())
    bank = PatchCore(network(), layers=LAYERS, image_size=SIZE, coreset_ratio=0.5)
    expected = bank.fit(images.half().float()).score(images)
    assert torch.equal(memory(images), expected.maps)


def test_sources_that_are_none_are_refused() -> None:
    with pytest.raises(TypeError, match=r"AttentionSaliency: network must be a ViT of pyfeat\.ssl"):
        AttentionSaliency(network())
    with pytest.raises(ValueError, match="network must be a ViT or 'run:<folder>', got 'vit'"):
        AttentionSaliency("vit")
    with pytest.raises(ValueError, match="AttentionSaliency: heads must be one of"):
        AttentionSaliency(vit(), heads="min")  # type: ignore[arg-type]
