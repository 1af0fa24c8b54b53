"""What a benchmark is given: races between contenders, and tables of single values."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks.records import Point, Record, Timed
from benchmarks.report import show_seconds
from benchmarks.timing import Contender, Pace, Turns, pair_ratios


class Shape(NamedTuple):
    """Size of a search."""

    num_queries: int
    num_rows: int
    dim: int
    k: int = 1

    def __str__(self) -> str:
        return f"{self.num_queries:,} × {self.num_rows:,} × {self.dim:,}, k {self.k}"

    @property
    def operations(self) -> float:
        """Of the products that any exact method must execute: 2 Q N D."""
        return 2.0 * self.num_queries * self.num_rows * self.dim


class Harness:
    """The fixture ``harness``: one race, or one row of values, for each benchmark.

    The family is the name of the file: the first line of the module's docstring is its title in the
    report, the rest stands below. A section is a function, headed by its docstring in the same way.

    Args:
        benchmark: pytest-benchmark's fixture, which keeps the record.
        function: The benchmark that runs.
        module: Where it stands.
        pace: How many rounds.
        num_threads: For contenders that take it as an argument.
    """

    def __init__(
        self,
        benchmark: Any,
        function: Callable[..., object],
        module: ModuleType,
        pace: Pace,
        num_threads: int,
    ) -> None:
        self.num_threads = num_threads
        self._benchmark = benchmark
        self._pace = pace
        self._family = Path(str(module.__file__)).stem.removeprefix("bench_")
        self._title, self._about = _docstring(module)
        self._section, self._text = _docstring(function)

    def race(
        self,
        case: object,
        contenders: Sequence[Contender],
        *,
        check: Callable[[str, object], None],
        per: str = "",
        skipped: Mapping[str, str] | None = None,
        point: Point | None = None,
    ) -> None:
        """Time contenders in turn, each of them after ``check`` has passed its answer.

        Args:
            case: Named in the table's first column.
            contenders: Ours first.
            check: Called with name and answer; raises ``timing.WrongAnswerError``.
            per: What a time is for, where ``Contender.count`` is not 1.
            skipped: Why other contenders are left out, by name.
            point: Where the race lies on a plot.
        """
        turns = Turns(contenders, check, self._pace)
        self._benchmark.pedantic(turns.take, rounds=turns.rounds, iterations=1)
        timed = [
            Timed(
                each.name,
                each.ours,
                turns.seconds[each.name],
                each.work.amount / each.count if each.work else 0.0,
                each.work.resource if each.work else "",
            )
            for each in contenders
        ]
        skipped = dict(skipped or {})
        self._keep(case, contenders=timed, per=per, skipped=skipped, point=point)
        print(f"  {case}: {_progress(timed)}", flush=True)

    def values(self, case: object, values: Mapping[str, float], *, unit: str) -> None:
        """Keep one number for each contender, such as its memory."""
        self._benchmark.pedantic(lambda: None, rounds=1, iterations=1)
        self._keep(case, values=dict(values), unit=unit)
        shown = ", ".join(f"{name} {value:,.0f} {unit}" for name, value in values.items())
        print(f"  {case}: {shown}", flush=True)

    def _keep(self, case: object, **fields: Any) -> None:
        record = Record(
            family=self._family,
            title=self._title,
            about=self._about,
            section=self._section,
            text=self._text,
            case=str(case),
            **fields,
        )
        self._benchmark.extra_info.update(record.to_json())


def _docstring(documented: object) -> tuple[str, str]:
    """First line and the rest of a docstring."""
    head, _, rest = (inspect.getdoc(documented) or "").partition("\n")
    return head.rstrip("."), rest.strip()


def _progress(contenders: Sequence[Timed]) -> str:
    ours = next((each for each in contenders if each.ours), contenders[0])
    shown = []
    for each in contenders:
        ratio = pair_ratios(ours.seconds, each.seconds).median
        relative = "" if each is ours else f" ({ratio:.2f}×)"
        shown.append(f"{each.name} {show_seconds(each.summary.median)}{relative}")
    return ", ".join(shown)
