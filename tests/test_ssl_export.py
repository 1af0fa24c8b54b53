"""Backbones handed over to timm and transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("lightning")

from pyfeat import features, ssl
from pyfeat.cli import app
from pyfeat.ssl.hand_over import Format
from pyfeat.ssl.networks import build
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit
from tests.support_ssl import write_images

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


class Given(Run):
    """A run that has trained a given network."""

    folder = Path("given")

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        self._network, self._shape = network, shape

    def backbone(self) -> nn.Module:
        return self._network

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._shape


def _network(name: str, **options: Any) -> Any:
    """With weights and statistics that are all different."""
    network = build(name, **options).eval()
    generator = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand(value.shape, generator=generator)
    return network


VIT = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_vit_has_the_same_features_in_transformers(channels: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    network = _network("vit", in_channels=channels, mlp_ratio=3.0, **VIT)
    export = ssl.export(Given(network, (channels, 40, 40)), format="transformers")
    export.save(tmp_path / "out")
    model, info = transformers.ViTModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert export.processing["size"] == {"height": 32, "width": 32}
    images = torch.rand(2, channels, 32, 32)
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(export.processing[f"image_{x}"]).view(shape) for x in ("mean", "std"))
    with torch.no_grad():
        found = model.eval()((images - mean) / std).last_hidden_state
        torch.testing.assert_close(found, network.tokens(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_vit_of_clip_has_the_same_features_in_transformers(
    activation: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    network = _network("vit", pre_norm=True, activation=activation, **VIT)
    ssl.export(Given(network, (3, 32, 32)), format="transformers").save(tmp_path / "out")
    model, info = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = model.eval()(network.intensities(images)).pooler_output
        torch.testing.assert_close(found, network(images), atol=1e-5, rtol=1e-5)
    other = build("vit", pre_norm=True, activation="gelu", **VIT).eval()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.allclose(found, other(images), atol=1e-5) == (activation == "gelu")


@pytest.mark.parametrize("width", [8, 64])
def test_a_resnet_has_the_same_maps_in_transformers(width: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    network = _network("resnet", width=width, blocks=(2, 1), stem="7x7")
    ssl.export(Given(network, (3, 32, 48)), format="transformers").save(tmp_path / "out")
    backbone = features.load_backbone(
        f"hf:{tmp_path / 'out'}", layers=["stage1", "stage2"], dtype=torch.float32
    )
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        for found, expected in zip(backbone(images), network.maps(images), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_vit_has_the_layout_of_timm() -> None:
    network = build("vit", image_size=224, patch_size=16, width=192, depth=12, heads=3)
    export = ssl.export(Given(network, (3, 224, 224)), format="timm")
    shapes = {name: tuple(value.shape) for name, value in export.weights.items()}
    block = {
        "norm1.weight": (192,),
        "norm1.bias": (192,),
        "attn.qkv.weight": (576, 192),
        "attn.qkv.bias": (576,),
        "attn.proj.weight": (192, 192),
        "attn.proj.bias": (192,),
        "norm2.weight": (192,),
        "norm2.bias": (192,),
        "mlp.fc1.weight": (768, 192),
        "mlp.fc1.bias": (768,),
        "mlp.fc2.weight": (192, 768),
        "mlp.fc2.bias": (192,),
    }
    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 192),
        "pos_embed": (1, 197, 192),
        "patch_embed.proj.weight": (192, 3, 16, 16),
        "patch_embed.proj.bias": (192,),
        "norm.weight": (192,),
        "norm.bias": (192,),
    }
    expected |= {f"blocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    assert shapes == expected
    # vit_tiny_patch16_224 has 5,717,416 parameters, of which its classifier 193,000.
    assert sum(value.numel() for value in export.weights.values()) == 5_717_416 - 193_000
    assert export.config["model_args"] == {
        "in_chans": 3,
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": 192,
        "depth": 12,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "global_pool": "token",
        "fc_norm": False,
    }
    mean = build("vit", pool="mean", **VIT)
    arguments = ssl.export(Given(mean, (3, 32, 32)), format="timm").config["model_args"]
    assert arguments["global_pool"] == "avg"
    clip = build("vit", pre_norm=True, activation="quick_gelu", **VIT)
    export = ssl.export(Given(clip, (3, 32, 32)), format="timm")
    # As vit_base_patch32_clip_quickgelu_224: no bias of patches where norm_pre has one.
    assert export.weights.keys() - network.state_dict().keys() == {
        "norm_pre.weight",
        "norm_pre.bias",
    }
    assert "patch_embed.proj.bias" not in export.weights
    assert (
        export.config["model_args"].items() >= {"pre_norm": True, "act_layer": "quick_gelu"}.items()
    )


def test_a_resnet_has_the_layout_of_timm() -> None:
    network = build("resnet", width=64, blocks=(2, 2, 2, 2), stem="7x7")
    export = ssl.export(Given(network, (3, 96, 64)), format="timm")
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", *(f"bn1.{name}" for name in norm)}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            place = f"layer{stage}.{block}"
            for i in (1, 2):
                expected |= {f"{place}.conv{i}.weight", *(f"{place}.bn{i}.{x}" for x in norm)}
        if stage > 1:
            place = f"layer{stage}.0.downsample"
            expected |= {f"{place}.0.weight", *(f"{place}.1.{name}" for name in norm)}
    assert set(export.weights) == expected
    assert export.weights["conv1.weight"].shape == (64, 3, 7, 7)
    learned = [v for name, v in export.weights.items() if re.search(r"\.(weight|bias)$", name)]
    # resnet18 has 11,689,512 parameters, of which its classifier 513,000.
    assert sum(value.numel() for value in learned) == 11_689_512 - 513_000
    config = export.config
    assert (config["architecture"], config["num_classes"]) == ("resnet18", 0)
    assert config["model_args"] == {"in_chans": 3, "layers": [2, 2, 2, 2]}
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 64]
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("network", "shape", "format", "message"),
    [
        (nn.Identity(), (3, 8, 8), "timm", "it is neither a ResNet nor a ViT but a Identity"),
        (build("resnet", width=8), (3, 8, 8), "transformers", "its stem is 3x3, not 7x7"),
        (
            build("resnet", width=8, blocks=(1, 1)),
            (3, 8, 8),
            "timm",
            "its stem is 3x3, not 7x7; its width is 8, not 64; it has 2 stages, not 4",
        ),
        (
            build("vit", image_size=8, patch_size=4, width=12, depth=1, in_channels=1, ndim=3),
            (1, 8, 8, 8),
            "timm",
            "it is one of volumes",
        ),
        (
            build("resnet", width=8, stem="7x7", norm="group"),
            (3, 8, 8),
            "transformers",
            "its norm is group, not batch",
        ),
    ],
)
def test_what_a_library_cannot_build_is_refused(
    network: nn.Module, shape: tuple[int, ...], format: Format, message: str
) -> None:
    with pytest.raises(ValueError, match=f"network must be one that {format} has.*: {message}$"):
        ssl.export(Given(network, shape), format=format)


def test_the_command_line_exports_a_run(tmp_path: Path) -> None:
    network = {"name": "vit", "image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 2}
    images = write_images(tmp_path)
    config = ssl.make_config(
        {
            "out": str(tmp_path / "run"),
            "data": {"name": "images", "path": str(images), "size": [8, 8]},
            "network": network,
            "objective": {"name": "mae", "decoder_width": 8, "decoder_heads": 2},
            "training": {"epochs": 1, "batch_size": 40, "progress": False},
            "watch": {"every": 0},
        }
    )
    run = fit(config)
    out = tmp_path / "out"
    arguments = ["export", str(run.folder), "-o", str(out), "--format", "timm"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = {path.name for path in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "pyfeat.json"}
    assert json.loads((out / "config.json").read_text())["model_args"]["img_size"] == 8
    safetensors = pytest.importorskip("safetensors.torch")
    written = safetensors.load_file(out / "model.safetensors")
    trained = run.backbone().state_dict()
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], value) for name, value in trained.items())
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "must not exist unless force is given" in again.output
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    with pytest.raises(ValueError, match="format must be one of 'timm', 'transformers', got 'jax'"):
        ssl.export(run, format="jax")  # type: ignore[arg-type]
