"""Contenders that take turns, and what becomes of those that cannot."""

import gc
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.timing import Summary, Work

ROUNDS = 3  # at least
OUT_OF_TIME = "left out: the time is up"


class MissingError(RuntimeError):
    """A contender is not here, or not at this size; the message says why."""


@dataclass(frozen=True)
class Entrant:
    """One way to the answer.

    ``prepare`` imports what it needs and does what comes before the clock starts; it returns a call, or
    raises ``MissingError``. ``judge`` takes the answer of the call, raises ``timing.WrongAnswerError`` for one
    that is refused, and returns what is to be known about one that is not exact.
    """

    name: str
    prepare: Callable[[], Callable[[], object]]
    judge: Callable[[object], str]
    ours: bool = False
    work: Work | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one contender, or in ``note`` why nothing was."""

    name: str
    ours: bool
    cold: list[float] = field(default_factory=list)  # seconds, one for each round
    warm: list[float] = field(default_factory=list)
    extra_mb: float | None = None  # device memory beyond the inputs
    amount: float = 0.0
    resource: str = ""
    note: str = ""
    failed: bool = False  # it is here and runs, but wrongly or into an error

    @property
    def seconds(self) -> float:
        """The median with cold caches."""
        return Summary(tuple(self.cold)).median


@dataclass(frozen=True)
class Outcome:
    """The rows of one race."""

    section: str
    case: str
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Outcome":
        """What ``to_json`` made."""
        rows = [Row(**row) for row in fields["rows"]]
        return cls(fields["section"], fields["case"], rows)


@dataclass
class _Ready:
    """A contender whose answer has passed."""

    entrant: Entrant
    call: Callable[[], object]
    note: str
    extra_bytes: int | None
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)

    def row(self) -> Row:
        work, entrant = self.entrant.work, self.entrant
        return Row(
            entrant.name,
            entrant.ours,
            self.cold,
            self.warm,
            None if self.extra_bytes is None else self.extra_bytes / 2**20,
            work.amount if work else 0.0,
            work.resource if work else "",
            self.note,
        )


def take_turns(
    entrants: Sequence[Entrant], clock: Clock, seconds: float, most_rounds: int = 15
) -> list[Row]:
    """A row for each contender, in their order.

    Each is called once, which warms it up, and judged; ours with a wrong answer is an error, and so is not
    timed. Then they take turns, in another direction every other time, a call with cold and one with warm
    caches each, until ``seconds`` have passed: three rounds at least but for those that would take too long.
    """
    ends = time.monotonic() + seconds
    ready: dict[str, _Ready] = {}
    rows: dict[str, Row] = {}
    for entrant in entrants:
        found = _prepared(entrant, clock, out_of_time=time.monotonic() > ends)
        if isinstance(found, Row):
            rows[entrant.name] = found
        else:
            ready[entrant.name] = found
    began = time.monotonic()
    for round_number in range(most_rounds):
        order = list(ready.values())[:: 1 if round_number % 2 == 0 else -1]
        for each in order:
            try:
                each.cold.append(clock.seconds(each.call, cold=True))
                each.warm.append(clock.seconds(each.call, cold=False))
            except torch.OutOfMemoryError:
                rows[each.entrant.name] = _not_timed(each.entrant, "out of memory")
                del ready[each.entrant.name]
                free_memory()
        passed = time.monotonic() - began
        a_round = passed / (round_number + 1)
        late = time.monotonic() + a_round > ends
        if late and (round_number + 1 >= ROUNDS or time.monotonic() + a_round > ends + seconds):
            break
    rows |= {name: each.row() for name, each in ready.items()}
    return [rows[entrant.name] for entrant in entrants]


def import_peer(module: str) -> Any:
    """A module of a peer, or ``MissingError``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"not installed ({error})"
        raise MissingError(message) from None


def free_memory() -> None:
    """Give back what torch keeps for the next call."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepared(entrant: Entrant, clock: Clock, *, out_of_time: bool) -> "_Ready | Row":
    """Warmed up and judged, or a row that says why not.

    An error of CUDA spoils the process: it is not caught.
    """
    if out_of_time:
        return _not_timed(entrant, OUT_OF_TIME)
    try:
        call = entrant.prepare()
        call()
        answer, extra_bytes = clock.peak_bytes(call)
        note = entrant.judge(answer)
    except MissingError as missing:
        return _not_timed(entrant, str(missing))
    except torch.OutOfMemoryError:
        free_memory()
        return _not_timed(entrant, "out of memory")
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        said = " ".join(str(error).split())[:160]
        return Row(entrant.name, entrant.ours, note=f"{type(error).__name__}: {said}", failed=True)
    return _Ready(entrant, call, note, extra_bytes)


def _not_timed(entrant: Entrant, why: str) -> Row:
    return Row(entrant.name, entrant.ours, note=why)
