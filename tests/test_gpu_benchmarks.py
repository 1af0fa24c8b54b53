"""The benchmarks on a GPU, as far as they can be tried without one."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.gpu.__main__ as program
from benchmarks.answers import GradientCheck
from benchmarks.eager_losses import Batch, eager_clip
from benchmarks.gpu import report
from benchmarks.gpu.clock import HostClock
from benchmarks.gpu.losses import chunked_clip
from benchmarks.gpu.races import Race, all_races
from benchmarks.gpu.report import Document
from benchmarks.gpu.search import PEERS, search_entrants
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.targets import target_lines
from benchmarks.gpu.turns import Entrant, MissingError, Outcome, Row, take_turns
from benchmarks.harness import Shape
from benchmarks.records import Peak
from benchmarks.timing import WrongAnswerError

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
CPU = torch.device("cpu")


class StepClock(HostClock):
    """Every cold call takes 3 s, every warm one 1 s."""

    def seconds(self, run: Callable[[], object], *, cold: bool) -> float:
        run()
        return 3.0 if cold else 1.0


def _entrant(name: str, run: Callable[[], object], **fields: Any) -> Entrant:
    return Entrant(name, lambda: run, lambda answer: "", **fields)


# Turns


def test_contenders_take_turns_with_cold_and_with_warm_caches() -> None:
    calls: list[str] = []
    entrants = [_entrant(name, lambda name=name: calls.append(name)) for name in "ab"]  # type: ignore[misc]
    rows = take_turns(entrants, StepClock(), 60.0, most_rounds=2)
    assert calls == ["a", "a", "b", "b", *"aabb", *"bbaa"]
    for row in rows:
        assert (row.cold, row.warm) == ([3.0, 3.0], [1.0, 1.0])
        assert not row.failed


def test_what_is_missing_wrong_or_too_large_is_a_row_that_says_so() -> None:
    def missing() -> Callable[[], object]:
        message = "not installed"
        raise MissingError(message)

    def too_large() -> object:
        raise torch.OutOfMemoryError

    def wrong(answer: object) -> str:
        message = "off by much"
        raise WrongAnswerError(message)

    entrants = [
        Entrant("missing", missing, lambda answer: ""),
        _entrant("large", too_large),
        Entrant("wrong", lambda: lambda: 1, wrong, ours=True),
        Entrant("inexact", lambda: lambda: 1, lambda answer: "wrong for 1%"),
    ]
    rows = {row.name: row for row in take_turns(entrants, StepClock(), 60.0, most_rounds=1)}
    assert {name: row.note for name, row in rows.items()} == {
        "missing": "not installed",
        "large": "out of memory",
        "wrong": "WrongAnswerError: off by much",
        "inexact": "wrong for 1%",
    }
    assert [name for name, row in rows.items() if row.failed] == ["wrong"]
    assert [name for name, row in rows.items() if row.cold] == ["inexact"]


def test_memory_that_runs_out_later_is_a_row_too() -> None:
    left = [1, 1, 1]  # the warm-up, the judged call, the first round's cold one

    def run() -> object:
        if not left:
            raise torch.OutOfMemoryError
        return left.pop()

    (row, other) = take_turns(
        [_entrant("large", run), _entrant("small", int)], StepClock(), 60.0, most_rounds=2
    )
    assert (row.note, row.cold) == ("out of memory", [])
    assert other.cold == [3.0, 3.0]


def test_an_error_of_cuda_ends_the_process() -> None:
    def run() -> object:
        message = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="illegal memory access"):
        take_turns([_entrant("spoilt", run)], StepClock(), 60.0)


def test_contenders_are_left_out_when_the_time_is_up() -> None:
    rows = take_turns(
        [_entrant("slow", lambda: time.sleep(0.1)), _entrant("late", int)], StepClock(), 0.05
    )
    assert [row.note for row in rows] == ["", "left out: the time is up"]
    assert 1 <= len(rows[0].cold) <= 3


# Answers


@pytest.mark.parametrize("name", ["mm + topk", "mm + topk, TF32", "cdist + topk"])
@pytest.mark.parametrize("k", [1, 5])
def test_peers_of_the_search_find_neighbours(name: str, k: int) -> None:
    entrants = search_entrants(Setting.of(rehearse=True), Shape(40, 300, 16, k))
    for entrant in entrants[:1] + [each for each in entrants if each.name == name]:
        assert entrant.judge(entrant.prepare()()) == ""
    found = next(each for each in entrants if each.name == name).prepare()()
    assert isinstance(found, torch.Tensor)
    peer = next(each for each in entrants if each.name == name)
    assert peer.judge(torch.arange(300 - k, 300).expand(40, k)).startswith("wrong for ")
    assert set(PEERS) == {each.name for each in entrants[1:]}


def test_clip_in_chunks_is_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.losses.CHUNK_ROWS", 7)
    a, b = (x.double() for x in Batch(40, 16).features())
    results = []
    for loss in (chunked_clip, eager_clip):
        leaves = [x.clone().requires_grad_() for x in (a, b, torch.tensor(20.0).double())]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_gradient_with_one_wrong_element_is_refused(wrong: float) -> None:
    exact = [torch.ones(3).double(), torch.ones(2, 2).double()]
    check = GradientCheck(lambda: exact)
    check("pyfeat", [x.float() for x in exact])
    answer = [x.float().clone() for x in exact]
    answer[1][1, 0] = wrong
    with pytest.raises(WrongAnswerError, match="pyfeat: loss or gradients are off"):
        check("pyfeat", answer)


def test_every_race_has_its_own_name() -> None:
    for tiny in (False, True):
        names = [(race.section, race.case) for race in all_races(tiny=tiny)]
        assert len(set(names)) == len(names)
    assert len(all_races(tiny=False)) == 21


# The report


def _row(name: str, seconds: float, **fields: Any) -> Row:
    fields = {"ours": name.startswith("pyfeat"), "note": "", **fields}
    return Row(name, cold=[seconds] * 3, warm=[seconds / 2] * 3, **fields)


def _document() -> Document:
    search = [
        _row("pyfeat, cuda", 0.004, amount=2.5e12, resource="bf16"),
        _row("mm + topk", 0.02, amount=2.5e12, resource="float32"),
        _row("mm + topk, TF32", 0.002, note="wrong for 3.00% of queries"),
        Row("cuVS", False, note="not installed"),
    ]
    clip = [_row("pyfeat, cuda", 0.07, extra_mb=900.0), Row("eager", False, note="out of memory")]
    cases = {
        ("Search, float32", "12,544 × 65,536 × 1,536, k 1"): search,
        ("CLIP, forward and backward", "65,536 pairs × 768, bfloat16"): clip,
    }
    return Document(
        ["GPU: a made-up one"],
        {"bf16": Peak(1e6, "made up"), "float32": Peak(5e5, "made up")},
        ["build: ok, 3 s"],
        [Outcome(section, case, rows) for (section, case), rows in cases.items()],
    )


def test_the_report_shows_times_shares_ratios_and_what_is_missing(tmp_path: Path) -> None:
    _document().write(tmp_path / "kept" / "results.json")
    read = Document.read(tmp_path / "kept" / "results.json")
    assert read == _document()
    shown = report.markdown(read)
    assert "- build: ok, 3 s" in shown
    assert (
        "| 12,544 × 65,536 × 1,536, k 1 | **pyfeat, cuda** | 4.00 ms | 2.00 ms | 625,000 GFLOP/s | "
        "62% of bf16 |  |  |" in shown
    )
    assert "|  | mm + topk | 20.0 ms | 10.0 ms | 125,000 GFLOP/s | 25% of float32 | 5.00× |  |" in (
        shown
    )
    assert "|  | cuVS |  |  |  |  |  | not installed |" in shown
    assert "|  | eager |  |  |  | out of memory |" in shown
    assert "| 900 MB |" in shown
    terminal = report.terminal(read)
    assert "cuVS" in terminal
    assert "wrong for 3.00% of queries" in terminal


def test_targets_are_met_missed_or_not_measured() -> None:
    document = _document()
    lines = list(target_lines(document.outcomes, document.peaks))
    assert lines[:5] == [
        "met: knn, at least 4× mm + min in float32: 5.00× (pyfeat, cuda)",
        "MISSED: knn, at least 1× mm + min in TF32: 0.50× (pyfeat, cuda)",
        "met: knn, at least 50% of the bf16 product rate: 62% (pyfeat, cuda)",
        "MISSED: CLIP, at most 60 ms: 70.0 ms (pyfeat, cuda)",
        "met: CLIP, less than 2 GB beyond the inputs: 900 MB (pyfeat, cuda)",
    ]
    assert len(lines) == 9
    assert all(line.startswith("not measured: attention, ") for line in lines[5:])


def test_every_target_finds_its_race() -> None:
    def rows(case: str) -> list[Row]:
        seconds = 0.01 if "bfloat16 values" in case else 0.02
        peers = [_row(name, 0.4) for name in ("mm + topk", "mm + topk, TF32", "transformers")]
        return [_row("pyfeat, triton", seconds, extra_mb=1.0, amount=1e13), *peers]

    outcomes = [Outcome(race.section, race.case, rows(race.case)) for race in all_races(tiny=False)]
    lines = list(target_lines(outcomes, {"bf16": Peak(5e5, "made up")}))
    assert len(lines) == 9
    assert all(line.startswith("met: ") for line in lines), lines


# Whole runs


def test_a_crash_costs_one_race_and_wrong_answers_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    races = [Race("Section", f"case {i}", lambda setting: []) for i in range(4)]
    monkeypatch.setattr(program, "all_races", lambda *, tiny: races)
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Races 0 and 1 are done, 2 crashes; then the rest."""
        commands.append(command)
        first, measured = int(command[command.index("--first") + 1]), command[4]
        done = {0: (0, 1), 3: (3,)}[first]
        for place in done:
            row = _row("pyfeat, cuda", 0.1) if place else Row("pyfeat, cuda", True, failed=True)
            outcome = Outcome("Section", f"case {place}", [row])
            program._append(Path(measured), {"outcome": outcome.to_json()})
        return subprocess.CompletedProcess(command, 0 if first else 134)

    monkeypatch.setattr(subprocess, "run", run)
    path = tmp_path / "results.json"
    assert program.main(["--rehearse", "--json", str(path)]) == 1
    assert [int(command[command.index("--first") + 1]) for command in commands] == [0, 3]
    document = Document.read(path)
    assert [outcome.case for outcome in document.outcomes] == [race.case for race in races]
    assert document.outcomes[2].rows[0].note == "the process ended with status 134"
    failures = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failures) == 2


def test_races_are_left_out_when_the_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert program.main(["--rehearse", "--seconds", "0", "--json", str(path)]) == 0
    rows = [row for outcome in Document.read(path).outcomes for row in outcome.rows]
    assert {row.note for row in rows} == {"left out: the time is up"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 2
    assert "torch sees no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_stage(tmp_path: Path) -> None:
    done = _script("--rehearse", "--out", str(tmp_path), "--seconds", "900")
    assert done.returncode == 0, done.stdout + done.stderr
    document = Document.read(tmp_path / "RESULTS-gpu.json")
    races = all_races(tiny=True)
    assert [(o.section, o.case) for o in document.outcomes] == [(r.section, r.case) for r in races]
    for outcome in document.outcomes:
        assert outcome.rows[0].name == "pyfeat, cpu"
        assert len(outcome.rows) >= 2
        for row in outcome.rows:
            assert row.cold or "installed" in row.note or "no GPU" in row.note, row
    assert set(document.peaks) == {"copy", "bf16", "tf32", "float32"}
    assert document.stages[0] == "build: left out, a rehearsal"
    assert document.stages[1].startswith("tests: ok, ")
    text = (tmp_path / "RESULTS-gpu.md").read_text(encoding="utf-8")
    assert text == report.markdown(document)
    assert done.stdout.rstrip().endswith(report.terminal(document).splitlines()[-1])


# gpu.sh


def _script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with nothing but what the script itself calls."""
    for tool in ("bash", "dirname", "mkdir", "grep", "sed", "cat", "tee", "timeout", "tail"):
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    return str(tmp_path)


def test_the_script_says_all_that_is_missing(bare_path: str) -> None:
    done = _script(PATH=bare_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "gpu.sh: missing on this machine:"
    for tool in ("nvcc, the compiler", "cmake", "ninja or make", "a C++ compiler"):
        assert any(line.startswith(f"  - {tool}") for line in lines), tool
    assert torch.cuda.is_available() or "  - an NVIDIA GPU that torch sees" in lines


def test_the_script_names_a_missing_interpreter_and_packages(bare_path: str) -> None:
    done = _script(PATH=bare_path, PYTHON="no-such-python")
    assert done.returncode == 2
    assert "  - no-such-python (or set PYTHON)" in done.stderr
    empty = Path(bare_path) / "python-without-packages"
    empty.write_text("#!/usr/bin/env bash\nexit 1\n")
    empty.chmod(0o755)
    done = _script(PATH=bare_path, PYTHON=str(empty))
    assert done.returncode == 2
    for package in ("torch", "pytest", "triton", "pybind11"):
        assert f"  - the Python package {package} in {empty}" in done.stderr


def test_the_script_refuses_other_arguments() -> None:
    done = _script("--quick")
    assert done.returncode == 2
    assert "got --quick" in done.stderr


def test_the_script_has_no_errors_of_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is missing")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_json_of_a_document_has_nothing_but_plain_values(tmp_path: Path) -> None:
    _document().write(tmp_path / "results.json")
    fields = json.loads((tmp_path / "results.json").read_text())
    assert set(fields) == {"machine", "peaks", "stages", "outcomes"}
