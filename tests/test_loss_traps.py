"""Losses over all pairs of batches that are small, degenerate or wrong."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss
from tests.support_losses import (
    assert_as_good_as_torch,
    by_scale,
    eager_info_nce,
    eager_supcon,
    eager_supcon_inside,
    unit,
    with_gradients,
)


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


def test_zero_vectors_stay_zero_when_normalized() -> None:
    queries = unit(6, 8)
    queries[2] = 0.0
    queries.requires_grad_()
    (grad,) = torch.autograd.grad(info_nce(queries, unit(6, 8), normalize=True), queries)
    assert grad.isfinite().all()
    assert (grad[2] == 0).all()


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_lengths_whose_squares_overflow_or_vanish_are_normalized(size: float) -> None:
    queries, keys = unit(20, 8), unit(20, 8)
    found = with_gradients(functools.partial(nt_xent, normalize=True), size * queries, size * keys)
    expected = with_gradients(functools.partial(nt_xent, normalize=True), queries, keys)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0.0)
    for mine, true in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(size * mine, true, rtol=1e-4, atol=1e-6)


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


def test_one_label_for_all_leaves_no_negatives() -> None:
    features, labels = unit(20, 8), torch.zeros(20, dtype=torch.int64)
    for loss, eager in (
        (by_scale(supcon_loss, reduction="none"), eager_supcon),
        (by_scale(supcon_loss, average="in", reduction="none"), eager_supcon_inside),
    ):
        assert_as_good_as_torch(loss, eager, features, labels, torch.tensor(7.0))


def test_the_same_id_everywhere_makes_all_keys_positive() -> None:
    ids: dict[str, Any] = {"query_ids": torch.full((5,), -3), "key_ids": torch.full((7,), -3)}
    queries, keys = unit(5, 8), unit(7, 8)
    loss = info_nce(queries, keys, same_ids="positive", symmetric=True, **ids)
    s = queries.double() @ keys.double().T / 0.1
    exact = 0.5 * ((s.logsumexp(1) - s.mean(1)).mean() + (s.logsumexp(0) - s.mean(0)).mean())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0.0)


def _clip(q: Tensor, k: Tensor, temperature: float = 0.1, **options: Any) -> Any:
    return clip_loss(q, k, 1.0 / temperature, **options)


def _paired(q: Tensor) -> dict[str, Any]:
    return {"query_ids": torch.arange(len(q)), "key_ids": torch.arange(len(q))}


def _labels(q: Tensor, k: Tensor, **options: Any) -> Any:
    return supcon_loss(torch.cat([q, k]), torch.arange(len(q)).repeat(2), **options)


PAIRS: dict[str, Callable[..., Tensor]] = {
    "clip": _clip,
    "targets": info_nce,
    "symmetric": lambda q, k, **o: info_nce(q, k, symmetric=True, **o),
    "left out": lambda q, k, **o: info_nce(q, k, **_paired(q), **o),
    "positive ids": lambda q, k, **o: info_nce(q, k, **_paired(q), same_ids="positive", **o),
    "spread": lambda q, k, **o: info_nce(q, k, targets=torch.eye(len(q)), symmetric=True, **o),
    "views": nt_xent,
    "labels": _labels,
    "labels inside": lambda q, k, **o: _labels(q, k, average="in", **o),
    "no label twice": lambda q, k, **o: supcon_loss(
        torch.cat([q, k]), torch.arange(2 * len(q)), **o
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("size", [0, 1])
def test_one_pair_or_none_has_no_loss(size: int, case: str, dtype: torch.dtype) -> None:
    queries, keys = (unit(size, 8).to(dtype).requires_grad_() for _ in range(2))
    loss = PAIRS[case](queries, keys)
    torch.testing.assert_close(loss.double(), torch.zeros(()).double(), rtol=0.0, atol=1e-6)
    for gradient in torch.autograd.grad(loss, (queries, keys)):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("case", PAIRS)
def test_float16_gradients_are_finite_where_they_can_be(case: str) -> None:
    # By vectors of unit length they are up to 65,536 / 3 / 0.01 or more; float16 ends at 65,504.
    inputs = [(100.0 * unit(3, 5)).half() for _ in range(2)]

    def upstream(q: Tensor, k: Tensor) -> Tensor:
        return 65536.0 * PAIRS[case](q, k, temperature=0.01, normalize=True)

    found = with_gradients(upstream, *inputs)
    exact = with_gradients(upstream, *(x.double() for x in inputs))
    for mine, true in zip(found[1:], exact[1:], strict=True):
        assert float(true.abs().max()) < 60000.0
        torch.testing.assert_close(mine, true, rtol=2.0**-10, atol=2.0**-6)


@pytest.mark.parametrize("average", ["out", "in"])
def test_gradients_may_be_differentiated(average: Any) -> None:
    x, labels = unit(9, 4), torch.arange(9) % 3

    def squared(x: Tensor, backend: Any = None) -> Tensor:
        x = x.detach().requires_grad_()
        loss = supcon_loss(x, labels, average=average, temperature=0.5, backend=backend)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    exact = squared(x.double(), "reference")
    assert float(exact.abs().max()) > 0.01
    torch.testing.assert_close(squared(x).double(), exact, rtol=1e-5, atol=1e-6)


# Refusals

THREE = torch.ones(3, 4)
IDS = torch.arange(3)
REFUSED: list[tuple[Callable[[], Tensor], type, str]] = [
    (
        lambda: clip_loss(THREE, torch.ones(2, 4), 1.0),
        ValueError,
        "clip_loss: text must have as many rows as image, 3, got 2",
    ),
    (
        lambda: clip_loss(THREE, torch.ones(3, 5), 1.0),
        ValueError,
        "clip_loss: text must have shape (N, 4), got (3, 5)",
    ),
    (
        lambda: clip_loss(THREE, THREE.double(), 1.0),
        TypeError,
        "clip_loss: text must be float32, got float64",
    ),
    (
        lambda: clip_loss(THREE / 0.0, THREE, 1.0),
        ValueError,
        "clip_loss: image must be finite, got NaN or infinity in row 0",
    ),
    (
        lambda: clip_loss(
            THREE, torch.ones(2, 4), 1.0, image_ids=IDS, text_ids=IDS[:2], reduction="none"
        ),
        ValueError,
        "clip_loss: reduction must be 'mean' or 'sum' for N != M, got 'none'",
    ),
    (
        lambda: nt_xent(THREE, THREE, reduction="max"),  # type: ignore[call-overload]
        ValueError,
        "nt_xent: reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    (
        lambda: nt_xent(THREE, torch.ones(2, 4)),
        ValueError,
        "nt_xent: z2 must have as many rows as z1, 3, got 2",
    ),
    (
        lambda: supcon_loss(THREE, IDS[:2]),
        ValueError,
        "supcon_loss: labels must have shape (3,), got (2,)",
    ),
    (
        lambda: supcon_loss(THREE, torch.zeros(3)),
        TypeError,
        "supcon_loss: labels must be int64, got float32",
    ),
    (
        lambda: supcon_loss(THREE, IDS.int()),
        TypeError,
        "supcon_loss: labels must be int64, got int32",
    ),
    (
        lambda: supcon_loss(THREE, [0, 1, 1]),  # type: ignore[call-overload]
        TypeError,
        "supcon_loss: labels must be a tensor of int64, got list",
    ),
    (
        lambda: supcon_loss(THREE, None),  # type: ignore[call-overload]
        TypeError,
        "supcon_loss: labels must be a tensor of int64, got NoneType",
    ),
    (
        lambda: supcon_loss(THREE, IDS.to("meta")),
        ValueError,
        "supcon_loss: labels must be on cpu, got meta",
    ),
    (
        lambda: supcon_loss(THREE, IDS, average="both"),  # type: ignore[call-overload]
        ValueError,
        "supcon_loss: average must be one of 'out', 'in', got 'both'",
    ),
    (
        lambda: info_nce(THREE, torch.ones(2, 4)),
        ValueError,
        "info_nce: keys must be at least as many as queries, 3, without targets, got 2",
    ),
    (
        lambda: info_nce(THREE, THREE, targets=torch.tensor([0, 3, 1])),
        ValueError,
        "info_nce: targets must be in [0, 3), got 0 to 3",
    ),
    (
        lambda: info_nce(THREE, THREE, targets=torch.tensor([0, -1, 1])),
        ValueError,
        "info_nce: targets must be in [0, 3), got -1 to 1",
    ),
    (
        lambda: info_nce(THREE, THREE, targets=IDS, symmetric=True),
        ValueError,
        "info_nce: targets must be None for a symmetric loss, got a tensor",
    ),
    (
        lambda: info_nce(THREE, THREE, extra_keys=THREE, symmetric=True),
        ValueError,
        "info_nce: extra_keys must be None for a symmetric loss, got a tensor",
    ),
    (
        lambda: info_nce(THREE, torch.ones(4, 4), symmetric=True),
        ValueError,
        "info_nce: keys must have as many rows as queries, 3, got 4",
    ),
    (
        lambda: info_nce(THREE, THREE, query_ids=IDS),
        ValueError,
        "info_nce: key_ids must be given together with query_ids, got None",
    ),
    (
        lambda: info_nce(THREE, THREE, same_ids="positive"),
        ValueError,
        "info_nce: query_ids must be given with same_ids 'positive', got None",
    ),
    (
        lambda: info_nce(
            THREE, THREE, query_ids=IDS, key_ids=IDS, targets=IDS, same_ids="positive"
        ),
        ValueError,
        "info_nce: targets must be None for same_ids 'positive', got a tensor",
    ),
    (
        lambda: info_nce(THREE, THREE, same_ids="other"),  # type: ignore[call-overload]
        ValueError,
        "info_nce: same_ids must be one of 'ignore', 'positive', got 'other'",
    ),
    (
        lambda: info_nce(THREE, THREE, key_log_probabilities=torch.zeros(2)),
        ValueError,
        "info_nce: key_log_probabilities must have shape (3,), got (2,)",
    ),
    (
        lambda: info_nce(THREE, THREE, key_log_probabilities=torch.tensor([0.0, -math.inf, 0.0])),
        ValueError,
        "info_nce: key_log_probabilities must be finite, got -inf",
    ),
    (
        lambda: info_nce(THREE, THREE, backend="triton"),
        NotImplementedError,
        "info_nce: backend 'triton' does not support these inputs",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[x[2][:60] for x in REFUSED])
def test_bad_input_is_named(call: Callable[[], Tensor], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "must be positive and finite, got 0.0"),
        (-1.0, ValueError, "must be positive and finite, got -1.0"),
        (math.nan, ValueError, "must be positive and finite, got nan"),
        (math.inf, ValueError, "must be positive and finite, got inf"),
        (torch.tensor(math.nan), ValueError, "must be positive and finite, got nan"),
        (1e-31, ValueError, "must be in [1e-30, 1e+30], got 1e-31"),
        (1e31, ValueError, "must be in [1e-30, 1e+30], got 1e+31"),
        (torch.ones(2), ValueError, "must be a number, got float32 of (2,)"),
        (torch.tensor(1), ValueError, "must be a number, got int64 of ()"),
        ("1", TypeError, "must be a number, got str"),
        (None, TypeError, "must be a number, got NoneType"),
    ],
    ids=str,
)
def test_bad_temperatures_are_named(value: Any, error: type, message: str) -> None:
    for name, loss in (("info_nce", info_nce), ("nt_xent", nt_xent), ("supcon_loss", supcon_loss)):
        second = IDS if name == "supcon_loss" else THREE
        with pytest.raises(error, match=re.escape(f"{name}: temperature {message}")):
            loss(THREE, second, temperature=value)
    with pytest.raises(error, match=re.escape(f"clip_loss: logit_scale {message}")):
        clip_loss(THREE, THREE, value)
