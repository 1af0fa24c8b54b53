"""Losses of a batch that lies on several processes: what their ranks agree on, and what they return.

The contract of ``group`` and ``reduce``, for every loss that has them. The loss is that of the batches of
all ranks of ``group`` together, a mean being over all their rows that count, and each rank gets its
value, of the same bits. All ranks take part in the forward and in the backward pass. With
L the global loss, features_r the own rows of rank r, and W ranks, backward gives

    reduce        gradient by features_r    by a temperature, scale or bias    of use with
    "ddp_mean"    W dL/dfeatures_r          W times the part of rank r         DistributedDataParallel
    "sum"         dL/dfeatures_r            the part of rank r                 all_reduce of gradients

where parts sum up to the gradient by the parameter that ranks share. So the mean over ranks, which
DistributedDataParallel takes, or else the sum, is the gradient of L by every parameter, of the encoders and
of the loss alike. With reduction "none" a rank gets the losses of its own rows, and ``reduce`` has no part:
the mean over ranks is the gradient of the mean of what they make of their losses, and the sum that of the sum.
"""

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyfeat._checks import check_choice, dtype_name
from pyfeat._ranks import SCHEDULES, Ranks, Schedule, gathered

P = ParamSpec("P")
R = TypeVar("R")
Reduce = Literal["ddp_mean", "sum"]
REDUCES: tuple[Reduce, ...] = ("ddp_mean", "sum")
# Columns and their gradients of all ranks, as float32: a few milliseconds of a network at most.
_GATHERED_BYTES = 32 << 20


def outside_graphs(loss: Callable[P, R]) -> Callable[P, R]:
    """With a group, a break in the graph of torch.compile, which cannot follow what ranks tell each other."""

    @functools.wraps(loss)
    def chosen(*args: P.args, **options: P.kwargs) -> R:
        if options.get("group") is None:
            return loss(*args, **options)
        eager: Callable[P, R] = torch.compiler.disable(loss)  # type: ignore[no-untyped-call]
        return eager(*args, **options)

    return chosen


class _Told(NamedTuple):
    """What one rank tells all."""

    same: dict[str, object]
    num_rows: int = 0
    num_columns: int = 0
    longest_row: float = 0.0
    longest_column: float = 0.0
    scale: float = 0.0
    failure: str | None = None


class Meeting:
    """Ranks tell each other their arguments; what is wrong on one is raised on all.

    Otherwise the others would wait for it until the group times out. A context: checks are made inside
    and end with ``tell``; afterwards ``ranks`` is known.

    Raises:
        TypeError: If ``group`` is no process group.
        ValueError: If this process is not in it, arguments differ that must not, or similarities of rows
            and columns of any ranks could overflow.
        RuntimeError: If another rank has raised.
    """

    ranks: Ranks

    def __init__(
        self, op: str, group: "dist.ProcessGroup", schedule: Schedule | None = None
    ) -> None:
        _check_member(op, group)
        self._op, self._group, self._schedule = op, group, schedule
        self._own = _Told({"loss": op})

    def __enter__(self) -> "Meeting":
        return self

    def tell(self, a: Tensor, b: Tensor, scale: Tensor, **same: object) -> None:
        """Rows and columns of this rank; ``same``: what else must be the same on all ranks.

        Of tensors () the numbers are.
        """
        check_choice(self._op, "schedule", self._schedule, (None, *SCHEDULES))
        check_backend(self._op, self._group, a.device)
        self._own = _Told(
            {
                **self._own.same,
                "D": a.shape[1],
                "dtype": dtype_name(a.dtype),
                "scale": float(scale.detach()),
                "schedule": self._schedule,
                # Whoever needs no gradient is missing when the others communicate in backward.
                "requires_grad of features and scale": tuple(
                    torch.is_grad_enabled() and x.requires_grad for x in (a, b, scale)
                ),
                **{name: _number(value) for name, value in same.items()},
            },
            a.shape[0],
            b.shape[0],
            _longest(a),
            _longest(b),
            float(scale.detach()),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        own = self._own if error is None else self._own._replace(failure=str(error))
        told: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, tuple(own), self._group)
        if error is not None:
            return
        self.ranks = self._agreed([_Told(*values) for values in told])

    def _agreed(self, told: Sequence[_Told]) -> Ranks:
        for rank, other in enumerate(told):
            if other.failure is not None:
                message = (
                    f"{self._op}: arguments must be valid on all ranks, "
                    f"got on rank {rank}: {other.failure}"
                )
                raise RuntimeError(message)
            for name, expected in told[0].same.items():
                if other.same.get(name) != expected:
                    message = (
                        f"{self._op}: {name} must be the same on all ranks, "
                        f"got {expected} on rank 0 and {other.same.get(name)} on rank {rank}"
                    )
                    raise ValueError(message)
        # The kernels would refuse them as well, but on the ranks alone where such rows meet.
        longest = max(x.longest_row for x in told) * max(x.longest_column for x in told)
        limit = 1e300 if told[0].same["dtype"] == "float64" else 1e36
        if not longest * max(1.0, told[0].scale) <= limit:
            message = (
                f"{self._op}: |a| |b| and scale |a| |b| must be at most {limit:g} for the longest rows "
                f"of all ranks, got {longest:g} and scale {told[0].scale:g}"
            )
            raise ValueError(message)
        num_columns = tuple(x.num_columns for x in told)
        num_bytes = 8 * sum(num_columns) * int(str(told[0].same["D"]))
        small: Schedule = "gather" if num_bytes <= _GATHERED_BYTES else "ring"
        return Ranks(
            self._group,
            dist.get_rank(self._group),
            tuple(x.num_rows for x in told),
            num_columns,
            self._schedule or small,
        )


class Alone:
    """A meeting of one process, which need not tell anybody."""

    ranks: Ranks | None = None

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def tell(self, a: Tensor, b: Tensor, scale: Tensor, **same: object) -> None:
        """As of ``Meeting``."""


def meeting(
    op: str, group: "dist.ProcessGroup | None", schedule: Schedule | None = None
) -> Meeting | Alone:
    """What arguments are checked in, so that what is wrong on one rank is raised on all."""
    if group is not None:
        return Meeting(op, group, schedule)
    check_choice(op, "schedule", schedule, (None, *SCHEDULES))
    return Alone()


def _number(value: object) -> object:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _longest(x: Tensor) -> float:
    # In float64: squares of float32 overflow.
    lengths = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.float64)
    return float(lengths.max()) if len(lengths) else 0.0


def given(**arguments: object) -> dict[str, object]:
    """Under their names, whether they are given: the same on all ranks, whatever they are."""
    return {name: "given" if value is not None else None for name, value in arguments.items()}


def _check_member(op: str, group: object) -> None:
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        message = f"{op}: group must contain this process, got a group of others"
        raise ValueError(message)
    if not isinstance(group, dist.ProcessGroup):
        message = f"{op}: group must be a ProcessGroup or None, got {type(group).__name__}"
        raise TypeError(message)


def check_backend(op: str, group: "dist.ProcessGroup", device: torch.device) -> None:
    """Raise unless ``group`` sends tensors of ``device`` from rank to rank."""
    config = dist.get_backend_config(group)  # as in "cpu:gloo,cuda:nccl"
    backends = dict(entry.split(":") for entry in config.split(","))
    backend = backends.get(device.type)
    # Gloo reduces tensors on a GPU, but does not send them to one rank.
    if backend is None or (backend == "gloo" and device.type != "cpu"):
        message = f"{op}: group must send tensors on {device.type} from rank to rank, got {config}"
        raise ValueError(message)


def global_sum(values: Tensor, ranks: Ranks, reduce: Reduce) -> Tensor:
    """Sum of float64 ``values`` over all ranks, of the same bits on all; gradients as in the contract."""
    total: Tensor = _GlobalSum.apply(values, ranks, reduce)  # type: ignore[no-untyped-call]
    return total


def sum_over(values: Tensor, ranks: Ranks | None) -> Tensor:
    """Of constants of all ranks; they may be written over."""
    return _over_ranks(values, ranks, dist.ReduceOp.SUM)


def largest_over(values: Tensor, ranks: Ranks | None) -> Tensor:
    """Of constants of all ranks; they may be written over."""
    return _over_ranks(values, ranks, dist.ReduceOp.MAX)


def _over_ranks(values: Tensor, ranks: Ranks | None, op: Any) -> Tensor:
    if ranks is not None:
        dist.all_reduce(values, op, ranks.group)
    return values


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks, reduce: Reduce) -> Tensor:
        ctx.factor = float(ranks.world_size) if reduce == "ddp_mean" else 1.0
        # An all_reduce might add in another order on every rank.
        return gathered(values, ranks).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.factor * grads[0], None, None
