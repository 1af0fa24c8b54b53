"""The sigmoid loss against the eager formula, in float64."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat.losses import siglip_loss
from tests.support_losses import assert_as_good_as_torch, unit, with_gradients


def each(image: Tensor, text: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return siglip_loss(image, text, scale, bias, reduction="none")


def eager(image: Tensor, text: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum(dim=1)


def with_ids(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    labels = 2.0 * (ids[: len(image), None] == ids[: len(text)]) - 1
    return -F.logsigmoid(labels * logits).sum(dim=1)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (60.0, -5.0), (100.0, 3.0)])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (33, 64), (97, 31), (257, 130), (600, 512)])
def test_siglip_loss_is_as_good_as_torch(rows: int, dim: int, scale: float, bias: float) -> None:
    image, text = unit(rows, dim), unit(rows, dim)
    near = torch.nn.functional.normalize(image + 0.2 * text, dim=1)
    for other in (text, near):
        inputs = image, other, torch.tensor(bias), torch.tensor(scale)
        if rows > 1:
            assert_as_good_as_torch(each, eager, *inputs)
        exact = with_gradients(eager, *(x.double() for x in inputs))
        for ours, true in zip(with_gradients(each, *inputs), exact, strict=True):
            size = float(true.abs().max())
            torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=2e-5 * size + 1e-5)


def test_positive_pairs_keep_their_digits() -> None:
    # z = 20 for every pair: a loss of 2e-9, of which log(1 + exp(z)) - z leaves nothing.
    image = torch.eye(4)[:1]
    loss = siglip_loss(image, image, 30.0, -10.0)
    expected = torch.tensor(-20.0, dtype=torch.float64).exp().log1p()
    # The similarity, 30, is rounded to float32, in powers of two.
    torch.testing.assert_close(loss.double(), expected, rtol=30 * 2.0**-23, atol=0.0)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_all_texts_with_the_id_of_an_image_are_its_pairs(backend: str | None) -> None:
    image, text, ids = unit(40, 24), unit(70, 24), torch.arange(70) % 9
    inputs = image, text, torch.tensor(8.0), torch.tensor(-3.0)

    def ours(*leaves: Tensor) -> Tensor:
        loss: Callable[..., Tensor] = siglip_loss
        return loss(*leaves, image_ids=ids[:40], text_ids=ids, reduction="none", backend=backend)

    exact = with_gradients(functools.partial(with_ids, ids=ids), *(x.double() for x in inputs))
    for found, true in zip(with_gradients(ours, *inputs), exact, strict=True):
        size = float(true.abs().max())
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=2e-6 * size)


def test_reductions_agree() -> None:
    inputs = unit(30, 16), unit(30, 16), 10.0, -10.0
    each = siglip_loss(*inputs, reduction="none")
    assert each.shape == (30,)
    torch.testing.assert_close(siglip_loss(*inputs), each.mean())
    torch.testing.assert_close(siglip_loss(*inputs, reduction="sum"), each.sum())
    assert siglip_loss(unit(0, 16), unit(0, 16), 10.0, -10.0) == 0.0


def test_frozen_features_and_numbers_get_no_gradient() -> None:
    image, text, scale = unit(30, 16), unit(30, 16).requires_grad_(), torch.tensor(5.0)
    every = [image.clone().requires_grad_(), text, scale.clone().requires_grad_()]
    expected = torch.autograd.grad(siglip_loss(every[0], text, every[2], -4.0), every)
    (found,) = torch.autograd.grad(siglip_loss(image, text, scale, -4.0), text)
    assert torch.equal(found, expected[1])
    scale.requires_grad_()
    (found,) = torch.autograd.grad(siglip_loss(image, text.detach(), scale, -4.0), scale)
    torch.testing.assert_close(found, expected[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_bias": float("nan")}, "logit_bias must be finite and in"),
        ({"logit_scale": 0.0}, "logit_scale must be positive and finite, got 0.0"),
        ({"text": unit(29, 16)}, "text must have as many rows as image, 30, got 29"),
        ({"image_ids": torch.arange(30)}, "text_ids must be given together with image_ids"),
        ({"image": unit(30, 16) / 0.0}, "image must be finite"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {
        "image": unit(30, 16),
        "text": unit(30, 16),
        "logit_scale": 10.0,
        "logit_bias": -10.0,
    }
    loss: Callable[..., Tensor] = siglip_loss
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **change})
