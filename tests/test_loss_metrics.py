"""Metrics that losses return, against what all similarities say."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pyfeat._contrast import memory_budget, set_memory_budget
from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss
from tests.support_losses import TensorSizes, unit

SIZES = [(1, 3), (2, 1), (33, 8), (130, 40)]


class Case(NamedTuple):
    """A loss with metrics, and what is similar, positive and left out, for the dense twin."""

    loss: Callable[..., Any]
    scale: float
    similarities: Tensor  # products of features
    positive: Tensor
    left_out: Tensor
    bias: Tensor | float = 0.0


def queries_and_keys(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    queries = 1.3 * unit(rows, dim)
    return queries, torch.cat([queries + 4.0 * unit(rows, dim), unit(rows // 2 + 3, dim)])


def case_of(kind: str, rows: int, dim: int) -> Case:
    q, k = queries_and_keys(rows, dim)
    s = q.double() @ k.double().T
    index, columns = torch.arange(rows), torch.arange(len(k))
    diagonal = index[:, None] == columns
    nothing = torch.zeros_like(diagonal)
    if kind == "targets":
        targets = (index + (index % 3 == 0)) % rows
        positive = targets[:, None] == columns
        return Case(lambda **o: info_nce(q, k, targets=targets, **o), 10.0, s, positive, nothing)
    if kind == "ignored":
        ids: dict[str, Any] = {"query_ids": index % 4, "key_ids": columns % 4}
        same = (index % 4)[:, None] == columns % 4
        return Case(lambda **o: info_nce(q, k, **ids, **o), 10.0, s, diagonal, same & ~diagonal)
    if kind == "positive":
        ids = {"query_ids": index % 5 + 1, "key_ids": columns % 7}
        log_p = torch.linspace(-2.0, 0.0, len(k))
        options: dict[str, Any] = {**ids, "same_ids": "positive", "key_log_probabilities": log_p}
        same = (index % 5 + 1)[:, None] == columns % 7
        return Case(lambda **o: info_nce(q, k, **options, **o), 10.0, s, same, nothing, -log_p)
    if kind == "clip":
        k = k[:rows]
        return Case(
            lambda **o: clip_loss(q, k, 7.0, **o),
            7.0,
            s[:, :rows],
            diagonal[:, :rows],
            nothing[:, :rows],
        )
    if kind == "hard":
        options = {"hard_negative_beta": 0.8, "positive_prior": 0.01, "temperature": 0.5}
        return Case(lambda **o: info_nce(q, k, **options, **o), 2.0, s, diagonal, nothing)
    k = k[:rows]
    z = torch.cat([q, k])
    eye = torch.eye(2 * rows, dtype=torch.bool)
    s = z.double() @ z.double().T
    if kind == "views":
        return Case(lambda **o: nt_xent(q, k, **o), 2.0, s, eye.roll(rows, 1), eye)
    labels = torch.arange(2 * rows) % (rows // 2 + 1)
    same = (labels[:, None] == labels) & ~eye
    average = "in" if kind == "labels inside" else "out"
    return Case(lambda **o: supcon_loss(z, labels, average=average, **o), 10.0, s, same, eye)


KINDS = ["targets", "ignored", "positive", "clip", "hard", "views", "labels", "labels inside"]


def dense(case: Case) -> list[Tensor]:
    s = case.scale * case.similarities + case.bias
    negative = ~case.positive & ~case.left_out
    counted = case.positive.any(dim=1)
    best_positive = s.where(case.positive, -torch.inf).amax(dim=1)
    best_other = s.where(negative, -torch.inf).amax(dim=1)
    rows = counted[:, None]
    lse = s.where(~case.left_out, -torch.inf).logsumexp(dim=1)
    return [
        (best_positive >= best_other)[counted].double().mean(),
        case.similarities[case.positive & rows].mean(),
        case.similarities[negative & rows].mean(),
        lse[counted].mean(),
    ]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "dim"), SIZES)
def test_metrics_are_those_of_all_similarities(
    rows: int, dim: int, kind: str, backend: str | None
) -> None:
    case = case_of(kind, rows, dim)
    loss, metrics = case.loss(return_metrics=True, backend=backend)
    assert torch.equal(loss, case.loss(backend=backend))
    expected = [x.nan_to_num(0.0) for x in dense(case)]
    if kind == "hard":
        # The denominator has weighted negatives in it: what the loss is short of.
        losses = case.loss(reduction="none", backend=backend).double()
        positives = (case.scale * case.similarities).where(case.positive, 0.0).sum(dim=1)
        expected[3] = (losses + positives).mean()
    for found, exact in zip(metrics, expected, strict=True):
        assert found.shape == ()
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_some_rows_are_right_and_some_are_not() -> None:
    shares = {kind: float(dense(case_of(kind, 130, 40))[0]) for kind in KINDS}
    assert all(0.0 < share < 1.0 for share in shares.values()), shares


def test_a_tie_is_right_where_a_row_has_one_positive() -> None:
    same, labels = torch.ones(6, 4), torch.arange(6) % 2
    for loss, share in (
        (info_nce(same, same, return_metrics=True), 1.0),
        (clip_loss(same, same, 3.0, return_metrics=True), 1.0),
        (nt_xent(same, same, return_metrics=True), 1.0),
        (supcon_loss(same, labels, return_metrics=True), 0.0),
    ):
        assert loss[1].top1 == share


def test_what_is_empty_has_metrics_of_zero() -> None:
    none = torch.empty(0, 4)
    nobody = supcon_loss(unit(5, 4), torch.arange(5), return_metrics=True)
    for _, metrics in (
        info_nce(none, unit(3, 4), return_metrics=True),
        nt_xent(none, none, return_metrics=True),
        clip_loss(none, none, 1.0, return_metrics=True),
        nobody,
    ):
        assert all(value == 0.0 for value in metrics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metrics_are_float32_for_all_features(dtype: torch.dtype) -> None:
    q, k = unit(20, 8).to(dtype), unit(20, 8).to(dtype)
    _, metrics = clip_loss(q, k, 5.0, return_metrics=True)
    s = q.double() @ k.double().T
    off_diagonal = (s.sum() - s.trace()) / (20 * 19)
    assert metrics.negative_similarity.dtype == torch.float32
    torch.testing.assert_close(
        metrics.negative_similarity.double(), off_diagonal, rtol=0.0, atol=1e-6
    )


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_metrics_do_not_depend_on_the_reduction(reduction: Any) -> None:
    case = case_of("ignored", 33, 8)
    expected = case.loss(return_metrics=True)[1]
    found = case.loss(return_metrics=True, reduction=reduction)[1]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_gradients_are_those_without_metrics() -> None:
    q, k = unit(33, 8).requires_grad_(), unit(33, 8)
    (plain,) = torch.autograd.grad(nt_xent(q, k), q)
    (measured,) = torch.autograd.grad(nt_xent(q, k, return_metrics=True)[0], q)
    assert torch.equal(plain, measured)


@pytest.mark.parametrize("kind", ["ignored", "positive", "views", "labels"])
def test_no_tensor_of_all_pairs_is_made(kind: str) -> None:
    case = case_of(kind, 300, 4)
    budget = memory_budget()
    set_memory_budget(0)
    try:
        with TensorSizes() as sizes:
            case.loss(return_metrics=True)
    finally:
        set_memory_budget(budget)
    assert 0 < sizes.largest <= 4 * (600 + 600)
