"""What a benchmark leaves behind: plain records that go through JSON, and nothing that computes."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.timing import Summary

# Billions a second, by resource.
UNITS = dict.fromkeys(("float32", "tf32", "bf16"), "GFLOP/s")
UNITS |= {"int8": "GOP/s", "read": "GB/s", "copy": "GB/s"}


@dataclass(frozen=True)
class Peak:
    """The measured peak of one resource."""

    rate: float  # in UNITS
    how: str


@dataclass(frozen=True)
class Timed:
    """One contender's rounds."""

    name: str
    ours: bool
    seconds: list[float]  # one for each round
    amount: float = 0.0  # of work, 0 where none is stated
    resource: str = ""

    @property
    def summary(self) -> Summary:
        return Summary(tuple(self.seconds))


@dataclass(frozen=True)
class Point:
    """Where a race lies on a plot: ``figure`` names the plot, ``axis`` labels it."""

    figure: str
    axis: str
    value: float


@dataclass(frozen=True)
class Record:
    """One case of a table: either the times of contenders or one value for each."""

    family: str
    title: str  # of the family
    about: str  # the family, below its title
    section: str
    text: str
    case: str
    contenders: list[Timed] = field(default_factory=list)
    per: str = ""  # what a time is for, where that is not one call
    skipped: dict[str, str] = field(default_factory=dict)  # reason by contender
    point: Point | None = None
    values: dict[str, float] = field(default_factory=dict)
    unit: str = ""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Record":
        point = fields["point"]
        return cls(
            **{
                **fields,
                "contenders": [Timed(**timed) for timed in fields["contenders"]],
                "point": Point(**point) if point else None,
            }
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Results:
    """All records of a run, with the machine they were taken on."""

    records: list[Record]
    machine: list[str]  # lines of Markdown
    peaks: dict[str, Peak]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """From the JSON that pytest-benchmark wrote."""
        document = json.loads(path.read_text())
        return cls.from_json(document)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Results":
        machine = document["machine_info"]
        return cls(
            [Record.from_json(each["extra_info"]) for each in document["benchmarks"]],
            machine["machine"],
            {name: Peak(**peak) for name, peak in machine["peaks"].items()},
        )
