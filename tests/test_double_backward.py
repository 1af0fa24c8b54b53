"""Gradients of gradients of the losses, against the reference in float64."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat import _contrast_blocks
from pyfeat._contrast import Pairs, pair_sums
from pyfeat.losses import clip_loss, info_nce, koleo, nt_xent, supcon_loss, swav_loss
from tests.support_losses import eager_clip, eager_info_nce, eager_nt_xent, eager_supcon, unit
from tests.support_second import Loss, assert_second_as_good_as_torch, with_second

SIZES = [(1, 5), (3, 4), (33, 64)]


def labels_of(features: Tensor) -> Tensor:
    return torch.arange(len(features)) % max(1, len(features) // 3)


# Of features a and b and a scale: the loss of ours, and what stores all pairs.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "info_nce": (
        lambda a, b, s, **o: info_nce(a, b, temperature=1.0 / s.double(), **o),
        eager_info_nce,
    ),
    "clip_loss": (clip_loss, eager_clip),
    "supcon_loss": (
        lambda a, b, s, **o: supcon_loss(
            torch.cat([a, b]),
            labels_of(torch.cat([a, b])),
            temperature=1.0 / s.double(),
            **o,
        ),
        lambda a, b, s: eager_supcon(torch.cat([a, b]), labels_of(torch.cat([a, b])), s),
    ),
    "nt_xent": (
        lambda a, b, s, **o: nt_xent(a, b, temperature=1.0 / s.double(), **o),
        eager_nt_xent,
    ),
}


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_as_good_as_torch(
    name: str, rows: int, dim: int, scale: float
) -> None:
    inputs = [unit(rows, dim), unit(rows, dim), torch.tensor(scale)]
    along = [torch.randn_like(x) for x in inputs]
    assert_second_as_good_as_torch(LOSSES[name], inputs, along)
    assert_second_as_good_as_torch(LOSSES[name], inputs, None)


@pytest.mark.parametrize("name", ["clip_loss", "nt_xent"])
def test_second_derivatives_of_more_than_one_block_are_as_good_as_torch(name: str) -> None:
    rows = 1030 if name == "clip_loss" else 515  # a block has 1,024 rows and columns
    inputs = [unit(rows, 8), unit(rows, 8), torch.tensor(14.0)]
    assert_second_as_good_as_torch(LOSSES[name], inputs, [torch.randn_like(x) for x in inputs])


@pytest.mark.parametrize("scale", [14.0, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_features_with_a_direction_in_common_keep_their_digits(name: str, scale: float) -> None:
    common = 3.0 * torch.nn.functional.normalize(torch.ones(64), dim=0)
    a, b = (torch.nn.functional.normalize(unit(33, 64) + common, dim=1) for _ in range(2))
    inputs = [a, b, torch.tensor(scale)]
    # All similarities change by much, and by nearly as much.
    along = [torch.randn(33, 64) + 2.0, torch.randn(33, 64) + 2.0, torch.randn(())]
    assert_second_as_good_as_torch(LOSSES[name], inputs, along, near_zero=False)


OPTIONS: dict[str, Loss] = {
    "extra keys": lambda q, k, **o: info_nce(q, k, extra_keys=k.flip(0) * 0.5, **o),
    "targets": lambda q, k, **o: info_nce(q, k, targets=torch.arange(40).flip(0) % 7, **o),
    "ignored ids": lambda q, k, **o: info_nce(
        q, k, query_ids=torch.arange(40) % 9, key_ids=torch.arange(40) % 9, **o
    ),
    "all left out": lambda q, k, **o: info_nce(
        q, k, query_ids=torch.arange(40) // 20, key_ids=torch.zeros(40, dtype=torch.int64), **o
    ),
    "positive ids": lambda q, k, **o: info_nce(
        q,
        k,
        query_ids=torch.arange(40) % 9,
        key_ids=torch.arange(40) % 11,
        same_ids="positive",
        symmetric=True,
        **o,
    ),
    "log probabilities": lambda q, k, **o: info_nce(
        q, k, key_log_probabilities=-torch.arange(40.0) / 5, **o
    ),
    "normalized": lambda q, k, **o: info_nce(3 * q, k, normalize=True, symmetric=True, **o),
    "captions": lambda q, k, **o: clip_loss(
        q, k, 7.0, image_ids=torch.arange(40) // 2, text_ids=torch.arange(40) // 4, **o
    ),
    "labels": lambda q, k, **o: supcon_loss(torch.cat([q, k]), torch.arange(80) % 13, **o),
    "average inside": lambda q, k, **o: supcon_loss(
        torch.cat([q, k]), torch.arange(80) % 13, average="in", **o
    ),
    "spread targets": lambda q, k, **o: info_nce(
        q, k, targets=torch.eye(40, dtype=q.dtype).roll(3, 0) * 0.7 + 0.01, symmetric=True, **o
    ),
    "hard negatives": lambda q, k, **o: nt_xent(
        q, k, hard_negative_beta=0.5, positive_prior=0.1, **o
    ),
    "prototypes": lambda q, k, **o: swav_loss([q, q.flip(1)], k[:12], **o),
    "nearest": lambda q, k, **o: koleo(torch.cat([q, k]), **o),
    "same features": lambda q, k, **o: clip_loss(q, q, 5.0, **o) + info_nce(q, k, **o),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_second_derivatives_follow_every_option(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contrast_blocks, "SIDE", 16)
    inputs = [unit(40, 24), unit(40, 24)]
    along = [torch.randn(40, 24), torch.randn(40, 24)]
    loss = OPTIONS[case]
    exact = with_second(
        lambda *x: loss(*x, backend="reference", reduction="sum"),
        [x.double() for x in inputs],
        [x.double() for x in along],
    )
    ours = with_second(lambda *x: loss(*x, reduction="sum"), inputs, along)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=3e-6, atol=3e-6 * float(true.abs().max()))


@pytest.mark.parametrize("which", range(3))
def test_what_has_no_gradient_has_no_second_one(which: int) -> None:
    inputs = [unit(40, 24), unit(40, 24), torch.tensor(7.0)]
    along = [torch.randn_like(inputs[which])]

    def loss(x: Tensor, **options: Any) -> Tensor:
        a, b, scale = (y.to(x.dtype) for y in (*inputs[:which], x, *inputs[which + 1 :]))
        value: Tensor = clip_loss(a, b, scale, **options)
        return value

    (ours,) = with_second(loss, [inputs[which]], along)
    (exact,) = with_second(
        functools.partial(loss, backend="reference"), [inputs[which].double()], along
    )
    torch.testing.assert_close(ours, exact, rtol=3e-6, atol=3e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_of_half_precision_are_rounded_once_a_pass(dtype: torch.dtype) -> None:
    inputs = [unit(70, 48).to(dtype), unit(70, 48).to(dtype)]
    along = [torch.randn(70, 48).to(dtype), torch.randn(70, 48).to(dtype)]
    loss = functools.partial(clip_loss, logit_scale=20.0, reduction="sum")
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    ours = torch.autograd.grad(gradients, leaves, along)
    exact = with_second(
        functools.partial(loss, backend="reference"),
        [x.double() for x in inputs],
        [x.double() for x in along],
    )
    for mine, true in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        # Two gradients are rounded, and their sum.
        tolerance = 2.0 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            mine.double(), true, rtol=tolerance, atol=tolerance * float(true.abs().max())
        )


def test_autocast_changes_nothing() -> None:
    inputs = [unit(20, 8), unit(20, 8), torch.tensor(9.0)]
    along = [torch.randn_like(x) for x in inputs]
    for kind in ([x.double() for x in inputs], inputs):
        plain = with_second(clip_loss, kind, along)
        with torch.autocast("cpu", torch.bfloat16):
            cast = with_second(clip_loss, kind, along)
        assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


def second_arguments(
    a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, *, columns: bool
) -> tuple[Any, ...]:
    sums = pair_sums(a, b, scale, pairs, columns=columns)[:4]
    random = [torch.randn_like(x) for x in (*sums, a, b, scale)]
    return (a, b, scale, *pairs, columns, *sums[:2], *random)


def test_a_third_derivative_is_refused() -> None:
    image, text = unit(5, 3).requires_grad_(), unit(5, 3)
    for _ in range(2):
        loss = clip_loss(image, text, 4.0)
        (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), image, create_graph=True)
        assert (second != 0).all()
        with pytest.raises(
            NotImplementedError, match=r"sums over pairs: derivatives must be of order"
        ):
            torch.autograd.grad(second.sum(), image)
        image = image.detach().double().requires_grad_()
        text = text.double()


def test_log_sum_exps_of_other_pairs_are_refused() -> None:
    a, b = unit(6, 3).requires_grad_(), unit(8, 3)
    scale = torch.tensor(4.0)
    sums = pair_sums(a, b, scale, Pairs())
    for i, name in ((0, "row_lse"), (1, "column_lse")):
        others = [x.detach() + (1.0 if i == j else 0.0) for j, x in enumerate(sums[:2])]
        gradients = torch.ops.pyfeat.pair_sums_backward(
            a,
            b,
            scale,
            "cpu",
            *Pairs(),
            True,
            *others,
            *(torch.ones_like(x) for x in sums[:4]),
            False,
            True,
            True,
            True,
            None,
        )
        message = rf"pair_sums_backward: {name} must be over these rows and columns"
        with pytest.raises(ValueError, match=message):
            torch.autograd.grad(gradients[0].sum(), a)


def test_features_that_change_in_between_are_noticed() -> None:
    image, text = unit(5, 3).requires_grad_(), unit(5, 3)
    (gradient,) = torch.autograd.grad(clip_loss(image, text, 4.0), image, create_graph=True)
    text += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(gradient.sum(), image)


def test_the_same_bits_come_back() -> None:
    inputs = [unit(70, 16), unit(70, 16), torch.tensor(14.0)]
    first, again = (with_second(clip_loss, inputs, None) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_the_ops_pass_the_checks_of_torch() -> None:
    a, b, scale = unit(9, 6), unit(7, 6), torch.tensor(3.0)
    ids = torch.arange(9, dtype=torch.int32) % 4, torch.arange(7, dtype=torch.int32) % 4
    for pairs, columns in ((Pairs(), True), (Pairs(None, *ids), True), (Pairs(), False)):
        arguments = second_arguments(a, b, scale, pairs, columns=columns)
        torch.library.opcheck(torch.ops.pyfeat.pair_sums_second.default, arguments)
        leaves = [x.clone().requires_grad_() for x in arguments[:3]]
        first = (*leaves, "cpu", *arguments[3:-3], False, True, True, True, None)
        torch.library.opcheck(torch.ops.pyfeat.pair_sums_backward.default, first)
