"""The table of all races, for the terminal and as Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.targets import target_lines
from benchmarks.gpu.turns import Outcome, Row
from benchmarks.records import UNITS, Peak
from benchmarks.report import grouped, markdown_table, show_seconds, three_digits
from benchmarks.timing import GIGA, Summary, pair_ratios

HEAD = """# Results on a GPU

Command: `benchmarks/gpu.sh`. An answer of every contender is checked before it is timed: ours must be those
of float64, of others it is said how far off they are. Then they take turns, and a time is the median of the
rounds. *× cuda* and *× triton* are the medians of the ratios peer / pyfeat round by round, with cold caches:
above 1 pyfeat is faster, below 1 slower. A rate counts the products that any exact method must make, or the
bytes of inputs, outputs and gradients, each once; *of peak* compares it with what was measured on this GPU
in the same run. *memory* is what a call takes on the device beyond its inputs, results included.
"""

_HEADER = ("case", "contender", "cold", "warm", "rate", "of peak")


@dataclass
class Document:
    """A run: what was measured, and on what."""

    machine: list[str] = field(default_factory=list)  # lines of Markdown
    peaks: dict[str, Peak] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)  # what gpu.sh did before, one line each
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Of ours: answers that are wrong, and errors."""
        return [
            f"{outcome.section}, {outcome.case}: {row.name}: {row.note}"
            for outcome in self.outcomes
            for row in outcome.rows
            if row.ours and row.failed
        ]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Document":
        """What ``write`` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            fields["machine"],
            {name: Peak(**peak) for name, peak in fields["peaks"].items()},
            fields["stages"],
            [Outcome.from_json(each) for each in fields["outcomes"]],
        )


def markdown(document: Document) -> str:
    """The whole report."""
    lines = [HEAD, *(f"- {item}" for item in document.machine)]
    shown = (
        f"{name} {three_digits(peak.rate)} {UNITS[name]} ({peak.how})"
        for name, peak in document.peaks.items()
    )
    lines += [f"- measured peaks: {', '.join(shown) or 'none'}", ""]
    if document.stages:
        lines += ["## Before the races", "", *(f"- {stage}" for stage in document.stages), ""]
    targets = target_lines(document.outcomes, document.peaks)
    lines += ["## Targets, on an H200", "", *(f"- {line}" for line in targets), ""]
    sections = grouped(document.outcomes, lambda outcome: outcome.section)
    for section, outcomes in sections.items():
        lines += [f"## {section}", "", *_table(outcomes, document.peaks), ""]
    return "\n".join(lines).rstrip() + "\n"


def terminal(document: Document) -> str:
    """Whether targets are met, and one table of everything, in columns."""
    rows = [["case", "contender", "cold", "warm", "of peak", "x ours", "memory", "note"]]
    for outcome in document.outcomes:
        rows.append([f"{outcome.section}: {outcome.case}", *[""] * 7])
        for row in outcome.rows:
            cells = _cells(row, document.peaks)
            ratios = " ".join(f"{r:.2f}" for r in _ratios(row, outcome).values())
            rows.append(["", row.name, *cells[:2], cells[3], ratios, _memory(row), row.note])
    # What names a case may reach over the columns beside it.
    widths = [max(len(row[i]) for row in rows if row[1]) for i in range(len(rows[0]))]
    widths[0] = 2
    targets = list(target_lines(document.outcomes, document.peaks))
    table = [
        row[0] if not row[1] else "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True))
        for row in [["", *rows[0][1:]], *rows[1:]]
    ]
    return "\n".join(line.rstrip() for line in [*targets, *table])


def _table(outcomes: Sequence[Outcome], peaks: Mapping[str, Peak]) -> Iterator[str]:
    ours = list(dict.fromkeys(r.name for o in outcomes for r in o.rows if r.ours))
    header = [*_HEADER, *(f"× {name.removeprefix('pyfeat, ')}" for name in ours), "memory", "note"]
    rows = []
    for outcome in outcomes:
        for i, row in enumerate(outcome.rows):
            name = f"**{row.name}**" if row.ours else row.name
            ratios = _ratios(row, outcome)
            shown = [f"{ratios[each]:.2f}×" if each in ratios else "" for each in ours]
            case = outcome.case if i == 0 else ""
            rows.append([case, name, *_cells(row, peaks), *shown, _memory(row), row.note])
    yield from markdown_table(header, rows)


def _cells(row: Row, peaks: Mapping[str, Peak]) -> list[str]:
    """Both times, the rate and the share of the peak."""
    if not row.cold:
        return ["", "", "", ""]
    times = [show_seconds(Summary(tuple(x)).median) for x in (row.cold, row.warm)]
    if not row.amount:
        return [*times, "", ""]
    rate = row.amount / row.seconds / GIGA
    peak = peaks.get(row.resource)
    share = f"{rate / peak.rate:.0%} of {row.resource}" if peak else "not measured"
    return [*times, f"{three_digits(rate)} {UNITS[row.resource]}", share]


def _ratios(row: Row, outcome: Outcome) -> dict[str, float]:
    """By the name of ours, how many times as long a peer takes."""
    if row.ours or not row.cold:
        return {}
    ours = [each for each in outcome.rows if each.ours and each.cold]
    return {each.name: pair_ratios(each.cold, row.cold).median for each in ours}


def _memory(row: Row) -> str:
    return "" if row.extra_mb is None else f"{row.extra_mb:,.0f} MB"
