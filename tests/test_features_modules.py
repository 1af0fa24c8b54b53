import pytest
import torch
from torch import Tensor, nn

from pyfeat.features import load_backbone
from tests.support_features import normalise_imagenet, relative_error


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
    normalised = normalise_imagenet(images)
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
    pooled = nn.functional.avg_pool2d(normalise_imagenet(images), 7)
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
