"""Figures that a method has to show against a baseline, kept seed by seed, and their report."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from benchmarks.report import grouped, markdown_table

HEAD = """# What the methods show

Command: `python -m benchmarks.methods`. Every figure stands beside that of a baseline, which has the same
data, the same seed and, where it is trained, the same number of steps: mean ± standard deviation over the
seeds. *Held* counts the seeds in which the claim is true. Claims that fail are listed like those that hold.
"""


@dataclass(frozen=True)
class Figure:
    """One claim in one seed.

    Attributes:
        claim: What is measured, with its unit.
        subject: What ought to be the better one.
        value: Its figure.
        baseline: What it is compared with.
        baseline_value: Its figure.
        better: Which of two figures is the better one.
        factor: The claim is ``value`` better than ``factor * baseline_value``.
    """

    claim: str
    subject: str
    value: float
    baseline: str
    baseline_value: float
    better: Literal["higher", "lower"] = "higher"
    factor: float = 1.0

    @property
    def held(self) -> bool:
        """Whether the claim is true; never with NaN."""
        bound = self.factor * self.baseline_value
        return self.value > bound if self.better == "higher" else self.value < bound


class Family(Protocol):
    """A module ``prove_<family>``."""

    TITLE: str
    ABOUT: str

    def figures(self, seed: int, *, short: bool) -> Iterator[Figure]:
        """Yield the figures of one seed; ``short`` takes seconds and proves nothing but the path."""


def keep_figures(path: Path, seed: int, figures: Sequence[Figure], machine: Sequence[str]) -> None:
    """Put the figures of one seed into a family's file, in the place of older ones of that seed."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[str(seed)] = {"machine": list(machine), "figures": [asdict(each) for each in figures]}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def report(folder: Path, families: Mapping[str, Family]) -> str:
    """Return the Markdown of all figures kept in a folder."""
    parts = [HEAD]
    for name, family in sorted(families.items()):
        path = folder / f"{name}.json"
        if path.exists():
            parts.append("\n".join(_family_lines(family, json.loads(path.read_text()))))
    return "\n".join(parts)


def _family_lines(family: Family, kept: Mapping[str, dict[str, list[object]]]) -> Iterator[str]:
    yield from (f"## {family.TITLE}", "", family.ABOUT.strip(), "")
    machines = dict.fromkeys(str(line) for run in kept.values() for line in run["machine"])
    yield from (*(f"- {line}" for line in machines), f"- seeds {', '.join(kept)}", "")
    figures = [Figure(**each) for run in kept.values() for each in run["figures"]]  # type: ignore[arg-type]
    rows = []
    for _, seeds in grouped(
        figures, lambda each: (each.claim, each.subject, each.baseline)
    ).items():
        first = seeds[0]
        times = f"{first.factor:g} × " if first.factor != 1 else ""
        rows.append(
            (
                first.claim,
                first.subject,
                _spread([each.value for each in seeds]),
                f"{'above' if first.better == 'higher' else 'below'} {times}{first.baseline}",
                _spread([each.baseline_value for each in seeds]),
                f"{sum(each.held for each in seeds)} of {len(seeds)}",
            )
        )
    yield from markdown_table(["claim", "subject", "figure", "has to be", "baseline", "held"], rows)
    yield ""


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}"
