"""The losses as modules against their functions."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.losses import (
    CLIPLoss,
    InfoNCELoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    clip_loss,
    info_nce,
    nt_xent,
    siglip_loss,
    supcon_loss,
)

LABELS = torch.arange(12) % 5
IDS = torch.arange(12) // 2


def unit(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a, b = (nn.functional.normalize(torch.randn(12, 8), dim=1) for _ in range(2))
    return a.to(dtype), b.to(dtype)


def scale_of(module: nn.Module) -> Tensor:
    return module.logit_scale.exp()  # type: ignore[operator]


# A module, and what it must compute.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "InfoNCE": (InfoNCELoss, lambda m, a, b: info_nce(a, b)),
    "InfoNCE with options": (
        lambda: InfoNCELoss(0.3, symmetric=True, normalize=True, reduction="sum"),
        lambda m, a, b: info_nce(
            a, b, temperature=0.3, symmetric=True, normalize=True, reduction="sum"
        ),
    ),
    "NTXent": (NTXentLoss, lambda m, a, b: nt_xent(a, b)),
    "NTXent with options": (
        lambda: NTXentLoss(0.2, normalize=True),
        lambda m, a, b: nt_xent(a, b, temperature=0.2, normalize=True),
    ),
    "SupCon": (SupConLoss, lambda m, a, b: supcon_loss(a, b)),
    "SupCon with options": (
        lambda: SupConLoss(0.7, reduction="none"),
        lambda m, a, b: supcon_loss(a, b, temperature=0.7, reduction="none"),
    ),
    "CLIP": (CLIPLoss, lambda m, a, b: clip_loss(a, b, scale_of(m))),
    "CLIP with options": (
        lambda: CLIPLoss(30.0, max_logit_scale=None, normalize=True),
        lambda m, a, b: clip_loss(a, b, scale_of(m), normalize=True),
    ),
    "SigLIP": (SigLIPLoss, lambda m, a, b: siglip_loss(a, b, scale_of(m), m.logit_bias)),
    "SigLIP with options": (
        lambda: SigLIPLoss(3.0, -1.0, max_logit_scale=50.0, reduction="sum"),
        lambda m, a, b: siglip_loss(a, b, scale_of(m), m.logit_bias, reduction="sum"),
    ),
}


def made(case: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    module, function = CASES[case]
    return module(), function


def features_of(case: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    a, b = unit(dtype)
    return [a, LABELS] if case.startswith("SupCon") else [a, b]


def with_gradients(loss: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The loss, and gradients of its sum by the features and all parameters."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    value = loss(*leaves)
    value.sum().backward()  # type: ignore[no-untyped-call]
    found = [x.grad for x in (*leaves, *module.parameters())]
    return [value.detach(), *(grad for grad in found if grad is not None)]


@pytest.mark.parametrize("case", CASES)
def test_a_module_is_its_function(case: str) -> None:
    module, function = made(case)
    inputs = features_of(case)
    ours = with_gradients(module, module, *inputs)
    expected = with_gradients(lambda *x: function(module, *x), module, *inputs)
    assert len(ours) == len(expected) >= 2 + len(list(module.parameters()))
    for mine, true in zip(ours, expected, strict=True):
        assert torch.equal(mine, true)


def test_arguments_of_a_batch_are_passed_on() -> None:
    a, b = unit()
    extra = torch.randn(3, 8)
    assert InfoNCELoss()(a, b, extra_keys=extra) == info_nce(a, b, extra_keys=extra)
    found = CLIPLoss(5.0)(a, b, image_ids=IDS, text_ids=IDS)
    expected = clip_loss(a, b, 5.0, image_ids=IDS, text_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    found = SigLIPLoss(5.0, -3.0)(a, b, image_ids=IDS, text_ids=IDS)
    expected = siglip_loss(a, b, 5.0, -3.0, image_ids=IDS, text_ids=IDS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    losses = InfoNCELoss(reduction="sum")(a, b, reduction="none")
    assert losses.shape == (12,)


# Scales


def test_a_scale_begins_as_usual() -> None:
    loss = CLIPLoss()
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert loss.scale.item() == pytest.approx(1 / 0.07)
    assert loss.logit_scale.shape == ()
    assert loss.logit_scale.dtype == torch.float32


def test_a_sigmoid_loss_begins_as_usual() -> None:
    loss = SigLIPLoss()
    assert loss.logit_scale.item() == pytest.approx(math.log(10.0))
    assert loss.logit_bias.item() == -10.0
    assert set(loss.state_dict()) == {"logit_scale", "logit_bias"}
    with torch.no_grad():
        loss.logit_scale.fill_(6.0)
    assert loss.scale.item() == pytest.approx(math.exp(6.0))  # no limit


def test_a_scale_is_limited_and_comes_back() -> None:
    a, _ = unit()
    loss = CLIPLoss(99.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    with torch.no_grad():
        loss.logit_scale.fill_(6.0)
    # The features of pairs are each other's opposites: the best scale is the smallest.
    loss(a, -a).backward()
    assert loss.logit_scale.item() == pytest.approx(math.log(100.0))
    assert loss.scale.item() == pytest.approx(100.0)
    optimizer.step()
    assert loss.scale.item() < 99.0


def test_in_evaluation_the_parameter_is_left_alone() -> None:
    a, b = unit()
    loss = CLIPLoss().eval()
    with torch.no_grad():
        loss.logit_scale.fill_(6.0)
    torch.testing.assert_close(loss(a, b), clip_loss(a, b, 100.0), rtol=1e-5, atol=1e-6)
    assert loss.logit_scale.item() == 6.0


def test_two_losses_of_one_module_have_one_backward_pass() -> None:
    a, b = unit()
    loss = CLIPLoss(5.0)
    (loss(a, b) + loss(b, a)).backward()
    both = loss.logit_scale.grad
    loss.logit_scale.grad = None
    loss(a, b).backward()
    torch.testing.assert_close(both, 2 * loss.logit_scale.grad)  # type: ignore[operator]


# Modules


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_compute_the_same(case: str, again: Callable[[nn.Module], nn.Module]) -> None:
    module, _ = made(case)
    inputs = features_of(case)
    for mine, true in zip(
        with_gradients(copied := again(module), copied, *inputs),
        with_gradients(module, module, *inputs),
        strict=True,
    ):
        assert torch.equal(mine, true)
    assert repr(copied) == repr(module)


def test_the_state_is_the_learnable_scale() -> None:
    assert not InfoNCELoss().state_dict()
    loss = CLIPLoss(3.0)
    assert set(loss.state_dict()) == {"logit_scale"}
    other = CLIPLoss()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.scale, loss.scale)


def test_the_repr_shows_the_options() -> None:
    assert repr(InfoNCELoss(symmetric=True)) == "InfoNCELoss(temperature=0.1, symmetric=True)"
    assert repr(NTXentLoss()) == "NTXentLoss(temperature=0.5)"
    assert repr(CLIPLoss()) == "CLIPLoss(max_logit_scale=100.0)"
    assert repr(CLIPLoss(max_logit_scale=None)) == "CLIPLoss()"
    assert repr(SigLIPLoss(normalize=True)) == "SigLIPLoss(normalize=True)"


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_features_of_16_bits_work_with_float32_parameters(case: str, dtype: torch.dtype) -> None:
    module, function = made(case)
    inputs = features_of(case, dtype)
    ours = with_gradients(module, module, *inputs)
    expected = with_gradients(lambda *x: function(module, *x), module, *inputs)
    leaves = [x for x in (*inputs, *module.parameters()) if x.is_floating_point()]
    assert ours[0].dtype == torch.float32
    for leaf, mine, true in zip(leaves, ours[1:], expected[1:], strict=True):
        assert mine.dtype == leaf.dtype
        assert torch.equal(mine, true)


@pytest.mark.parametrize("whole", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case: str, whole: bool) -> None:
    module, _ = made(case)
    inputs = features_of(case)
    expected = with_gradients(module, module, *inputs)

    def loss(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = module(*x)
        return value

    with torch.autocast("cpu", torch.bfloat16, enabled=whole):
        found = with_gradients(loss, module, *inputs)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == true.dtype
        assert torch.equal(mine, true)


def test_products_with_targets_keep_their_precision_under_autocast() -> None:
    a, b = unit()
    module, targets = InfoNCELoss(), torch.rand(12, 12)
    expected = with_gradients(lambda *x: module(*x, targets=targets), module, a, b)

    def loss(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = module(*x, targets=targets)
        return value

    for mine, true in zip(with_gradients(loss, module, a, b), expected, strict=True):
        assert torch.equal(mine, true)


def test_features_made_under_autocast_train_float32_parameters() -> None:
    encoder, loss = nn.Linear(6, 8), CLIPLoss(normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = encoder(torch.randn(5, 6)), encoder(torch.randn(5, 6))
        value = loss(image, text)
    value.backward()
    assert image.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    for parameter in (*encoder.parameters(), *loss.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.abs().max() > 0


def test_a_module_of_16_bits_has_a_scale_of_float32() -> None:
    a, b = unit(torch.bfloat16)
    loss = CLIPLoss(10.0).bfloat16()
    rounded = loss.logit_scale.detach().float().exp()
    loss(a, b).backward()
    assert torch.equal(loss.scale.detach(), rounded)
    assert loss.logit_scale.grad is not None
    assert loss.logit_scale.grad.dtype == torch.bfloat16


# Refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: NTXentLoss(scale=3.0),
            TypeError,
            r"NTXentLoss: options must be among temperature, .*, got scale",
        ),
        (lambda: InfoNCELoss(keys=3.0), TypeError, r"InfoNCELoss: options must .*, got keys"),
        (
            lambda: CLIPLoss(101.0),
            ValueError,
            r"CLIPLoss: logit_scale must be in \(0, 100\.0\], got 101\.0",
        ),
        (
            lambda: CLIPLoss(math.nan, max_logit_scale=None),
            ValueError,
            r"CLIPLoss: logit_scale must be positive and finite, got nan",
        ),
        (lambda: CLIPLoss(-1.0), ValueError, r"CLIPLoss: logit_scale must .*, got -1\.0"),
    ],
)
def test_options_that_cannot_be_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
