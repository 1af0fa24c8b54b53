"""Run the races on this machine's GPU, write a report, and print one table last.

``python -m benchmarks.gpu [--seconds S] [--out RESULTS-gpu.md] [--json FILE]``. Races run in a process of
their own: should one crash it, the others go on in another. What has been measured is kept as it comes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.races import Race, all_races
from benchmarks.gpu.report import Document, markdown, terminal
from benchmarks.gpu.setting import Setting, describe_setting, measure_ceilings
from benchmarks.gpu.turns import OUT_OF_TIME, Entrant, Outcome, Row, free_memory, take_turns
from benchmarks.records import Peak

ROOT = Path(__file__).resolve().parents[2]
# A race gets an even share of the time that is left, but at least this much, where there is any.
LEAST_SECONDS = 2.0
# A process that is to stop has this long for the call that it is in.
GRACE_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if one of ours is wrong or fails, 2 without a GPU."""
    options = _options(arguments)
    if options.measure is not None:
        return _measure(options)
    try:
        Setting.of(rehearse=options.rehearse)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        document = _supervise(options, Path(folder) / "measured.jsonl")
    document.stages = options.stages.read_text().splitlines() if options.stages else []
    if options.json:
        document.write(options.json)
    if options.out:
        options.out.write_text(markdown(document), encoding="utf-8")
    print(terminal(document))
    for failure in document.failures:
        print(f"FAILED {failure}")
    return 1 if document.failures else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="for everything")
    parser.add_argument("--out", type=Path, help="write Markdown here")
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--stages", type=Path, help="lines about what came before")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _supervise(options: argparse.Namespace, measured: Path) -> Document:
    """Run the races in processes, one after a crash of the other, until all are done or the time is up."""
    ends = time.monotonic() + options.seconds
    races = all_races(tiny=options.rehearse)
    measured.touch()
    document = Document()
    while len(document.outcomes) < len(races):
        left = ends - time.monotonic()
        done = len(document.outcomes)
        if left < LEAST_SECONDS:
            document.outcomes += [_left_out(race, OUT_OF_TIME) for race in races[done:]]
            break
        command = [sys.executable, "-m", "benchmarks.gpu", "--measure", str(measured)]
        command += ["--first", str(done), "--seconds", str(left)]
        command += ["--rehearse"] if options.rehearse else []
        try:
            status = subprocess.run(
                command, cwd=ROOT, check=False, timeout=left + GRACE_SECONDS
            ).returncode
            ended = f"the process ended with status {status}"
        except subprocess.TimeoutExpired:
            status, ended = 1, "stopped: the time is up"
        _read(measured, document)
        if len(document.outcomes) == len(races):
            break
        if status == 0:
            message = "benchmarks.gpu: a process ended before its races"
            raise RuntimeError(message)
        race = races[len(document.outcomes)]
        crashed = _left_out(race, ended, failed="time" not in ended)
        _append(measured, {"outcome": crashed.to_json()})
        document.outcomes.append(crashed)
    return document


def _measure(options: argparse.Namespace) -> int:
    """The races from ``--first`` on, each appended to the file ``--measure``."""
    ends = time.monotonic() + options.seconds
    setting = Setting.of(rehearse=options.rehearse)
    if setting.rehearsed:
        torch.set_num_threads(1)  # whoever works here beside is not disturbed
    if not options.measure.read_text():
        peaks = measure_ceilings(setting)
        shown = {name: asdict(peak) for name, peak in peaks.items()}
        _append(options.measure, {"machine": describe_setting(setting), "peaks": shown})
    races = all_races(tiny=options.rehearse)
    for place in range(options.first, len(races)):
        race, left = races[place], ends - time.monotonic()
        print(f"[{place + 1}/{len(races)}] {race.section}: {race.case}", flush=True)
        if left < LEAST_SECONDS:
            outcome = _left_out(race, OUT_OF_TIME)
        else:
            share = max(LEAST_SECONDS, 1.5 * left / (len(races) - place))
            outcome = _run(race, setting, min(share, left))
        _append(options.measure, {"outcome": outcome.to_json()})
        free_memory()
    return 0


def _run(race: Race, setting: Setting, seconds: float) -> Outcome:
    """One race; what keeps its inputs from being made is a row."""
    try:
        entrants: list[Entrant] = race.entrants(setting)
    except (RuntimeError, MemoryError) as error:
        if "CUDA error" in str(error):
            raise
        said = " ".join(str(error).split())[:160]
        return _left_out(race, f"its inputs and answer were not made: {said}", failed=True)
    rows = take_turns(entrants, setting.clock, seconds, setting.most_rounds)
    return Outcome(race.section, race.case, rows)


def _left_out(race: Race, why: str, *, failed: bool = False) -> Outcome:
    return Outcome(race.section, race.case, [Row("pyfeat", True, note=why, failed=failed)])


def _append(path: Path, fields: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def _read(path: Path, document: Document) -> None:
    """Everything in the file, in place of what the document has."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    document.outcomes = [Outcome.from_json(x["outcome"]) for x in lines if "outcome" in x]
    for line in lines:
        if "machine" in line:
            document.machine = line["machine"]
            document.peaks = {name: Peak(**peak) for name, peak in line["peaks"].items()}


if __name__ == "__main__":
    sys.exit(main())
