"""Losses over all pairs against the eager formulas, in float64."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat._contrast import Pairs, pair_sums
from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss
from tests.support_losses import (
    assert_as_good_as_torch,
    by_scale,
    eager_clip,
    eager_info_nce,
    eager_nt_xent,
    eager_supcon,
    eager_supcon_inside,
    unit,
    with_gradients,
)

EACH_CLIP = functools.partial(clip_loss, reduction="none")
SIZES = [(31, 16), (33, 64), (97, 31), (257, 130), (600, 512)]


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_clip_loss_is_as_good_as_torch(rows: int, dim: int, scale: float) -> None:
    image, text = unit(rows, dim), unit(rows, dim)
    assert_as_good_as_torch(EACH_CLIP, eager_clip, image, text, torch.tensor(scale))
    near = torch.nn.functional.normalize(image + 0.2 * text, dim=1)
    assert_as_good_as_torch(EACH_CLIP, eager_clip, image, near, torch.tensor(scale))


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_info_nce_is_as_good_as_torch(rows: int, dim: int, scale: float) -> None:
    queries, keys = unit(rows, dim), unit(2 * rows + 5, dim)
    assert_as_good_as_torch(
        by_scale(info_nce, reduction="none"), eager_info_nce, queries, keys, torch.tensor(scale)
    )


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_supcon_loss_is_as_good_as_torch(rows: int, dim: int, scale: float) -> None:
    labels = torch.randint(max(rows // 4, 1), (rows,))
    labels[:2] = 0
    inputs = unit(rows, dim), labels, torch.tensor(scale)
    assert_as_good_as_torch(by_scale(supcon_loss, reduction="none"), eager_supcon, *inputs)
    assert_as_good_as_torch(
        by_scale(supcon_loss, average="in", reduction="none"), eager_supcon_inside, *inputs
    )


@pytest.mark.parametrize("scale", [2.0, 10.0])
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_nt_xent_is_as_good_as_torch(rows: int, dim: int, scale: float) -> None:
    z1, z2 = unit(rows, dim), unit(rows, dim)
    assert_as_good_as_torch(
        by_scale(nt_xent, reduction="none"), eager_nt_xent, z1, z2, torch.tensor(scale)
    )


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (13, 1)])
def test_tiny_batches_are_right_to_a_few_roundings(rows: int, dim: int) -> None:
    image, text, scale = unit(rows, dim), unit(rows, dim), torch.tensor(14.0)
    exact = with_gradients(eager_clip, image.double(), text.double(), scale.double())
    for ours, true in zip(with_gradients(EACH_CLIP, image, text, scale), exact, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-6, atol=3e-6)


# Against the reference, in float64, whatever the options.

LOSSES: dict[str, Callable[..., Tensor]] = {
    "extra keys": lambda q, k, **o: info_nce(q, k, extra_keys=k.flip(0) * 0.5, **o),
    "targets": lambda q, k, **o: info_nce(q, k, targets=torch.arange(40).flip(0) % 7, **o),
    "ignored ids": lambda q, k, **o: info_nce(
        q, k, query_ids=torch.arange(40) % 9, key_ids=torch.arange(40) % 9, **o
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
    "symmetric": lambda q, k, **o: info_nce(q, k, symmetric=True, **o),
    "log probabilities": lambda q, k, **o: info_nce(
        q, k, key_log_probabilities=-torch.arange(40.0) / 5, **o
    ),
    "normalized": lambda q, k, **o: info_nce(3 * q, k, normalize=True, **o),
    "captions": lambda q, k, **o: clip_loss(
        q, k, 7.0, image_ids=torch.arange(40) // 2, text_ids=torch.arange(40) // 4, **o
    ),
    "labels": lambda q, k, **o: supcon_loss(torch.cat([q, k]), torch.arange(80) % 13, **o),
    "labels inside": lambda q, k, **o: supcon_loss(
        torch.cat([q, k]), torch.arange(80) % 61 % 50, average="in", **o
    ),
    "hard negatives": lambda q, k, **o: info_nce(
        q, k, hard_negative_beta=0.5, positive_prior=0.01, temperature=0.5, **o
    ),
    "spread targets": lambda q, k, **o: info_nce(
        q, k, targets=torch.arange(1600.0).view(40, 40) % 7, symmetric=True, **o
    ),
    "views": lambda q, k, **o: nt_xent(q, k, **o),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", LOSSES)
def test_every_option_is_that_of_the_reference(case: str, reduction: str) -> None:
    def weighted(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        def total(*inputs: Tensor) -> Tensor:
            values = loss(*inputs, reduction=reduction, **options)
            return (values * torch.arange(1.0, 1.0 + values.numel())).sum()

        return total

    inputs = unit(40, 24), unit(40, 24)
    ours = with_gradients(weighted(LOSSES[case]), *inputs)
    exact = with_gradients(
        weighted(LOSSES[case], backend="reference"), *(x.double() for x in inputs)
    )
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=3e-6, atol=3e-6 * float(true.abs().max()))


def test_half_precision_is_rounded_once() -> None:
    dtype = torch.float16
    image, text = unit(70, 48).to(dtype), unit(70, 48).to(dtype)
    loss, *gradients = with_gradients(clip_loss, image, text, torch.tensor(20.0))
    exact = with_gradients(
        functools.partial(clip_loss, backend="reference"),
        image.double(),
        text.double(),
        torch.tensor(20.0, dtype=torch.float64),
    )
    torch.testing.assert_close(loss, exact[0], rtol=1e-6, atol=0.0)
    tiny = torch.finfo(dtype).smallest_normal
    for mine, true in zip(gradients[:2], exact[1:3], strict=True):
        torch.testing.assert_close(mine, true, rtol=torch.finfo(dtype).eps, atol=tiny)


def test_a_large_upstream_gradient_does_not_overflow_before_the_cast() -> None:
    image = unit(300, 32).half().requires_grad_()
    loss = clip_loss(image, unit(300, 32).half(), 10.0)
    (grad,) = torch.autograd.grad(loss * 65536.0, image)
    assert grad.isfinite().all()
    assert (grad != 0).any()


# torch


def test_the_op_passes_the_checks_of_torch() -> None:
    a, b = unit(9, 6).requires_grad_(), unit(7, 6).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    ids = torch.arange(9, dtype=torch.int32) % 4, torch.arange(7, dtype=torch.int32) % 4
    said = (None, *ids, None, None, False, True, False)
    arguments = (a, b, scale, "cpu", *said, True, True, False, 4096)
    torch.library.opcheck(torch.ops.pyfeat.pair_sums.default, arguments)


@pytest.mark.slow
def test_a_loss_compiles_into_one_graph() -> None:
    def step(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        image = torch.nn.functional.normalize(image, dim=1)
        return pair_sums(image, text, scale, Pairs()).row_lse.mean()

    inputs = torch.randn(12, 8), unit(10, 8), torch.tensor(5.0)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        with_gradients(compiled, *inputs), with_gradients(step, *inputs), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_reference_are_right() -> None:
    a, b = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 1, 0, 2, 3])

    def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return info_nce(
            a,
            b,
            temperature=1.0 / scale,
            query_ids=ids,
            key_ids=ids.flip(0),
            symmetric=True,
            reduction="sum",
            backend="reference",
        )

    assert torch.autograd.gradcheck(loss, (a, b, scale))
    assert torch.autograd.gradgradcheck(loss, (a, b, scale))
