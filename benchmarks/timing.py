"""The clock of every benchmark: contenders take turns, and only checked answers are timed.

Rivals run one after the other within each round, and ratios are taken round by round: other work on
the machine then slows both sides of a ratio alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GIGA = 1e9


class WrongAnswerError(RuntimeError):
    """A contender's answer is wrong, and what is wrong is not worth timing."""


@dataclass(frozen=True)
class Work:
    """What any way to the answer must do: operations or bytes, and the resource that bounds them.

    ``resource`` is one of ``records.UNITS``: float32, bf16, int8 or read.
    """

    amount: float
    resource: str


@dataclass(frozen=True)
class Contender:
    """One way to the answer. ``run`` returns it, to be checked before the clock starts."""

    name: str
    run: Callable[[], object]
    ours: bool = False
    work: Work | None = None
    count: int = 1  # times that one run does what is counted, such as picks


@dataclass(frozen=True)
class Summary:
    """Median and spread of a few values."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return lower, upper

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        lower, upper = self.quartiles
        return (upper - lower) / 2 / self.median


def pair_ratios(ours: Sequence[float], peer: Sequence[float]) -> Summary:
    """Ratios peer / ours, one for each round in which both ran; above 1 ours is faster.

    A contender with fewer rounds ran in the first ones.
    """
    return Summary(tuple(b / a for a, b in zip(ours, peer, strict=False)))


@dataclass(frozen=True)
class Pace:
    """How often contenders run."""

    rounds: int = 5  # at least, for calls of up to ``slow`` seconds
    most_rounds: int = 25
    seconds: float = 3.0  # short calls run in more rounds, until these have passed
    slow: float = 10.0
    slow_rounds: int = 3
    very_slow: float = 20.0  # above, one round
    # Between two calls: the threads of one library spin for some milliseconds after their work, and
    # would take the processor from the next.
    pause: float = 0.02
    # A turn of shorter calls repeats them until so many seconds have passed: what a loop sees, with
    # inputs that were just written, not how long a processor takes to wake up.
    turn: float = 0.1
    most_repeats: int = 100

    def repeats_for(self, seconds: float) -> int:
        """Calls of one turn of a contender that takes ``seconds``."""
        return min(self.most_repeats, max(1, math.ceil(self.turn / max(seconds, 1e-9))))

    def rounds_for(self, seconds: float, turn: float) -> int:
        """Rounds of a contender that takes ``seconds``, where all fast ones take ``turn``."""
        if seconds > self.very_slow:
            return 1
        if seconds > self.slow:
            return self.slow_rounds
        return min(self.most_rounds, max(self.rounds, math.ceil(self.seconds / max(turn, 1e-9))))


QUICK_PACE = Pace(rounds=2, most_rounds=2, pause=0.0, most_repeats=1)


class Turns:
    """Contenders, warmed up and checked, that take turns.

    Args:
        contenders: With different names; the first call of each warms it up, the second says how often
            a turn calls it.
        check: Called with the name and the answer of each; raises ``WrongAnswerError``.
        pace: How many rounds.

    Raises:
        WrongAnswerError: If ``check`` does.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        check: Callable[[str, object], None],
        pace: Pace,
    ) -> None:
        self.contenders = tuple(contenders)
        self.seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
        if len(self.seconds) != len(self.contenders):
            message = f"Turns: names must differ, got {[each.name for each in contenders]}"
            raise ValueError(message)
        self._pause = pace.pause
        self._round = 0
        first: dict[str, float] = {}
        self._repeats = dict.fromkeys(self.seconds, 1)
        for each in contenders:
            first[each.name], answer = self._timed(each)
            check(each.name, answer)
        for each in contenders:
            if pace.most_repeats > 1 and first[each.name] <= pace.very_slow:
                first[each.name], _ = self._timed(each)  # warm
                self._repeats[each.name] = pace.repeats_for(first[each.name])
                first[each.name] *= self._repeats[each.name]
        turn = sum(seconds for seconds in first.values() if seconds <= pace.slow)
        self._rounds = {name: pace.rounds_for(seconds, turn) for name, seconds in first.items()}

    @property
    def rounds(self) -> int:
        return max(self._rounds.values())

    def take(self) -> None:
        """One round, backwards every other time: no contender always follows the same one."""
        for each in self.contenders[:: 1 if self._round % 2 == 0 else -1]:
            if self._round < self._rounds[each.name]:
                self.seconds[each.name].append(self._timed(each)[0] / each.count)
        self._round += 1

    def _timed(self, contender: Contender) -> tuple[float, object]:
        time.sleep(self._pause)
        repeats, answer = self._repeats[contender.name], None
        began = time.perf_counter()
        for _ in range(repeats):
            answer = contender.run()
        return (time.perf_counter() - began) / repeats, answer
