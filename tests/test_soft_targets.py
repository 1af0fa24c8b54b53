"""info_nce with targets that are spread over keys, against the cross-entropy of torch."""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat._contrast import memory_budget, set_memory_budget
from pyfeat.losses import info_nce
from tests.support_losses import TensorSizes, assert_as_good_as_torch, unit, with_gradients

SIZES = [(1, 1, 1), (31, 50, 16), (33, 33, 64), (130, 257, 130), (600, 333, 64)]


def spread(rows: int, columns: int) -> Tensor:
    """Sums of rows from 0 to about 3, a row and a column without targets, and many zeros."""
    targets = torch.rand(rows, columns).square() * (torch.rand(rows, columns) < 0.3)
    targets = targets / columns * 10 * torch.linspace(0.1, 3.0, rows)[:, None]
    targets[rows // 2] = 0.0
    targets[:, columns // 3] = 0.0
    targets[0, -1] = 0.7
    return targets


def eager(queries: Tensor, keys: Tensor, scale: Tensor, *, targets: Tensor) -> Tensor:
    log_p = (scale * queries @ keys.T).log_softmax(dim=1)
    return -(targets.to(log_p.dtype) * log_p).sum(dim=1)


def ours(queries: Tensor, keys: Tensor, scale: Tensor, **options: Any) -> Any:
    return info_nce(queries, keys, temperature=1.0 / scale.double(), reduction="none", **options)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize(("rows", "columns", "dim"), SIZES)
def test_losses_and_gradients_are_as_good_as_those_of_torch(
    rows: int, columns: int, dim: int, scale: float
) -> None:
    targets = spread(rows, columns)
    assert_as_good_as_torch(
        functools.partial(ours, targets=targets),
        functools.partial(eager, targets=targets),
        unit(rows, dim),
        unit(columns, dim),
        torch.tensor(scale),
        cancelled=scale * float(targets.sum(dim=1).max()) / rows,
    )


def as_coo(targets: Tensor) -> Tensor:
    """With some entries given in two parts."""
    indices, values = targets.nonzero().T, targets[targets > 0]
    twice = torch.cat([indices, indices[:, :20]], dim=1)
    parts = torch.cat([0.5 * values[:20], values[20:], 0.5 * values[:20]])
    return torch.sparse_coo_tensor(twice, parts, targets.shape, check_invariants=True)


def as_csr(targets: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return targets.to_sparse_csr()


@pytest.mark.parametrize("sparse", [as_coo, as_csr])
@pytest.mark.parametrize("symmetric", [False, True])
def test_sparse_targets_are_those_that_they_store(
    sparse: Callable[[Tensor], Tensor], symmetric: bool
) -> None:
    inputs = unit(40, 24), unit(70, 24), torch.tensor(0.2)
    targets = spread(40, 70)

    def loss(targets: Tensor) -> Callable[..., Tensor]:
        return lambda q, k, t: info_nce(
            q, k, temperature=t, targets=targets, symmetric=symmetric, reduction="sum"
        )

    stored = with_gradients(loss(targets), *inputs)
    for mine, dense in zip(with_gradients(loss(sparse(targets)), *inputs), stored, strict=True):
        torch.testing.assert_close(mine, dense, rtol=2e-6, atol=2e-6 * float(dense.abs().max()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_symmetric_loss_takes_targets_transposed(reduction: Any) -> None:
    targets, bias = spread(40, 70), torch.linspace(-2.0, 0.5, 70)

    def dense(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        s, t = scale * queries @ keys.T - bias, targets.double()
        total = torch.zeros((), dtype=torch.float64)
        for logits, weights in ((s, t), (s.T, t.T)):
            part = -(weights * logits.log_softmax(dim=1)).sum()
            total = total + part / (2 * (weights.sum(1) > 0).sum() if reduction == "mean" else 2)
        return total

    inputs = unit(40, 24), unit(70, 24), torch.tensor(5.0)
    exact = with_gradients(dense, *(x.double() for x in inputs))
    found = with_gradients(
        lambda q, k, scale: info_nce(
            q,
            k,
            temperature=1.0 / scale,
            targets=targets,
            key_log_probabilities=bias,
            symmetric=True,
            reduction=reduction,
        ),
        *inputs,
    )
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=2e-6, atol=2e-6 * float(true.abs().max()))


def test_one_key_for_every_query_is_the_usual_loss() -> None:
    inputs = unit(50, 20), unit(60, 20), torch.tensor(20.0)
    chosen = torch.randint(60, (50,))
    one_hot = torch.nn.functional.one_hot(chosen, 60).float()
    hard = with_gradients(functools.partial(ours, targets=chosen), *inputs)
    soft = with_gradients(functools.partial(ours, targets=one_hot), *inputs)
    for x, y in zip(hard, soft, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=3e-6)


def test_extra_keys_have_columns_of_their_own() -> None:
    queries, keys, extra = unit(6, 8), unit(4, 8), unit(5, 8)
    targets = spread(6, 9)
    expected = info_nce(queries, torch.cat([keys, extra]), targets=targets, reduction="none")
    found = info_nce(queries, keys, extra_keys=extra, targets=targets, reduction="none")
    assert torch.equal(found, expected)


def test_rows_without_targets_have_no_loss_and_do_not_count() -> None:
    queries, keys = unit(8, 4).requires_grad_(), unit(5, 4)
    targets = spread(8, 5)
    losses = info_nce(queries, keys, targets=targets, reduction="none")
    assert losses[4] == 0.0
    mean = info_nce(queries, keys, targets=targets)
    torch.testing.assert_close(mean, losses.sum() / (targets.sum(dim=1) > 0).sum())
    (grad,) = torch.autograd.grad(mean, queries)
    assert (grad[4] == 0.0).all()
    none = info_nce(queries, keys, targets=torch.zeros(8, 5), symmetric=True)
    assert none == 0.0
    assert (torch.autograd.grad(none, queries)[0] == 0.0).all()
    assert info_nce(queries[:0], keys, targets=torch.zeros(0, 5)) == 0.0
    assert info_nce(queries, keys[:0], targets=torch.zeros(8, 0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    # The targets are those that the similarities give, so that gradients by both sums nearly cancel.
    q, k = unit(40, 24).to(dtype), unit(50, 24).to(dtype)
    targets = (8.0 * q.double() @ k.double().T).softmax(dim=1)
    loss = functools.partial(ours, targets=targets)
    exact = with_gradients(loss, q.double(), k.double(), torch.tensor(8.5, dtype=torch.float64))
    found = with_gradients(loss, q, k, torch.tensor(8.5))
    torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=0.0)
    for mine, true in zip(found[1:3], exact[1:3], strict=True):
        tiny = torch.finfo(dtype).smallest_normal + 2.0**-23
        torch.testing.assert_close(mine, true, rtol=torch.finfo(dtype).eps, atol=tiny)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_both_orders_are_those_of_differences(sparse: bool) -> None:
    a, b = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    targets = spread(4, 3).double()
    targets = as_coo(targets) if sparse else targets

    def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return info_nce(a, b, temperature=1.0 / scale, targets=targets, symmetric=True)

    assert torch.autograd.gradcheck(loss, (a, b, scale))
    assert torch.autograd.gradgradcheck(loss, (a, b, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_other_tensor_is_as_large_as_the_targets(dtype: torch.dtype, symmetric: bool) -> None:
    queries, keys = unit(300, 8).requires_grad_(), unit(400, 8).requires_grad_()
    targets = spread(300, 400).to(dtype)
    budget = memory_budget()
    set_memory_budget(0)
    try:
        with TensorSizes(targets) as sizes:
            info_nce(queries, keys, targets=targets, symmetric=symmetric).backward()  # type: ignore[no-untyped-call]
    finally:
        set_memory_budget(budget)
    assert 0 < sizes.largest <= 400 * 8


def _coo(rows: list[int], columns: list[int]) -> Tensor:
    with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
        return torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.ones(2), (3, 4))


def _csr(ends: list[int], columns: list[int], size: int = 3) -> Tensor:
    unchecked = torch.sparse.check_sparse_tensor_invariants(False)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(), unchecked:
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            torch.tensor(ends), torch.tensor(columns), torch.ones(2), (size, 4)
        )


def _dense(value: float) -> Tensor:
    targets = torch.ones(3, 4)
    targets[1, 2] = value
    return targets


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.ones(3), ValueError, "targets must have shape (3, 4), got (3,)"),
        (torch.ones(4, 3), ValueError, "targets must have shape (3, 4), got (4, 3)"),
        (torch.ones(3, 4).half(), TypeError, "targets must be int64, float32 or float64, got flo"),
        (torch.ones(3, 4, device="meta"), ValueError, "targets must be on cpu, got meta"),
        (_dense(-1.0), ValueError, "targets must be at least 0 and finite, got -1.0 to 1.0"),
        (_dense(float("inf")), ValueError, "targets must be at least 0 and finite, got 1.0 to inf"),
        (_dense(float("nan")), ValueError, "targets must be at least 0 and finite, got nan to nan"),
        (
            -_dense(1.0).to_sparse(),
            ValueError,
            "targets must be at least 0 and finite, got -1.0 to",
        ),
        (_coo([0, 3], [0, 1]), ValueError, "targets must have indices inside (3, 4), got size is"),
        (_coo([0, 1], [0, -1]), ValueError, "targets must have indices inside (3, 4), got found"),
        (_csr([0, 1, 1, 9], [0, 1]), ValueError, "targets must have row offsets from 0 to 2"),
        (_csr([0, 3, 1, 2], [0, 1]), ValueError, "targets must have row offsets from 0 to 2"),
        (_csr([0, 1, 1, 2], [0, 7]), ValueError, "targets must have indices inside (3, 4), got"),
        (
            torch.ones(3, 4).to_sparse(1),
            ValueError,
            "targets must be dense, or sparse COO or CSR of numbers, got torch.sparse_coo",
        ),
    ],
)
def test_bad_targets_are_named(targets: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(f"info_nce: {message}")):
        info_nce(unit(3, 5), unit(4, 5), targets=targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"query_ids": torch.arange(3), "key_ids": torch.arange(4)},
            "query_ids must be None for targets that are spread over keys, got a tensor",
        ),
        (
            {"hard_negative_beta": 1.0},
            "hard_negative_beta and positive_prior must be 0 for targets that are spread over keys, "
            "got 1.0 and 0.0",
        ),
        (
            {"return_metrics": True},
            "return_metrics must be False for targets that are spread over keys, got True",
        ),
        (
            {"symmetric": True, "reduction": "none"},
            "reduction must be 'mean' or 'sum' for N != M, got 'none'",
        ),
    ],
)
def test_what_does_not_go_with_them_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"info_nce: {message}")):
        info_nce(unit(3, 5), unit(4, 5), targets=torch.ones(3, 4), **options)
