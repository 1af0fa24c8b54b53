"""Losses over all pairs against the eager formulas, in float64."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat._contrast import Pairs, pair_sums
from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss
from tests.support_losses import (
    assert_as_good_as_torch,
    eager_clip,
    eager_info_nce,
    eager_nt_xent,
    eager_supcon,
    with_gradients,
)

EACH_CLIP = functools.partial(clip_loss, reduction="none")
SIZES = [(31, 16), (33, 64), (97, 31), (257, 130), (600, 512)]


def unit(rows: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)


def by_scale(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """With the inverse of the temperature as the last argument."""

    def scaled(*arguments: Tensor) -> Tensor:
        *rest, scale = arguments
        return loss(*rest, temperature=1.0 / scale.double(), **options)

    return scaled


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
    assert_as_good_as_torch(
        by_scale(supcon_loss, reduction="none"),
        eager_supcon,
        unit(rows, dim),
        labels,
        torch.tensor(scale),
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
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


# Traps


def test_one_pair_has_no_loss_and_no_gradient() -> None:
    for values in with_gradients(clip_loss, unit(1, 8), unit(1, 8), torch.tensor(100.0)):
        assert (values == 0).all()


@pytest.mark.parametrize("dim", [1, 2, 512])
def test_scale_100_with_all_cosines_small_or_one(dim: int) -> None:
    same = torch.ones(50, dim) / math.sqrt(dim)
    loss, *_ = with_gradients(clip_loss, same, same, torch.tensor(100.0))
    torch.testing.assert_close(loss, torch.tensor(math.log(50)).double(), rtol=2e-6, atol=0.0)
    orthogonal = torch.zeros(50, 100)
    orthogonal[torch.arange(50), torch.arange(50)] = 1.0
    loss, *gradients = with_gradients(
        clip_loss, orthogonal, orthogonal.roll(50, 1), torch.tensor(100.0)
    )
    torch.testing.assert_close(loss, torch.tensor(math.log(50)).double(), rtol=2e-6, atol=0.0)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_flat_similarities_of_many_keys_are_not_dropped() -> None:
    queries, keys = unit(64, 16), unit(9000, 16)
    assert_as_good_as_torch(
        by_scale(info_nce, reduction="none"), eager_info_nce, queries, keys, torch.tensor(0.01)
    )


def test_rows_without_positives_do_not_count() -> None:
    features = unit(5, 8).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 3])
    losses = supcon_loss(features, labels, reduction="none")
    assert (losses[[1, 2, 4]] == 0).all()
    assert (losses[[0, 3]] > 0).all()
    mean = supcon_loss(features, labels)
    torch.testing.assert_close(mean, losses.sum() / 2)
    assert supcon_loss(features, torch.arange(5)) == 0.0
    alone = unit(1, 8).requires_grad_()
    (grad,) = torch.autograd.grad(supcon_loss(alone, torch.tensor([3])), alone)
    assert (grad == 0).all()


def test_rows_with_all_keys_left_out_have_no_loss() -> None:
    queries, keys = unit(4, 8).requires_grad_(), unit(6, 8)
    ids = torch.zeros(4, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
    losses = info_nce(queries, keys, query_ids=ids[0], key_ids=ids[1], reduction="none")
    assert losses.abs().max() == 0.0  # each key but the target is left out
    (grad,) = torch.autograd.grad(losses.sum(), queries)
    assert grad.isfinite().all()


def test_empty_batches_have_no_loss() -> None:
    none = torch.empty(0, 8, requires_grad=True)
    for loss in (
        clip_loss(none, none, 10.0),
        nt_xent(none, none),
        supcon_loss(none, torch.empty(0, dtype=torch.int64)),
        info_nce(none, unit(3, 8)),
    ):
        assert loss == 0.0
        assert torch.autograd.grad(loss, none)[0].shape == (0, 8)


def test_zero_vectors_stay_zero_when_normalized() -> None:
    queries = unit(6, 8)
    queries[2] = 0.0
    queries.requires_grad_()
    (grad,) = torch.autograd.grad(info_nce(queries, unit(6, 8), normalize=True), queries)
    assert grad.isfinite().all()
    assert (grad[2] == 0).all()


def test_strided_inputs_are_read_as_they_are() -> None:
    image, text = unit(16, 40).T[:, ::2], unit(32, 80)[::2, ::5].clone().T.contiguous().T
    wide = torch.randn(40, 16)[:, ::2]
    expected = clip_loss(wide.contiguous(), wide.flip(0).contiguous(), 3.0)
    assert clip_loss(wide, wide.flip(0), 3.0) == expected
    assert image.stride(1) != 1
    assert text.stride(0) == 1
    assert clip_loss(image, image.contiguous(), 3.0) == clip_loss(
        image.contiguous(), image.contiguous(), 3.0
    )


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    inputs = unit(700, 96), unit(700, 96), torch.tensor(30.0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(with_gradients(clip_loss, *inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(results[0][:3], other[:3], strict=True):
            assert torch.equal(ours, theirs)


def test_nothing_is_kept_for_the_gradient_without_need() -> None:
    image = unit(20, 8).requires_grad_()
    with torch.no_grad():
        loss = clip_loss(image, image, 10.0)
    assert not loss.requires_grad


# Refusals


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: clip_loss(unit(3, 4), unit(2, 4), 1.0),
            ValueError,
            r"clip_loss: text must have as many rows as image, 3, got 2",
        ),
        (
            lambda: clip_loss(unit(3, 4), unit(3, 5), 1.0),
            ValueError,
            r"clip_loss: text must have shape \(N, 4\), got \(3, 5\)",
        ),
        (
            lambda: clip_loss(unit(3, 4), unit(3, 4), 0.0),
            ValueError,
            r"clip_loss: logit_scale must be positive and finite, got 0\.0",
        ),
        (
            lambda: clip_loss(unit(3, 4), unit(3, 4).double(), 1.0),
            TypeError,
            r"clip_loss: text must be float32, got float64",
        ),
        (
            lambda: clip_loss(unit(3, 4) / 0.0, unit(3, 4), 1.0),
            ValueError,
            r"clip_loss: image must be finite, got NaN or infinity in row 0",
        ),
        (
            lambda: nt_xent(unit(3, 4), unit(3, 4), temperature=-1.0),
            ValueError,
            r"nt_xent: temperature must be positive and finite, got -1\.0",
        ),
        (
            lambda: nt_xent(unit(3, 4), unit(3, 4), reduction="max"),  # type: ignore[arg-type]
            ValueError,
            r"nt_xent: reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (
            lambda: supcon_loss(unit(3, 4), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"supcon_loss: labels must have shape \(3,\), got \(2,\)",
        ),
        (
            lambda: supcon_loss(unit(3, 4), torch.zeros(3)),
            TypeError,
            r"supcon_loss: labels must be int64, got float32",
        ),
        (
            lambda: info_nce(unit(3, 4), unit(2, 4)),
            ValueError,
            r"info_nce: keys must be at least as many as queries, 3, without targets, got 2",
        ),
        (
            lambda: info_nce(unit(3, 4), unit(3, 4), targets=torch.tensor([0, 3, 1])),
            ValueError,
            r"info_nce: targets must be in \[0, 3\), got 0 to 3",
        ),
        (
            lambda: info_nce(unit(3, 4), unit(3, 4), query_ids=torch.arange(3)),
            ValueError,
            r"info_nce: key_ids must be given together with query_ids, got None",
        ),
        (
            lambda: info_nce(unit(3, 4), unit(3, 4), same_ids="positive"),
            ValueError,
            r"info_nce: query_ids must be given with same_ids 'positive', got None",
        ),
        (
            lambda: info_nce(unit(3, 4), unit(3, 4), backend="triton"),
            NotImplementedError,
            r"info_nce: backend 'triton' does not support these inputs",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Tensor], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# torch


def test_the_op_passes_the_checks_of_torch() -> None:
    a, b = unit(9, 6).requires_grad_(), unit(7, 6).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    ids = torch.arange(9, dtype=torch.int32) % 4, torch.arange(7, dtype=torch.int32) % 4
    arguments = (a, b, scale, None, *ids, None, None, False, True, False, True, True, False, 4096)
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
