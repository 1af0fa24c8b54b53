"""Losses inside torch.compile: one graph, the same values, gradients and metrics."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss
from tests.support_losses import unit

pytestmark = pytest.mark.slow

WHOLE: dict[str, Callable[..., Any]] = {
    "info_nce": lambda q, k, scale: info_nce(q, k, temperature=1.0 / scale, normalize=True),
    "extra keys": lambda q, k, scale: info_nce(q, k, extra_keys=k.detach()),
    "clip": clip_loss,
    "hard negatives": lambda q, k, scale: nt_xent(
        q, k, hard_negative_beta=0.5, positive_prior=0.01, temperature=1.0 / scale
    ),
    "metrics": lambda q, k, scale: nt_xent(q, k, temperature=1.0 / scale, return_metrics=True),
    "labels": lambda q, k, scale: supcon_loss(torch.cat([q, k]), torch.arange(24) % 5),
    "spread": lambda q, k, scale: info_nce(q, k, targets=torch.eye(12), temperature=1.0 / scale),
}


def values(loss: Callable[..., Any]) -> list[Tensor]:
    torch.manual_seed(3)
    inputs = [unit(12, 8).requires_grad_(), unit(12, 8).requires_grad_()]
    scale = torch.tensor(5.0, requires_grad=True)
    result = loss(*inputs, scale)
    total, metrics = result if isinstance(result, tuple) else (result, ())
    total.backward()
    gradients = [x.grad for x in (*inputs, scale) if x.grad is not None]
    return [total.detach(), *metrics, *gradients]


@pytest.mark.parametrize("case", WHOLE)
def test_a_loss_is_one_graph(case: str) -> None:
    compiled = torch.compile(WHOLE[case], fullgraph=True, backend="aot_eager")
    for ours, eager in zip(values(compiled), values(WHOLE[case]), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)


def test_what_would_give_nan_is_refused_in_a_graph_as_well() -> None:
    def loss(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
        return info_nce(q, k, temperature=temperature)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    queries, keys = unit(6, 4), unit(6, 4)
    assert torch.equal(
        compiled(queries, keys, torch.tensor(0.5)), info_nce(queries, keys, temperature=0.5)
    )
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="info_nce: temperature must be positive and finite"):
            compiled(queries, keys, torch.tensor(temperature))
    queries[4, 1] = math.nan
    with pytest.raises(ValueError, match=r"info_nce: queries must be finite, got .* in row 4"):
        compiled(queries, keys, torch.tensor(0.5))
