"""What every rank of a few processes runs; the tests compare its results with those of one process."""

import functools
import itertools
import time
import traceback
import unittest.mock
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfeat._contrast import Pairs, PairSums
from pyfeat._distributed import distributed_pair_softplus, distributed_pair_sums
from pyfeat._ranks import SCHEDULES, Ranks, Schedule
from pyfeat.losses import _group
from pyfeat.losses._group import REDUCES, Meeting, Reduce, check_backend, global_sum
from tests.support_contrast import CASES as TERMS
from tests.support_contrast import cut
from tests.support_distributed_losses import LOSS_CASES
from tests.support_groups import leave_group

DIM = 24
LARGE_BLOCK = 150  # rows and columns
SCALE = 1.3
TIMEOUT_S = 120
# Rows and columns of each rank, for so many ranks.
SIZES: dict[int, dict[str, tuple[Sequence[int], Sequence[int]]]] = {
    2: {"even": ((33, 33), (33, 33)), "uneven": ((7, 40), (65, 3)), "empty": ((0, 9), (12, 0))},
    4: {
        "even": ((6, 6, 6, 6), (6, 6, 6, 6)),
        "uneven": ((5, 0, 17, 33), (9, 31, 0, 2)),
        "empty": ((0, 0, 1, 0), (0, 1, 0, 0)),
    },
}


class Problem(NamedTuple):
    """Of one rank, or of all their rows and columns together."""

    a: Tensor
    b: Tensor
    scale: Tensor
    pairs: Pairs
    weights: list[Tensor]  # of row_lse, column_lse, row_positives, column_positives

    def weighted(self, sums: PairSums) -> Tensor:
        """Sum of all sums that are finite, each with a weight of its own."""
        terms = zip(sums[:4], self.weights, strict=True)
        return torch.stack([(x.where(x.isfinite(), 0.0) * w).sum() for x, w in terms]).sum()


def whole_problem(
    sizes: tuple[Sequence[int], Sequence[int]],
    terms: str,
    columns: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    generator = torch.Generator().manual_seed(7)
    num_rows, num_columns = sum(sizes[0]), sum(sizes[1])

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    counts = (num_rows, num_columns, num_rows, num_columns)
    weights = [draw(count, dtype=torch.float64) for count in counts]
    pairs = cut(TERMS[terms], num_rows, num_columns)
    if pairs.column_bias is not None:  # that of the tests of one process is drawn at import
        pairs = pairs._replace(column_bias=draw(num_columns))
    if not columns:
        weights[1] = weights[3] = weights[1].new_zeros(0)
    return Problem(draw(num_rows, DIM), draw(num_columns, DIM), torch.tensor(SCALE), pairs, weights)


def part_of(problem: Problem, sizes: tuple[Sequence[int], Sequence[int]], rank: int) -> Problem:
    """The rows and columns of one rank."""
    rows, columns = (slice(sum(x[:rank]), sum(x[: rank + 1])) for x in sizes)
    named = problem.pairs._asdict()
    own: dict[str, Any] = {
        name: value[columns if name.startswith("column_") else rows]
        for name, value in named.items()
        if isinstance(value, Tensor)
    }
    weights = [w[part] for w, part in zip(problem.weights, (rows, columns) * 2, strict=True)]
    return Problem(
        problem.a[rows],
        problem.b[columns],
        problem.scale,
        problem.pairs._replace(**own),
        weights,
    )


def with_gradients(
    problem: Problem, sums_of: Callable[[Tensor, Tensor, Tensor, Pairs], PairSums]
) -> list[Tensor]:
    """The sums, and the gradients of the weighted sum by features and scale."""
    leaves = [x.clone().requires_grad_() for x in problem[:3]]
    sums = sums_of(leaves[0], leaves[1], leaves[2], problem.pairs)
    gradients = torch.autograd.grad(problem.weighted(sums), leaves)
    return [x.detach() for x in (*sums, *gradients)]


def sums_on_ranks(
    group: dist.ProcessGroup, case: tuple[str, str, bool, Schedule, torch.dtype]
) -> list[Tensor]:
    size, terms, columns, schedule, dtype = case
    sizes = SIZES[dist.get_world_size(group)][size]
    rank = dist.get_rank(group)
    ranks = Ranks(group, rank, tuple(sizes[0]), tuple(sizes[1]), schedule)
    problem = part_of(whole_problem(sizes, terms, columns, dtype), sizes, rank)
    return with_gradients(
        problem,
        functools.partial(distributed_pair_sums, columns=columns, ranks=ranks, largest=True),
    )


def with_softplus_gradients(
    problem: Problem,
    softplus_of: Callable[[Tensor, Tensor, Tensor, Tensor, Pairs], Tensor],
    *,
    uniform: bool,
) -> list[Tensor]:
    """The sums, and the gradients of one sum of them by features, scale and bias."""
    leaves = [x.clone().requires_grad_() for x in (*problem[:3], torch.tensor(-1.5))]
    sums = softplus_of(*leaves, problem.pairs)  # type: ignore[call-arg, arg-type]
    total = (sums * (0.37 if uniform else problem.weights[0])).sum()
    return [x.detach() for x in (sums, *torch.autograd.grad(total, leaves))]


def softplus_on_ranks(
    group: dist.ProcessGroup, case: tuple[str, str, bool, Schedule, torch.dtype]
) -> list[Tensor]:
    size, terms, uniform, schedule, dtype = case
    sizes = SIZES[dist.get_world_size(group)][size]
    rank = dist.get_rank(group)
    ranks = Ranks(group, rank, tuple(sizes[0]), tuple(sizes[1]), schedule)
    problem = part_of(whole_problem(sizes, terms, dtype=dtype), sizes, rank)
    softplus_of = functools.partial(distributed_pair_softplus, ranks=ranks)
    return with_softplus_gradients(problem, softplus_of, uniform=uniform)


def largest_tensor(group: dist.ProcessGroup, schedule: Schedule) -> int:
    """Elements of the largest tensor that any operation makes, sums and gradients taken together."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    sizes = ((LARGE_BLOCK,) * world_size,) * 2
    ranks = Ranks(group, rank, *sizes, schedule)
    problem = part_of(whole_problem(sizes, "kept"), sizes, rank)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        with_gradients(problem, functools.partial(distributed_pair_sums, columns=True, ranks=ranks))
    return int(largest.count)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, list | tuple) else (made,):
            # Of views, what is beneath.
            if isinstance(x, Tensor):
                self.count = max(self.count, x.untyped_storage().nbytes() // x.element_size())
        return made


def schedules(group: dist.ProcessGroup) -> list[str]:
    """What is chosen for few bytes, for one byte more than is gathered, and on request."""
    num_bytes = 8 * 3 * 4 * dist.get_world_size(group)
    with unittest.mock.patch.object(_group, "_GATHERED_BYTES", num_bytes):
        few = meet(group, schedule=None).schedule
    with unittest.mock.patch.object(_group, "_GATHERED_BYTES", num_bytes - 1):
        return [few, meet(group, schedule=None).schedule, meet(group, schedule="gather").schedule]


def meet(
    group: dist.ProcessGroup,
    op: str = "clip_loss",
    dim: int = 4,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0,
    value: float = 1.0,
    *,
    schedule: Schedule | None = "ring",
    requires_grad: bool = False,
    failure: str = "",
    ids: str = "none",
) -> Ranks:
    features = torch.full((3, dim), value, dtype=dtype, requires_grad=requires_grad)
    meeting = Meeting(op, group, schedule)
    with meeting:
        if failure:
            raise ValueError(failure)
        meeting.tell(features, features, torch.tensor(scale), ids=ids)
    return meeting.ranks


# What rank 1 has other than rank 0, and what both are told.
DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "D": ({"dim": 6}, "D must be the same on all ranks, got 4 on rank 0 and 6 on rank 1"),
    "dtype": (
        {"dtype": torch.float16},
        "dtype must be the same on all ranks, got float32 on rank 0 and float16 on rank 1",
    ),
    "scale": ({"scale": 2.5}, "scale must be the same on all ranks, got 2.0 on rank 0 and 2.5"),
    "loss": (
        {"op": "info_nce"},
        "loss must be the same on all ranks, got clip_loss on rank 0 and info_nce on rank 1",
    ),
    "schedule": ({"schedule": "gather"}, "schedule must be the same on all ranks, got ring on"),
    "gradients": (
        {"requires_grad": True},
        "requires_grad of features and scale must be the same on all ranks, "
        "got (False, False, False) on rank 0 and (True, True, False) on rank 1",
    ),
    "length": (
        {"value": 5e17},
        "|a| |b| and scale |a| |b| must be at most 1e+36 for the longest rows of all ranks, "
        "got 1e+36 and scale 2",
    ),
    "options": (
        {"ids": "given"},
        "ids must be the same on all ranks, got none on rank 0 and given",
    ),
}


def refusal(call: Callable[[], object]) -> str:
    """What it raises, as in ``ValueError: ...``."""
    try:
        return f"no error, but {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def disagreement(group: dist.ProcessGroup, name: str) -> str:
    other = DISAGREEMENTS[name][0] if dist.get_rank(group) == 1 else {}
    return refusal(lambda: meet(group, **other))


def refused(group: dist.ProcessGroup) -> str:
    return refusal(lambda: meet(group, failure="bad" if dist.get_rank(group) == 1 else ""))


def subgroups(group: dist.ProcessGroup) -> list[Any]:
    """Groups of every second rank that work at the same time."""
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    members = [list(range(world_size))[i::2] for i in (0, 1)]
    groups = [dist.new_group(ranks) for ranks in members]
    outside = refusal(lambda: meet(groups[1 - rank % 2]))
    own = groups[rank % 2]
    sizes = ((11,) * len(members[0]),) * 2
    problem = part_of(whole_problem(sizes, "positives"), sizes, dist.get_rank(own))
    ranks = Ranks(own, dist.get_rank(own), *sizes)
    sums = distributed_pair_sums(*problem[:4], columns=True, ranks=ranks)
    return [outside, list(sums)]


def backends(group: dist.ProcessGroup) -> list[str]:
    devices = [torch.device("cpu"), torch.device("cuda", 0)]
    check = functools.partial(check_backend, "clip_loss", group)
    refusals = [refusal(functools.partial(check, device)) for device in devices]
    with unittest.mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"):
        return refusals + [refusal(functools.partial(check, device)) for device in devices]


def total(group: dist.ProcessGroup, reduce: Reduce) -> list[Tensor]:
    """A sum whose value depends on the order in which it is taken."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    ranks = Ranks(group, rank, (1,) * world_size, (1,) * world_size)
    values = torch.tensor([(1e16, 1.0, -1e16, 1.0)[rank], rank + 0.3], dtype=torch.float64)
    values.requires_grad_()
    summed = global_sum(values, ranks, reduce)
    (grad,) = torch.autograd.grad(summed, values, torch.tensor([2.0, 3.0], dtype=torch.float64))
    return [summed.detach(), grad]


# Sizes, kinds of pairs, whether of columns too, schedules and dtypes that sums are taken of.
SUMS: list[tuple[str, str, bool, Schedule, torch.dtype]] = [
    *itertools.product(("uneven",), TERMS, (True,), SCHEDULES, (torch.float32,)),
    *itertools.product(("even", "empty"), ("kept",), (True,), SCHEDULES, (torch.float64,)),
    *itertools.product(("uneven",), ("bias", "kept"), (False,), SCHEDULES, (torch.float32,)),
    *itertools.product(("uneven",), ("kept",), (True,), SCHEDULES, (torch.float16, torch.bfloat16)),
]
# The same for softplus: whether all rows have the same weight, in place of columns.
SOFTPLUS: list[tuple[str, str, bool, Schedule, torch.dtype]] = [
    *itertools.product(("uneven", "empty"), ("kept",), (False, True), SCHEDULES, (torch.float32,)),
    *itertools.product(
        ("uneven",), ("positives",), (False, True), SCHEDULES[:1], (torch.bfloat16,)
    ),
]
# Every case runs on all ranks in turn.
CASES: dict[str, Callable[[dist.ProcessGroup], Any]] = {
    "refused": refused,
    "subgroups": subgroups,
    "backends": backends,
    "schedules": schedules,
    **{f"disagreement {x}": functools.partial(disagreement, name=x) for x in DISAGREEMENTS},
    **{f"total {x}": functools.partial(total, reduce=x) for x in REDUCES},
    **{f"largest {x}": functools.partial(largest_tensor, schedule=x) for x in SCHEDULES},
    **{f"sums {x}": functools.partial(sums_on_ranks, case=x) for x in SUMS},
    **LOSS_CASES,
    **{f"softplus {x}": functools.partial(softplus_on_ranks, case=x) for x in SOFTPLUS},
}


def run_on_ranks(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Of every rank, the results of all cases.

    Raises:
        RuntimeError: If a case raises, or a process does not end in time.
    """
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(rank, world_size, folder), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        if any(codes):
            message = f"processes must end in time and without error, got exit codes {codes}"
            raise RuntimeError(message)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    failures = [f"rank {i}: {x['failure']}" for i, x in enumerate(results) if "failure" in x]
    if failures:
        raise RuntimeError("\n".join(failures))
    return results


def _work(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # As in the tests of one process.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=30),
    )
    group = dist.group.WORLD
    if group is None:
        message = "torch.distributed must be initialised"
        raise RuntimeError(message)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = case(group)
        except Exception:
            # The others may be in the middle of it, and what follows would not be in step.
            results = {"failure": f"{name}: {traceback.format_exc()}"}
            break
    torch.save(results, folder / f"{rank}.pt")
    leave_group()
