"""The benchmarks' own rules: wrong answers are refused, ratios are right, reports are written."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pyfeat
from benchmarks import answers, machine
from benchmarks.__main__ import main
from benchmarks.answers import CoresetCheck, NeighbourCheck, check_product
from benchmarks.data import normal_features, patch_like_features
from benchmarks.machine import describe_machine, measure_peaks
from benchmarks.plots import LABEL_DISTANCE, spread_out
from benchmarks.records import Peak, Point, Record, Results, Timed
from benchmarks.report import family_reports, merge_reports, show_seconds
from benchmarks.timing import (
    QUICK_PACE,
    Contender,
    Pace,
    Summary,
    Turns,
    WrongAnswerError,
    pair_ratios,
)


def test_ratios_are_taken_round_by_round() -> None:
    # In the third round other work made both five times slower.
    ratios = pair_ratios([1.0, 2.0, 10.0], [3.0, 8.0, 40.0])
    assert ratios.values == (3.0, 4.0, 4.0)
    assert ratios.median == 4.0
    assert pair_ratios([1.0, 2.0, 4.0], [20.0]).values == (20.0,)


def test_the_spread_is_half_the_distance_of_the_quartiles() -> None:
    summary = Summary((8.0, 9.0, 10.0, 12.0, 100.0))
    assert (summary.median, summary.quartiles) == (10.0, (9.0, 12.0))
    assert summary.spread == pytest.approx(0.15)
    assert Summary((3.0,)).spread == 0.0


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(0.01, 25), (0.3, 10), (9.0, 5), (11.0, 3), (21.0, 1)],
)
def test_slow_calls_run_in_fewer_rounds(seconds: float, rounds: int) -> None:
    assert Pace().rounds_for(seconds, turn=seconds) == rounds


def test_short_calls_are_repeated_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], {"short": 0, "long": 0}

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        now[0] += seconds

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])
    contenders = [
        Contender("short", lambda: call("short", 0.25)),
        Contender("long", lambda: call("long", 4.0)),
    ]
    turns = Turns(contenders, lambda name, answer: None, Pace(pause=0.0, turn=1.0))
    assert calls == {"short": 2, "long": 2}
    turns.take()
    assert calls == {"short": 6, "long": 3}
    assert turns.seconds == {"short": [0.25], "long": [4.0]}
    assert Pace().repeats_for(1e-6) == 100


def test_contenders_take_turns_backwards_every_other_time() -> None:
    calls: list[str] = []
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in "abc"]  # type: ignore[misc]
    turns = Turns(contenders, lambda name, answer: None, QUICK_PACE)
    assert calls == ["a", "b", "c"]
    for _ in range(turns.rounds):
        turns.take()
    assert calls[3:] == ["a", "b", "c", "c", "b", "a"]
    assert {name: len(seconds) for name, seconds in turns.seconds.items()} == dict.fromkeys(
        "abc", 2
    )


def test_a_time_is_that_of_one_of_the_things_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 8.0)
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    turns = Turns([Contender("a", lambda: None, count=4)], lambda name, answer: None, QUICK_PACE)
    turns.take()
    assert turns.seconds == {"a": [2.0]}


def test_a_wrong_contender_is_refused_before_the_clock_starts() -> None:
    queries, memory, nearest = _search()
    wrong = nearest.clone()
    wrong[3, 0] = (wrong[3, 0] + 1) % len(memory)
    contenders = [
        Contender("pyfeat", lambda: nearest, ours=True),
        Contender("peer", lambda: wrong),
    ]
    check = NeighbourCheck(queries, memory, 1, exact=["pyfeat"])
    with pytest.raises(WrongAnswerError, match=r"peer: wrong neighbours of 1 of 20 queries"):
        Turns(contenders, check, QUICK_PACE)


def test_an_exact_contender_must_agree_with_brute_force() -> None:
    queries, memory, nearest = _search(k=2)
    check = NeighbourCheck(queries, memory, 2, exact=["pyfeat"])
    check("pyfeat", nearest)
    second = torch.cdist(queries, memory).topk(3, largest=False).indices[:, 1:]
    with pytest.raises(WrongAnswerError, match="not those of brute force"):
        check("pyfeat", second)


def test_no_peer_may_find_nearer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, memory, nearest = _search()
    monkeypatch.setattr(answers, "SAMPLE_DIFFERENCES", memory.numel())  # one query is brute-forced
    wrong = nearest.clone()
    wrong[7, 0] = (wrong[7, 0] + 1) % len(memory)
    check = NeighbourCheck(queries, memory, 1, exact=["pyfeat"])
    check("pyfeat", wrong)
    with pytest.raises(WrongAnswerError, match="peer: finds nearer rows"):
        check("peer", nearest)


def test_only_peers_may_swap_what_float32_cannot_tell_apart() -> None:
    memory = torch.tensor([[1000.0, 0.0], [1000.0, 0.001], [0.0, 0.0]])
    queries, nearest, other = (
        torch.tensor([[1001.0, 0.0]]),
        torch.tensor([[0]]),
        torch.tensor([[1]]),
    )
    check = NeighbourCheck(queries, memory, 1, exact=["pyfeat"])
    check("pyfeat", nearest)
    check("peer", other)
    with pytest.raises(WrongAnswerError, match="not those of brute force"):
        check("pyfeat", other)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(20, 1).long(), "must have shape"),
        (torch.zeros(20, 2).long(), "appears twice"),
        (torch.tensor([[0, 50]]).expand(20, 2), "out of range"),
    ],
)
def test_neighbours_of_the_wrong_form_are_refused(answer: Tensor, message: str) -> None:
    queries, memory, _ = _search()
    with pytest.raises(WrongAnswerError, match=message):
        NeighbourCheck(queries, memory, 2, exact=["pyfeat"])("pyfeat", answer)


def test_picks_that_are_not_the_farthest_are_refused() -> None:
    features = normal_features(300, 8)
    check = CoresetCheck(features, 10, exact=["pyfeat"])
    picks = pyfeat.greedy_coreset(features, size=10, start=0).indices
    check("pyfeat", picks)
    picks[4] = (picks[4] + 1) % 300
    with pytest.raises(WrongAnswerError, match="pick 4 is not the farthest row"):
        check("torch loop", picks)
    with pytest.raises(WrongAnswerError, match="different rows"):
        check("torch loop", picks[:5])


def test_a_product_with_one_wrong_element_is_refused() -> None:
    left, right = torch.randn(4, 16), torch.randn(30, 16)
    product = left @ right.T
    check_product("mm", product, left, right, 1e-5)
    product[2, 29] = 0.0
    with pytest.raises(WrongAnswerError, match="mm: wrong product"):
        check_product("mm", product, left, right, 1e-5)


def test_patch_like_features_lie_near_few_clusters_of_few_directions() -> None:
    features = patch_like_features(3_000, 64, clusters=5)
    assert torch.equal(features, patch_like_features(3_000, 64, clusters=5))
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    variances = torch.linalg.svdvals(features - features.mean(0)).square()
    # Four directions between five centres, and the first few of each cluster.
    assert variances[:12].sum() > 0.95 * variances.sum()


def test_without_a_compiler_peaks_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    peaks = measure_peaks(1, quick=True)
    assert peaks.rates == {}
    assert any("not measured (no C++ compiler)" in line for line in describe_machine(1, peaks))


def test_the_report_shows_times_rates_and_ratios() -> None:
    ours = Timed("pyfeat", True, [0.1, 0.1, 0.1, 0.1, 0.1], 2e10, "bf16")
    peer = Timed("faiss", False, [0.3, 0.3, 0.3, 0.3, 0.3], 2e10, "float32")
    slow = Timed("sklearn", False, [25.0], 2e10, "float32")
    record = _record(
        case="8 × 9", contenders=[ours, peer, slow], skipped={"usearch": "it would take 5 GB"}
    )
    report = _report(record)
    assert (
        "| case | contender | time | rate | of peak | × faster than faiss | × faster than sklearn |"
        in report
    )
    assert (
        "| 8 × 9 | **pyfeat** | 100 ms ± 0% | 200 GFLOP/s | 50% of bf16 | 3.00× ± 0% | 250.00× |"
        in report
    )
    assert "|  | faiss | 300 ms ± 0% | 66.7 GFLOP/s | float32 not measured |  |  |" in report
    assert "|  | sklearn | 25.0 s (1 round) | 0.80 GFLOP/s | float32 not measured |  |  |" in report
    assert "- usearch left out at 8 × 9: it would take 5 GB" in report
    assert "- processor: a made-up one" in report


def test_points_of_a_plot_are_columns_and_values_are_shown() -> None:
    timed = [Timed("pyfeat", True, [0.002] * 5), Timed("faiss", False, [0.004] * 5)]
    points = [
        _record(case=str(rows), contenders=timed, point=Point("rows", "rows, N", rows))
        for rows in (4096, 8192)
    ]
    report = _report(
        *points, _record(section="Memory", case="big", values={"pyfeat": 34.6}, unit="MB")
    )
    assert "| rows, N | pyfeat | faiss |" in report
    assert "| 8,192 | 2.00 ms ± 0% | 4.00 ms ± 0% |" in report
    assert "| case | pyfeat, MB |\n|---|---|\n| big | 35 |" in report


def test_one_family_leaves_the_others_in_the_report() -> None:
    both = merge_reports("", {"search": "old search\n", "losses": "old losses\n"})
    merged = merge_reports(both, {"search": "new search\n"})
    assert "new search" in merged
    assert "old search" not in merged
    assert "old losses" in merged
    assert merge_reports(merged, {}) == merged


def test_seconds_are_shown_with_three_digits() -> None:
    shown = [show_seconds(seconds) for seconds in (123.4, 1.234, 0.01234, 0.0001234, 1e-6)]
    assert shown == ["123 s", "1.23 s", "12.3 ms", "123 µs", "1.00 µs"]


def test_labels_of_lines_that_end_together_are_spread_out() -> None:
    assert spread_out([0.1, 0.9]) == [0.1, 0.9]
    together = spread_out([0.5, 0.5, 0.5])
    assert together == pytest.approx([0.5 - LABEL_DISTANCE, 0.5, 0.5 + LABEL_DISTANCE])


def test_a_quick_run_must_not_replace_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "--quick needs --out" in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_results_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "RESULTS.md").write_text("before")
    monkeypatch.setattr("benchmarks.__main__._run", lambda *_, **__: 2)
    assert main(["--quick", "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]
    assert (tmp_path / "RESULTS.md").read_text() == "before"


@pytest.mark.slow
def test_a_quick_run_writes_the_report_and_the_plots(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(out)]
    root = Path(__file__).resolve().parents[1]
    # Where it takes itself for a worker of this run of pytest, nothing is timed.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (out / "RESULTS.md").read_text(encoding="utf-8")
    for family in ("Search", "Precision", "Coreset", "Losses"):
        assert f"## {family}: " in report
    assert "faster than faiss" in report
    assert "faster than metric learning" in report
    assert "measured peak: " in report
    plots = sorted(path.name for path in (out / "plots").iterdir())
    assert plots == ["search_neighbours.png", "search_rows.png", "search_width.png"]
    assert all(f"(plots/{name})" in report for name in plots)
    assert all((out / "plots" / name).stat().st_size < 150_000 for name in plots)


def _search(k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """20 queries, 50 rows, and the nearest rows."""
    queries, memory = normal_features(20, 8, seed=1), normal_features(50, 8)
    return queries, memory, torch.cdist(queries, memory).topk(k, largest=False).indices


def _record(section: str = "Many queries", **fields: object) -> Record:
    return Record("search", "Search: x", "About it.", section, "Text.", **fields)  # type: ignore[arg-type]


def _report(*records: Record) -> str:
    """Through JSON, as pytest-benchmark keeps it."""
    document = {
        "benchmarks": [{"extra_info": record.to_json()} for record in records],
        "machine_info": {
            "machine": ["processor: a made-up one"],
            "peaks": {"bf16": {"rate": 400.0, "how": "vdpbf16ps"}},
        },
    }
    results = Results.from_json(document)
    assert results.records == list(records)
    assert results.peaks == {"bf16": Peak(400.0, "vdpbf16ps")}
    return family_reports(results, {})["search"]


def test_what_a_run_writes_itself_does_not_make_the_commit_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=x",
            "-c",
            "user.email=x",
            *arguments,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    for name in ("code", "figures"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message=x")
    monkeypatch.setattr(machine, "_output", lambda command: git(*command[1:]))
    clean = machine.commit_name()
    assert len(clean) == 12
    (tmp_path / "figures").write_text("2")
    assert machine.commit_name("figures") == clean
    assert machine.commit_name() == f"{clean}-dirty"
    (tmp_path / "code").write_text("2")
    assert machine.commit_name("figures") == f"{clean}-dirty"
