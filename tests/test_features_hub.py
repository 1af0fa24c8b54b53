import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.features import load_backbone
from tests.support_features import IMAGENET_MEAN, IMAGENET_STD, normalise_imagenet


class FakeFeatures(nn.Module):
    """What ``features_only`` returns; map i is filled with i."""

    def __init__(self, strides: Sequence[int], out_indices: Sequence[int], output_fmt: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.strides, self.out_indices, self.output_fmt = strides, out_indices, output_fmt
        self.feature_info = SimpleNamespace(info=[{"reduction": stride} for stride in strides])
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        self.seen = torch.empty(0)

    def forward(self, images: Tensor) -> list[Tensor]:
        self.seen = images
        height, width = images.shape[2:]
        maps = [
            torch.full((len(images), 5, height // self.strides[i], width // self.strides[i]), i)
            for i in self.out_indices
        ]
        return [m.permute(0, 2, 3, 1) for m in maps] if self.output_fmt == "NHWC" else maps


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    def install(strides: Sequence[int], output_fmt: str = "NCHW") -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def create_model(name: str, **options: Any) -> FakeFeatures:
            if name == "unknown":
                raise RuntimeError("Unknown model (unknown)")  # noqa: EM101
            calls.append({"name": name, **options})
            indices = options.get("out_indices", range(len(strides)))
            return FakeFeatures(strides, indices, output_fmt)

        module = ModuleType("timm")
        module.create_model = create_model  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "timm", module)
        return calls

    return install


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((2, 4, 8, 16, 32), ("2", "3")),
        ((4, 8, 16, 32), ("1", "2")),
        ((16,) * 12, ("5", "8")),
        ((2, 2, 4, 4), ("1", "2")),
    ],
    ids=["resnet", "convnext", "vit", "neither stride"],
)
def test_timm_layers_default_to_strides_8_and_16_or_to_the_depth(
    fake_timm: Callable[..., list[dict[str, Any]]],
    strides: Sequence[int],
    expected: tuple[str, str],
) -> None:
    calls = fake_timm(strides)
    backbone = load_backbone("timm:some.model")
    assert (backbone.name, backbone.layers) == ("timm:some.model", expected)
    assert [call["pretrained"] for call in calls] == [False, True]
    assert calls[-1] == {
        "name": "some.model",
        "pretrained": True,
        "features_only": True,
        "out_indices": tuple(int(layer) for layer in expected),
    }


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_timm_maps_come_in_the_order_asked_and_channels_first(
    fake_timm: Callable[..., list[dict[str, Any]]], output_fmt: str
) -> None:
    calls = fake_timm((2, 4, 8, 16), output_fmt)
    backbone = load_backbone("timm:net", layers=["3", "1"], dtype=torch.float32)
    maps = backbone(torch.rand(2, 3, 32, 64))
    assert [call["out_indices"] for call in calls] == [(1, 3)]
    assert [tuple(m.shape) for m in maps] == [(2, 5, 2, 4), (2, 5, 8, 16)]
    assert all(bool((m == layer).all()) for m, layer in zip(maps, (3, 1), strict=True))


def test_timm_images_are_normalised_as_the_model_was_trained(
    fake_timm: Callable[..., list[dict[str, Any]]],
) -> None:
    fake_timm((8, 16))
    backbone: Any = load_backbone("timm:net", layers=["0"], dtype=torch.float32)
    images = torch.rand(1, 3, 16, 16)
    backbone(images)
    torch.testing.assert_close(backbone._body.network.seen, (images - 0.5) / 0.25)


@pytest.mark.parametrize(("name", "layers"), [("unknown", None), ("net", ["last"])])
def test_timm_errors_are_repeated_with_the_name(
    fake_timm: Callable[..., list[dict[str, Any]]], name: str, layers: list[str] | None
) -> None:
    fake_timm((8, 16))
    with pytest.raises(ValueError, match=f"spec and layers must be .*got 'timm:{name}'"):
        load_backbone(f"timm:{name}", layers=layers)


TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


def save(model: Any, folder: Path, **processor: Any) -> str:
    model.eval().save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}"


def token_grid(state: Tensor, prefix: int, height: int, width: int) -> Tensor:
    """Lay tokens out one by one, as the definition says: (i, j) is token prefix + i w + j."""
    grid = torch.empty(len(state), state.shape[2], height, width)
    for i in range(height):
        for j in range(width):
            grid[:, :, i, j] = state[:, prefix + i * width + j]
    return grid


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_gives_its_stages_as_grids_of_the_patches(
    transformers: Any, tmp_path: Path, registers: int
) -> None:
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**TOKENS, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**TOKENS))
    spec = save(model, tmp_path)
    backbone = load_backbone(spec, dtype=torch.float32)
    assert (backbone.name, backbone.layers) == (spec, ("stage2", "stage3"))
    images = torch.rand(2, 3, 42, 84)  # 3 x 6 patches
    with torch.no_grad():
        normalised = normalise_imagenet(images)
        states = model(normalised, output_hidden_states=True).hidden_states
        # The backbone class of transformers ends every stage with the last norm.
        expected = [token_grid(model.layernorm(states[n]), 1 + registers, 3, 6) for n in (2, 3)]
    for found, grid in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(found, grid)


def test_a_plain_vit_gives_hidden_states_and_interpolates_its_positions(
    transformers: Any, tmp_path: Path
) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**TOKENS))
    spec = save(model, tmp_path, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    backbone = load_backbone(spec, layers=["4", "0", "1"], dtype=torch.float32)
    assert load_backbone(spec).layers == ("2", "3")
    images = torch.rand(2, 3, 42, 84)
    with torch.no_grad():
        states = model(
            (images - 0.5) / 0.25, output_hidden_states=True, interpolate_pos_encoding=True
        ).hidden_states
    for found, index in zip(backbone(images), (4, 0, 1), strict=True):
        torch.testing.assert_close(found, token_grid(states[index], 1, 3, 6))


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_images_that_patches_do_not_cover_are_refused(
    transformers: Any, tmp_path: Path, kind: str
) -> None:
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**TOKENS))
    backbone = load_backbone(save(model, tmp_path))
    with pytest.raises(ValueError, match="multiples of the patch size 14 x 14, got 56 x 64"):
        backbone(torch.rand(1, 3, 56, 64))


def tiny_resnet(transformers: Any) -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic"
    )
    return transformers.ResNetModel(config)


def test_a_resnet_gives_strides_8_and_16_in_the_order_asked(
    transformers: Any, tmp_path: Path
) -> None:
    model = tiny_resnet(transformers)
    spec = save(model, tmp_path)
    backbone = load_backbone(spec, dtype=torch.float32)
    assert backbone.layers == ("stage2", "stage3")
    images = torch.rand(2, 3, 64, 96)
    maps = backbone(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 12), (2, 24, 4, 6)]
    with torch.no_grad():
        normalised = normalise_imagenet(images)
        states = model(normalised, output_hidden_states=True).hidden_states
    torch.testing.assert_close(maps, [states[2], states[3]])
    swapped = load_backbone(spec, layers=["stage3", "stage2"], dtype=torch.float32)
    torch.testing.assert_close(swapped(images), maps[::-1])


def test_convolutional_hidden_states_pass_through(transformers: Any, tmp_path: Path) -> None:
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], groups_width=8
    )
    backbone = load_backbone(save(transformers.RegNetModel(config), tmp_path))
    assert backbone.layers == ("2", "3")
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 12), (2, 24, 4, 6)]


def test_transformers_fingerprints_do_not_depend_on_dtype_or_on_absent_poolers(
    transformers: Any, tmp_path: Path
) -> None:
    # Saved without the pooler that ViTModel has, which is drawn at random on every load.
    model = transformers.ViTModel(transformers.ViTConfig(**TOKENS), add_pooling_layer=False)
    spec = save(model, tmp_path)
    loads = [load_backbone(spec, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert loads[0].fingerprint() == loads[1].fingerprint()
    with torch.no_grad():
        model.embeddings.cls_token[0, 0, 0] += 1e-3
    assert load_backbone(save(model, tmp_path)).fingerprint() != loads[0].fingerprint()


def test_a_checkpoint_that_leaves_weights_to_chance_is_refused(
    transformers: Any, tmp_path: Path
) -> None:
    model = tiny_resnet(transformers)
    model.encoder.stages[0].layers[0].layer[0].convolution = nn.Identity()
    with pytest.raises(ValueError, match=r"all weights of ResNetBackbone, got .* without encoder"):
        load_backbone(save(model, tmp_path))


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"do_normalize": False, "image_mean": [0.1] * 3, "image_std": [0.1] * 3}, 0.0, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
    ],
)
def test_the_image_processor_says_how_to_normalise(
    transformers: Any, tmp_path: Path, processor: dict[str, Any], mean: float, std: float
) -> None:
    model = tiny_resnet(transformers)
    plain = load_backbone(save(model, tmp_path / "plain"), dtype=torch.float32)
    other = load_backbone(save(model, tmp_path / "other", **processor), dtype=torch.float32)
    images = torch.rand(1, 3, 32, 32)
    normalised = (images - mean) / std
    torch.testing.assert_close(other(images), plain(normalised * IMAGENET_STD + IMAGENET_MEAN))


@pytest.mark.parametrize(
    ("layers", "message"),
    [(["stage9"], "got 'stage9'; closest: stage"), (["9"], "got '9'; closest: ")],
)
def test_a_missing_stage_is_answered_with_the_closest_names(
    transformers: Any, tmp_path: Path, layers: list[str], message: str
) -> None:
    spec = save(transformers.Dinov2Model(transformers.Dinov2Config(**TOKENS)), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(spec, layers=layers)


def test_a_folder_without_a_model_is_an_os_error(transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"spec must name a transformers model .*got 'hf:.*nowhere'"):
        load_backbone(f"hf:{tmp_path / 'nowhere'}")


def test_a_model_of_text_is_refused(transformers: Any, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ValueError, match="spec must name a model of images, got 'hf:"):
        load_backbone(save(transformers.BertModel(config), tmp_path))
