"""Markdown of the records: a part for each family, a table for each section."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from benchmarks.records import UNITS, Peak, Record, Results, Timed
from benchmarks.timing import GIGA, pair_ratios

HEAD = """# Results

Command: `make bench`. An answer of every contender is checked before it is timed; a wrong one is
refused, and nothing is written. Then the contenders take turns, all with the same number of threads:
five rounds or more, three where a call takes over 10 s, one where it takes over 20 s; a turn of shorter
calls than 0.1 s repeats them, so that caches are as in a loop. A time is the
median of the rounds, ± half the distance between the quartiles. *× faster than* a peer is the median of
the ratios peer / pyfeat round by round, with the same spread: above 1 pyfeat is faster, below 1 slower.
*Of peak* compares with the peak measured on this machine in the same run: multiply-adds on registers
only, or memory read in order.
"""

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def merge_reports(old: str, families: Mapping[str, str]) -> str:
    """``old`` with the parts of ``families`` put in; the others stay as they are."""
    pattern = r"<!-- family (\w+) -->\n(.*?)<!-- end -->\n"
    parts = dict(re.findall(pattern, old, flags=re.DOTALL))
    parts |= families
    marked = (f"<!-- family {name} -->\n{parts[name]}<!-- end -->\n" for name in sorted(parts))
    return "\n".join([HEAD, *marked])


def family_reports(results: Results, plots: Mapping[str, str]) -> dict[str, str]:
    """Markdown by family.

    Args:
        results: Of one run.
        plots: Path by figure, relative to the report.
    """
    reports = {}
    for family, records in grouped(results.records, lambda record: record.family).items():
        lines = [f"## {records[0].title}", "", *(f"- {item}" for item in results.machine), ""]
        if records[0].about:
            lines += [records[0].about, ""]
        for section, cases in grouped(records, lambda record: record.section).items():
            lines += [f"### {section}", ""]
            if cases[0].text:
                lines += [cases[0].text, ""]
            lines += [*_section_lines(cases, results.peaks, plots), ""]
        reports[family] = "\n".join(lines)
    return reports


def _section_lines(
    cases: Sequence[Record], peaks: Mapping[str, Peak], plots: Mapping[str, str]
) -> Iterator[str]:
    if cases[0].values:
        yield from _values_table(cases)
        return
    point = cases[0].point
    if point:
        figure = figure_name(cases[0])
        if figure in plots:
            yield from (f"![{cases[0].section}]({plots[figure]})", "")
        yield from _sweep_table(cases, point.axis)
    else:
        yield from _race_table(cases, peaks)
    reasons = {
        f"{name} left out at {case.case}: {why}"
        for case in cases
        for name, why in case.skipped.items()
    }
    if reasons:
        yield ""
        yield from (f"- {reason}" for reason in sorted(reasons))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; columns without any content are left out."""
    filled = list(rows)
    kept = [i for i in range(len(header)) if any(row[i] for row in filled)]
    yield "| " + " | ".join(header[i] for i in kept) + " |"
    yield "|" + "---|" * len(kept)
    for row in filled:
        yield "| " + " | ".join(row[i] for i in kept) + " |"


def _race_table(cases: Sequence[Record], peaks: Mapping[str, Peak]) -> Iterator[str]:
    """A row for each contender, ours with their ratios to the peers."""
    peers = _names(cases, lambda timed: not timed.ours)
    per = f"time per {cases[0].per}" if cases[0].per else "time"
    header = ["case", "contender", per, "rate", "of peak"]
    header += [f"× faster than {peer}" for peer in peers]
    rows = []
    for case in cases:
        for i, timed in enumerate(case.contenders):
            name = f"**{timed.name}**" if timed.ours else timed.name
            row = [case.case if i == 0 else "", name, show_time(timed), *_rate(timed, peaks)]
            rivals = {each.name: each for each in case.contenders if timed.ours and not each.ours}
            row += [show_ratio(timed, rivals[peer]) if peer in rivals else "" for peer in peers]
            rows.append(row)
    yield from markdown_table(header, rows)


def _sweep_table(cases: Sequence[Record], axis: str) -> Iterator[str]:
    """A row for each point, a column for each contender."""
    names = _names(cases, lambda timed: True)
    rows = []
    for case in cases:
        times = {timed.name: show_time(timed) for timed in case.contenders}
        label = f"{case.point.value:,.0f}" if case.point else case.case
        rows.append([label, *(times.get(name, "") for name in names)])
    yield from markdown_table([axis, *names], rows)


def _values_table(cases: Sequence[Record]) -> Iterator[str]:
    names = list(dict.fromkeys(name for case in cases for name in case.values))
    header = ["case", *(f"{name}, {cases[0].unit}" for name in names)]
    rows = (
        [case.case, *(f"{case.values[n]:,.0f}" if n in case.values else "" for n in names)]
        for case in cases
    )
    yield from markdown_table(header, rows)


def _rate(timed: Timed, peaks: Mapping[str, Peak]) -> tuple[str, str]:
    """Billions of operations or bytes a second, and as a fraction of the measured peak."""
    if not timed.amount:
        return "", ""
    rate = timed.amount / timed.summary.median / GIGA
    peak = peaks.get(timed.resource)
    name = {"read": "reading"}.get(timed.resource, timed.resource)
    fraction = f"{rate / peak.rate:.0%} of {name}" if peak else f"{name} not measured"
    return f"{three_digits(rate)} {UNITS[timed.resource]}", fraction


def show_ratio(ours: Timed, peer: Timed) -> str:
    ratio = pair_ratios(ours.seconds, peer.seconds)
    if len(ratio.values) == 1:
        return f"{ratio.median:.2f}×"
    return f"{ratio.median:.2f}× ± {ratio.spread:.0%}"


def show_time(timed: Timed) -> str:
    """Median and spread, and the rounds where they are fewer than five."""
    summary, rounds = timed.summary, len(timed.seconds)
    shown = show_seconds(summary.median)
    if rounds == 1:
        return f"{shown} (1 round)"
    few = f" ({rounds} rounds)" if rounds < 5 else ""
    return f"{shown} ± {summary.spread:.0%}{few}"


def show_seconds(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{three_digits(seconds / scale)} {unit}"
    return f"{three_digits(seconds / 1e-6)} µs"


def three_digits(value: float) -> str:
    """1234.5 as 1,234 and 1.2345 as 1.23."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, both in the order in which they come."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def figure_name(record: Record) -> str:
    """The plot on which a record lies; empty if it lies on none."""
    return f"{record.family}_{record.point.figure}" if record.point else ""


def _names(cases: Sequence[Record], wanted: Callable[[Timed], bool]) -> list[str]:
    every = (timed for case in cases for timed in case.contenders)
    return list(dict.fromkeys(timed.name for timed in every if wanted(timed)))
