"""Assignments of the batches of several processes together against those of one."""

import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from pyfeat.losses import DINOCenter, dino_loss, sinkhorn, sinkhorn_assignment, swav_loss
from tests.test_sinkhorn import unit

# Rows of each process.
SIZES = {"uneven": (9, 26), "empty": (0, 12)}
TIMEOUT_S = 120


def results_of(case: str, rank: int | None, group: "dist.ProcessGroup | None") -> dict[str, Tensor]:
    """Of the rows of one rank, or of all ranks."""
    torch.manual_seed(3)
    sizes = SIZES[case]
    total = sum(sizes)
    part = slice(0, total) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    scores = torch.randn(total, 7)
    scores[:, 2] -= 3000.0  # a column whose sums can only be taken in logarithms
    views, prototypes = [unit(total, 6)[part] for _ in range(3)], unit(7, 6)
    center = DINOCenter(7, momentum=0.5)
    center.update(views[:2], prototypes, group=group)
    return {
        "sinkhorn": sinkhorn(scores[part], epsilon=1.0, iterations=5, group=group),
        "assignment": sinkhorn_assignment(views[0], prototypes, group=group).probabilities(),
        "swav": swav_loss(views, prototypes, reduction="none", group=group),
        "dino": dino_loss(
            views,
            views[:1],
            prototypes,
            prototypes,
            sinkhorn_iterations=3,
            reduction="none",
            group=group,
        ),
        "center": center.center,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
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
    torch.save({case: results_of(case, rank, group) for case in SIZES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("case", SIZES)
def test_all_processes_are_assigned_together(
    ranks: list[dict[str, dict[str, Tensor]]], case: str
) -> None:
    expected = results_of(case, None, None)
    for name, whole in expected.items():
        parts = [rank[case][name] for rank in ranks]
        if name == "center":
            for part in parts:
                torch.testing.assert_close(part, whole)
        else:
            assert [len(part) for part in parts] == list(SIZES[case])
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-7)
    alone = results_of(case, 1, None)
    assert (alone["sinkhorn"] - ranks[1][case]["sinkhorn"]).abs().max() > 1e-3 or case == "empty"
