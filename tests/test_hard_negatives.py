"""Weighted and debiased negatives against the published formulas, which store all similarities."""

import functools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.losses import info_nce, nt_xent
from tests.support_losses import assert_as_good_as_torch, by_scale, unit, with_gradients

SIZES = [(2, 3), (31, 16), (97, 31), (300, 64)]
# scale, beta, prior
SETTINGS = [(2.0, 1.0, 0.0), (2.0, 0.0, 0.1), (2.0, 1.0, 0.1), (2.0, 0.5, 0.4), (10.0, 2.0, 0.05)]


def views(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines of partners are about 0.7."""
    z = unit(rows, dim)
    return z, torch.nn.functional.normalize(z + unit(rows, dim), dim=1)


def published(
    s: Tensor, positive: Tensor, negative: Tensor, scale: Tensor, beta: float, prior: float
) -> Tensor:
    """Of similarities (N, M) and masks, each row with one positive, in plain powers."""
    neg = s.exp() * negative
    pos = (s.exp() * positive).sum(dim=1)
    n = negative.sum(dim=1)
    importance = (beta * s).exp() * negative
    reweighted = (importance * neg).sum(dim=1) / (importance.sum(dim=1) / n)
    bounded = torch.maximum((reweighted - prior * n * pos) / (1 - prior), n * (-scale).exp())
    return -torch.log(pos / (pos + (bounded if prior else reweighted)))


def eager_nt_xent(z1: Tensor, z2: Tensor, scale: Tensor, *, beta: float, prior: float) -> Tensor:
    z = torch.cat([z1, z2])
    positive = torch.eye(len(z)).roll(len(z1), 1)
    return published(
        scale * z @ z.T, positive, 1 - positive - torch.eye(len(z)), scale, beta, prior
    )


def eager_info_nce(
    queries: Tensor, keys: Tensor, scale: Tensor, *, beta: float, prior: float
) -> Tensor:
    positive = torch.eye(len(queries), len(keys))
    return published(scale * queries @ keys.T, positive, 1 - positive, scale, beta, prior)


@pytest.mark.parametrize(("scale", "beta", "prior"), SETTINGS)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_losses_are_as_good_as_the_published_formula(
    rows: int, dim: int, scale: float, beta: float, prior: float
) -> None:
    options = {"hard_negative_beta": beta, "positive_prior": prior, "reduction": "none"}
    for ours, eager, keys in (
        (nt_xent, eager_nt_xent, None),
        (info_nce, eager_info_nce, unit(rows + 7, dim)),
    ):
        first, second = views(rows, dim)
        if keys is not None:
            second = torch.cat([second, keys])
        assert_as_good_as_torch(
            by_scale(ours, **options),
            functools.partial(eager, beta=beta, prior=prior),
            first,
            second,
            torch.tensor(scale),
            # A mean of negatives is a quotient: its gradient has parts of 1 + beta and of beta, each
            # from powers of similarities that are rounded at (1 + beta) scale.
            cancelled=scale * (1.0 + 2.0 * beta) / rows * max(1.0, 0.5 * scale * (1.0 + beta)),
        )


def test_the_settings_clamp_some_and_leave_some() -> None:
    shares = []
    for scale, beta, prior in SETTINGS:
        z1, z2 = views(97, 31)
        s = scale * z1 @ z2.T
        weights = (beta * s).exp().fill_diagonal_(0.0)
        mean = (weights * s.exp()).sum(dim=1) / weights.sum(dim=1)
        left = (mean - prior * s.diag().exp()) / (1 - prior)
        shares.append(float((left < math.exp(-scale)).float().mean()))
    assert shares[:3] == [0.0, 0.0, 0.0]
    assert shares[3] > 0.9
    assert 0.2 < shares[4] < 0.8


@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_large_exponents_neither_overflow_nor_vanish(prior: float) -> None:
    z1, z2 = views(40, 16)
    options = {"hard_negative_beta": 5.0, "positive_prior": prior, "reduction": "none"}
    scale = torch.tensor(100.0)  # powers of up to e^600: float64 holds them

    found = with_gradients(by_scale(nt_xent, **options), z1, z2, scale)
    eager = functools.partial(eager_nt_xent, beta=5.0, prior=prior)
    exact = with_gradients(eager, z1.double(), z2.double(), scale.double())
    for mine, true in zip(found, exact, strict=True):
        assert mine.isfinite().all()
        # Similarities of up to 600 are exponents, rounded to 4e-5; parts of a gradient, 6 and 5 times
        # that of the usual loss, have that error each.
        largest = float(true.abs().max()) if true.ndim else 1.0
        torch.testing.assert_close(mine, true, rtol=2e-4, atol=2e-4 * largest)
    steep = with_gradients(by_scale(nt_xent, **options), z1, z2, torch.tensor(1e4))
    assert all(x.isfinite().all() for x in steep)


def test_without_weights_it_is_the_usual_loss() -> None:
    inputs = *views(50, 20), torch.tensor(5.0)
    plain = with_gradients(by_scale(nt_xent), *inputs)
    for options in ({"hard_negative_beta": 1e-30}, {"positive_prior": 1e-30}):
        for mine, usual in zip(
            with_gradients(by_scale(nt_xent, **options), *inputs), plain, strict=True
        ):
            torch.testing.assert_close(mine, usual, rtol=1e-5, atol=1e-7)


def test_a_symmetric_loss_weighs_both_directions() -> None:
    inputs = *views(40, 12), torch.tensor(3.0)
    options = {"beta": 0.7, "prior": 0.05}

    def both(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        there, back = eager_info_nce(a, b, scale, **options), eager_info_nce(b, a, scale, **options)
        return 0.5 * (there + back)

    found = with_gradients(
        by_scale(
            info_nce,
            symmetric=True,
            hard_negative_beta=0.7,
            positive_prior=0.05,
            reduction="none",
        ),
        *inputs,
    )
    exact = with_gradients(both, *(x.double() for x in inputs))
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=2e-6 * float(true.abs().max()))


@pytest.mark.parametrize("kind", ["ignored", "positive"])
def test_negatives_that_are_left_out_do_not_weigh(kind: str) -> None:
    queries, keys, scale = unit(40, 12), unit(45, 12), torch.tensor(3.0)
    if kind == "ignored":
        query_ids, key_ids = torch.arange(40) % 9, torch.arange(45) % 9
        query_ids[3] = 77
        targets = torch.arange(40).flip(0) + 2
        positive = torch.nn.functional.one_hot(targets, 45).double()
        negative = (1 - positive) * (query_ids[:, None] != key_ids)
        options: dict[str, Any] = {"targets": targets}
    else:
        query_ids, key_ids = torch.arange(40) + 9, torch.arange(45).flip(0)
        positive = (query_ids[:, None] == key_ids).double()
        negative = 1 - positive
        options = {"same_ids": "positive"}
    counted = positive.sum(dim=1) > 0

    def eager(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        losses = published(scale * a @ b.T, positive[counted], negative[counted], scale, 0.7, 0.1)
        return losses.sum() / counted.sum()

    def masked(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return eager(a[counted], b, scale)

    exact = with_gradients(masked, queries.double(), keys.double(), scale.double())
    found = with_gradients(
        by_scale(
            info_nce,
            query_ids=query_ids,
            key_ids=key_ids,
            hard_negative_beta=0.7,
            positive_prior=0.1,
            **options,
        ),
        queries,
        keys,
        scale,
    )
    assert kind == "ignored" or not counted.all()
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=2e-6 * float(true.abs().max()))


@pytest.mark.parametrize("prior", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_pair_without_negatives_has_no_loss(beta: float, prior: float) -> None:
    options: dict[str, Any] = {"hard_negative_beta": beta, "positive_prior": prior}
    for loss, size in ((nt_xent, 1), (info_nce, 1), (nt_xent, 0), (info_nce, 0)):
        a, b = unit(size, 4).requires_grad_(), unit(size, 4).requires_grad_()
        value = loss(a, b, **options)
        assert value == 0.0
        for gradient in torch.autograd.grad(value, (a, b)):
            assert (gradient == 0.0).all()


def test_gradients_of_both_orders_are_those_of_differences() -> None:
    a, b = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    temperature = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def loss(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
        return nt_xent(
            a,
            b,
            temperature=temperature,
            hard_negative_beta=0.6,
            positive_prior=0.1,
            normalize=True,
            backend="reference",
        )

    assert torch.autograd.gradcheck(loss, (a, b, temperature))
    assert torch.autograd.gradgradcheck(loss, (a, b, temperature))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"hard_negative_beta": -0.1},
            ValueError,
            "hard_negative_beta must be at least 0 and finite",
        ),
        ({"hard_negative_beta": float("nan")}, ValueError, "hard_negative_beta must be at least 0"),
        ({"hard_negative_beta": float("inf")}, ValueError, "hard_negative_beta must be at least 0"),
        ({"hard_negative_beta": "1"}, TypeError, "hard_negative_beta must be a number, got str"),
        ({"positive_prior": 1.0}, ValueError, "positive_prior must be in [0, 1), got 1.0"),
        ({"positive_prior": -0.1}, ValueError, "positive_prior must be in [0, 1), got -0.1"),
        ({"positive_prior": float("nan")}, ValueError, "positive_prior must be in [0, 1), got nan"),
        (
            {
                "positive_prior": 0.1,
                "query_ids": torch.tensor([0, 0, 1]),
                "key_ids": torch.tensor([0, 0, 1]),
                "same_ids": "positive",
            },
            ValueError,
            "hard_negative_beta and positive_prior must be 0 where a row has several positives, got "
            "0.0 and 0.1",
        ),
        (
            {"hard_negative_beta": 1.0, "key_log_probabilities": torch.zeros(3)},
            ValueError,
            "key_log_probabilities must be None for hard negatives or a prior of positives, got a",
        ),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(f"info_nce: {message}")):
        info_nce(unit(3, 5), unit(3, 5), **options)
