"""Losses and assignments of the batches of several processes together against those of one."""

import functools
import math
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from pyfeat.losses import DINOCenter, dino_loss, ibot_loss, sinkhorn, sinkhorn_assignment, swav_loss
from pyfeat.losses._group import REDUCES
from tests.support_groups import leave_group
from tests.support_losses import unit

# Rows of each process.
SIZES = {"uneven": (9, 26), "empty": (0, 12), "nothing": (0, 0)}
TIMEOUT_S = 120


class Batch:
    """The rows of one rank, or of all ranks."""

    def __init__(self, size: str, rank: int | None) -> None:
        torch.manual_seed(3)
        sizes = SIZES[size]
        total = sum(sizes)
        part = slice(0, total) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        self.scores = torch.randn(total, 7)[part]
        self.scores[:, 2] -= 3000.0
        self.views = [unit(total, 6)[part].requires_grad_() for _ in range(3)]
        self.queues = [unit(total, 6)[part] for _ in range(2)]
        self.weights = torch.rand(total)[part]
        self.prototypes = unit(7, 6).requires_grad_()


Loss = Callable[..., Tensor]
LOSSES: dict[str, Callable[[Batch], Loss]] = {
    "swav": lambda x: functools.partial(swav_loss, x.views, x.prototypes, queues=x.queues),
    "dino": lambda x: functools.partial(
        dino_loss, x.views, x.views[:1], x.prototypes, x.prototypes, sinkhorn_iterations=3
    ),
    "centred": lambda x: functools.partial(
        dino_loss, x.views, x.views[:2], x.prototypes, x.prototypes, center=torch.arange(7) / 9.0
    ),
    "ibot": lambda x: functools.partial(
        ibot_loss, x.views[0], x.views[1], x.prototypes, x.prototypes, weights=x.weights
    ),
}


def with_gradients(loss: Callable[[Batch], Loss], batch: Batch, **options: Any) -> list[Tensor]:
    """The loss, and its gradients by the first view, 0 where it has none, and by prototypes."""
    value = loss(batch)(**options)
    by_view, by_prototypes = torch.autograd.grad(
        value.sum(), (batch.views[0], batch.prototypes), allow_unused=True, materialize_grads=True
    )
    return [value.detach(), by_view, by_prototypes]


def assignments_of(size: str, rank: int | None, group: Any) -> dict[str, Tensor]:
    batch = Batch(size, rank)
    features, prototypes = batch.views[0].detach(), batch.prototypes.detach()
    return {
        "sinkhorn": sinkhorn(batch.scores, epsilon=1.0, iterations=5, group=group),
        "assignment": sinkhorn_assignment(features, prototypes, group=group).probabilities(),
    }


def centre_of(size: str, rank: int | None, group: Any) -> Tensor:
    batch = Batch(size, rank)
    center = DINOCenter(7, momentum=0.5)
    center.update(batch.views[:2], batch.prototypes, group=group)
    return center.center


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(rank: int, group: Any) -> dict[str, str]:
    """What is raised where rank 1 has other arguments than rank 0."""
    views, w = [unit(4, 6) for _ in range(2)], unit(7, 6)
    other = 1 + rank
    one_wrong: Any = ("mean", "max")
    calls: dict[str, Callable[[], object]] = {
        "iterations": lambda: sinkhorn(views[0], iterations=other, group=group),
        "prototypes": lambda: sinkhorn_assignment(views[0], w[other:], group=group),
        "epsilon": lambda: swav_loss(views, w, epsilon=0.1 * other, group=group),
        "nan": lambda: swav_loss([x * (1.0, math.nan)[rank] for x in views], w, group=group),
        "reduction": lambda: dino_loss(
            views,
            views,
            w,
            w,
            reduction=("mean", "sum")[rank],
            group=group,
        ),
        "choice": lambda: swav_loss(views, w, reduction=one_wrong[rank], group=group),
        "momentum": lambda: DINOCenter(7, 0.1 * other).update(views, w, group=group),
        "reference": lambda: swav_loss(views, w, group=group, backend="reference"),
    }
    return {name: refusal(call) for name, call in calls.items()}


EXPECTED_REFUSALS = {
    "iterations": ("sinkhorn: iterations must be the same on all ranks, got 1 on rank 0 and 2",)
    * 2,
    "prototypes": ("num_prototypes must be the same on all ranks, got 6 on rank 0 and 5",) * 2,
    "epsilon": ("swav_loss: epsilon must be the same on all ranks, got 0.1 on rank 0 and 0.2",) * 2,
    "nan": (
        "RuntimeError: swav_loss: arguments must be valid on all ranks, got on rank 1: swav_loss: "
        "views[0] must be finite",
        "ValueError: swav_loss: views[0] must be finite",
    ),
    "reduction": ("dino_loss: reduction must be the same on all ranks, got mean on rank 0",) * 2,
    "choice": (
        "RuntimeError: swav_loss: arguments must be valid on all ranks, got on rank 1: swav_loss: "
        "reduction must be one of",
        "ValueError: swav_loss: reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    "momentum": ("DINOCenter.update: momentum must be the same on all ranks",) * 2,
    "reference": ("swav_loss: group must be None with backend 'reference', got a group",) * 2,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, folder), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    group = dist.group.WORLD
    found: dict[str, Any] = {"refusals": refusals(rank, group)}
    for size in SIZES:
        found[f"assignments {size}"] = assignments_of(size, rank, group)
        found[f"centre {size}"] = centre_of(size, rank, group)
        for name, loss in LOSSES.items():
            for reduction in ("mean", "sum", "none"):
                for reduce in REDUCES:
                    found[f"{name} {size} {reduction} {reduce}"] = with_gradients(
                        loss, Batch(size, rank), reduction=reduction, reduce=reduce, group=group
                    )
    torch.save(found, folder / f"{rank}.pt")
    leave_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_all_processes_are_assigned_together(ranks: list[dict[str, Any]], size: str) -> None:
    for name, whole in assignments_of(size, None, None).items():
        parts = [rank[f"assignments {size}"][name] for rank in ranks]
        assert [len(part) for part in parts] == list(SIZES[size])
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-7)
    for rank in ranks:
        torch.testing.assert_close(rank[f"centre {size}"], centre_of(size, None, None))


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_one_process(
    ranks: list[dict[str, Any]], name: str, size: str, reduction: str, reduce: str
) -> None:
    expected = with_gradients(LOSSES[name], Batch(size, None), reduction=reduction)
    found = [rank[f"{name} {size} {reduction} {reduce}"] for rank in ranks]
    losses, by_view, by_prototypes = zip(*found, strict=True)
    if reduction == "none":
        torch.testing.assert_close(torch.cat(losses), expected[0], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(*losses)
        torch.testing.assert_close(losses[0], expected[0], rtol=1e-6, atol=0.0)
    # Gradients are averaged over ranks, or added up; without a reduction ranks have own losses.
    factor = 0.5 if reduce == "ddp_mean" and reduction != "none" else 1.0
    for parts, true in (
        (factor * torch.cat(by_view), expected[1]),
        (factor * (by_prototypes[0] + by_prototypes[1]), expected[2]),
    ):
        largest = float(true.abs().max()) if len(true) else 0.0
        torch.testing.assert_close(parts, true, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPECTED_REFUSALS)
def test_what_is_wrong_on_one_rank_is_raised_on_all(ranks: list[dict[str, Any]], case: str) -> None:
    for rank, expected in zip(ranks, EXPECTED_REFUSALS[case], strict=True):
        assert expected in rank["refusals"][case]
