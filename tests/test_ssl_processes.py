"""Losses, gradients, banks and queues of two processes are those of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat.ssl.parts import BankClusters
from tests.support_groups import leave_group
from tests.test_ssl_clusters import unit
from tests.test_ssl_season_contrast import Fixed, make

ROWS = 8


def bank_step(own: slice, group: Any) -> tuple[Any, ...]:
    """An epoch that fills the banks, and a step of the next; the gradient is that by the views."""
    torch.manual_seed(0)
    clusters = BankClusters(ROWS, (3, 2), 4)
    views, later = unit(2, ROWS, 4), unit(2, ROWS, 4)
    clusters(list(views[:, own]), torch.arange(ROWS)[own], group)
    clusters.after_step(group)
    clusters.start_epoch(1)
    clusters.assigned[0, ROWS - 1] = -1  # processes then count differently
    part = later[:, own].clone().requires_grad_()
    loss = clusters(list(part), torch.arange(ROWS)[own], group)
    loss.backward()
    return loss.detach(), part.grad, clusters.state_dict()


def season_steps(own: slice, group: Any) -> tuple[Any, ...]:
    """Three steps, from the second on with queues; the gradient is the last by a head."""
    torch.manual_seed(0)
    objective = make(queue_size=12)
    assert objective.group is group
    losses = []
    for _ in range(3):
        query, k0, k1, k2 = torch.rand(4, ROWS, 3, 16, 16)[:, own]
        objective.crop, objective.augment = Fixed(query, k1), Fixed(k0, k2)
        objective.zero_grad()
        images = torch.zeros(len(query), 3, 3, 16, 16)
        loss = objective.training_loss({"images": images})["loss"]
        loss.backward()
        objective.after_step()
        losses.append(loss.detach())
    gradient = torch.cat([head[0].weight.grad for head in objective.heads])
    return torch.stack(losses), gradient, objective.queues.state_dict()


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = slice(ROWS // 2 * rank, ROWS // 2 * (rank + 1))
    found = [bank_step(own, dist.group.WORLD), season_steps(own, dist.group.WORLD)]
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


def _close(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=1e-4)


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _process, (str(tmp_path),), nprocs=2
    )
    (bank, seasons), (other_bank, other_seasons) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    loss, grad, state = bank_step(slice(0, ROWS), None)
    torch.testing.assert_close((bank[0] + other_bank[0]) / 2, loss)
    # Gradients are those of the loss by their mean over processes.
    torch.testing.assert_close(torch.cat([bank[1], other_bank[1]], dim=1) / 2, grad)
    for each in (bank, other_bank):
        _close(each[2], state)

    losses, grad, state = season_steps(slice(0, ROWS), None)
    for each in (seasons, other_seasons):
        torch.testing.assert_close(each[0], losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((seasons[1] + other_seasons[1]) / 2, grad, atol=1e-5, rtol=1e-3)
    for each in (seasons, other_seasons):
        _close(each[2], state)
