"""Small networks: shapes, masks, positions and what a state dict is called."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.ssl.networks import ResNet, ResNetOptions, ViT, ViTOptions, build
from pyfeat.ssl.networks.vit import sine_positions

SMALL_VIT = ViTOptions(image_size=32, patch_size=8, width=24, heads=2, depth=5)


def test_a_resnet_gives_the_maps_of_all_stages() -> None:
    network = ResNet(ResNetOptions(width=8, blocks=(1, 2, 1), in_channels=1))
    maps = network.maps(torch.rand(2, 1, 40, 24))
    shapes = [tuple(x.shape) for x in maps]
    assert shapes == [(2, 8, 20, 12), (2, 16, 10, 6), (2, 32, 5, 3)]
    assert network.map_dims == [8, 16, 32]
    features = network.eval()(torch.rand(2, 1, 40, 24))
    assert features.shape == (2, network.feature_dim) == (2, 32)


def test_features_are_the_mean_of_the_last_map() -> None:
    for network in (ResNet(ResNetOptions(width=4)), ViT(ViTOptions(pool="mean"))):
        images = torch.rand(2, 3, 64, 64)
        network.eval()
        mean = network.maps(images)[-1].mean(dim=(2, 3))
        torch.testing.assert_close(network(images), mean)


def test_a_volume_has_maps_too() -> None:
    resnet = ResNet(ResNetOptions(width=4, blocks=(1, 1), in_channels=1, ndim=3, stem="7x7"))
    shapes = [tuple(x.shape) for x in resnet.maps(torch.rand(2, 1, 16, 24, 32))]
    assert shapes == [(2, 4, 4, 6, 8), (2, 8, 2, 3, 4)]
    options = ViTOptions(image_size=16, patch_size=8, width=24, depth=2, in_channels=1, ndim=3)
    vit = ViT(options)
    assert [tuple(x.shape) for x in vit.maps(torch.rand(2, 1, 8, 16, 24))] == [(2, 24, 1, 2, 3)] * 2
    assert vit(torch.rand(2, 1, 16, 16, 16)).shape == (2, 24)


def test_with_group_norm_samples_tell_nothing_of_each_other() -> None:
    images = torch.rand(4, 3, 32, 32)
    for norm, alone in (("group", True), ("batch", False)):
        network = ResNet(ResNetOptions(width=16, blocks=(1, 1), norm=norm))  # type: ignore[arg-type]
        features = network(images)  # in training
        assert torch.allclose(network(images[:2]), features[:2], atol=1e-5) == alone
        names = set(network.state_dict())
        assert {"bn1.weight", "layer2.0.bn2.bias"} <= names
        assert ("bn1.running_mean" in names) != alone
        assert not network.state_dict()["layer1.0.bn2.weight"].any()  # begins as the identity


def test_resnet18_has_the_parameters_that_others_know_it_by() -> None:
    options = ResNetOptions(width=64, blocks=(2, 2, 2, 2), stem="7x7")
    state = ResNet(options).state_dict()
    assert sum(x.numel() for n, x in state.items() if "running" not in n and "num" not in n) == (
        11_689_512 - 513_000  # without the classifier of a thousand classes
    )
    assert state["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert {name.split(".")[0] for name in state} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4",
    }  # fmt: skip


def test_a_small_vit_has_the_parameters_that_others_know_it_by() -> None:
    options = ViTOptions(image_size=224, patch_size=16, width=192, heads=3, depth=12)
    state = ViT(options).state_dict()
    # Of timm's vit_tiny_patch16_224, without its classifier.
    assert sum(x.numel() for x in state.values()) == 5_717_416 - 193_000
    assert state["pos_embed"].shape == (1, 197, 192)
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.11.attn.qkv.bias", "norm.weight"):
        assert name in state
    assert state["blocks.0.mlp.fc1.weight"].shape == (768, 192)


def test_patches_that_are_not_seen_do_not_matter() -> None:
    network = ViT(SMALL_VIT).eval()
    images, seen = torch.rand(2, 3, 32, 32), torch.tensor([[0, 3, 9], [5, 6, 15]])
    tokens = network.tokens(images, seen=seen)
    assert tokens.shape == (2, 4, 24)
    changed = images.clone()
    changed[0, :, 8:16, :8] = 0.0  # patch 4, which is hidden
    assert torch.equal(network.tokens(changed, seen=seen), tokens)
    changed[0, :, :8, :8] = 0.0  # patch 0
    assert not torch.allclose(network.tokens(changed, seen=seen)[0], tokens[0])
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(network.tokens(images, seen=every), network.tokens(images))
    # The order of what is seen decides the order of the tokens and nothing else.
    flipped = network.tokens(images, seen=seen.flip(1))
    torch.testing.assert_close(flipped[:, 1:].flip(1), tokens[:, 1:])


def test_a_mask_token_stands_for_hidden_patches() -> None:
    network, token = ViT(SMALL_VIT).eval(), torch.randn(24)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 4] = True
    images = torch.rand(1, 3, 32, 32)
    tokens = network.tokens(images, hidden=hidden, mask_token=token)
    changed = images.clone()
    changed[0, :, 8:16, :8] = 0.0
    assert torch.equal(network.tokens(changed, hidden=hidden, mask_token=token), tokens)
    assert not torch.allclose(network.tokens(images), tokens)
    # Its place is known: the same token elsewhere gives other features.
    assert not torch.allclose(
        network.tokens(images * 0, hidden=hidden, mask_token=token)[0, 0],
        network.tokens(images * 0, hidden=hidden.roll(1, 1), mask_token=token)[0, 0],
    )
    with pytest.raises(ValueError, match="hidden and mask_token must be given together"):
        network.tokens(images, hidden=hidden)


def test_sine_positions_follow_their_formula() -> None:
    positions = sine_positions((2, 3), 8)
    assert positions.shape == (6, 8)
    expected = []
    for row in range(2):
        for column in range(3):
            angles = [[place, place / 100.0] for place in (row, column)]
            waves = [
                torch.tensor(a).sin().tolist() + torch.tensor(a).cos().tolist() for a in angles
            ]
            expected.append(waves[0] + waves[1])
    torch.testing.assert_close(positions, torch.tensor(expected))


def test_positions_of_another_grid_are_interpolated() -> None:
    network = ViT(SMALL_VIT)
    assert torch.equal(network.positions((4, 4)), network.pos_embed[:, 1:])
    wide = network.positions((4, 8))
    assert wide.shape == (1, 32, 24)
    # Rows are as many as before: of each, columns are what bicubic interpolation makes of them.
    with torch.no_grad():
        network.pos_embed[0, 1:] = torch.arange(16.0)[:, None] // 4
    rows = network.positions((4, 8)).view(4, 8, 24)
    torch.testing.assert_close(rows, torch.arange(4.0).view(4, 1, 1).expand(4, 8, 24))


def test_what_is_frozen_has_no_gradient() -> None:
    options = ViTOptions(depth=1, freeze_patches=True, learn_positions=False)
    frozen = [n for n, p in ViT(options).named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]


def test_intensities_are_no_part_of_the_state() -> None:
    network = ResNet(ResNetOptions(in_channels=1, width=4))
    shifted = network.intensities(torch.full((1, 1, 2, 2), 0.75))
    assert torch.equal(shifted, torch.ones(1, 1, 2, 2))
    assert not any("intensities" in name for name in network.state_dict())


def test_networks_are_built_by_name() -> None:
    network = build("vit", width=24, heads=2, depth=1, patch_size=16)
    assert isinstance(network, ViT)
    assert network.grid == (4, 4)
    with pytest.raises(
        ValueError, match=r"'resnet', .*'vit', got 'resnt'; the nearest is 'resnet'"
    ):
        build("resnt")
    with pytest.raises(ValueError, match=r"widht must be a known key, .* nearest is 'width'"):
        build("vit", widht=3)


def _images(*shape: int) -> Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("make", "options", "shape", "error"),
    [
        (ResNet, ResNetOptions(width=4), (2, 1, 8, 8), r"images must have shape \(B, 3, H, W\)"),
        (ViT, SMALL_VIT, (2, 3, 30, 32), r"multiples of 8, got \(2, 3, 30, 32\)"),
        (ViT, SMALL_VIT, (2, 3, 0, 32), r"multiples of 8, got \(2, 3, 0, 32\)"),
    ],
)
def test_networks_refuse(make: Any, options: Any, shape: tuple[int, ...], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make(options).maps(_images(*shape))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"width": 10, "heads": 3}, "width must be a multiple of heads, got 10 and 3"),
        ({"image_size": 30}, "image_size must be a multiple of patch_size, got 30 and 8"),
        ({"width": 6, "heads": 3}, "width must be a multiple of 4, got 6"),
    ],
)
def test_vit_options_refuse(options: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ViTOptions(**options)  # type: ignore[arg-type]
