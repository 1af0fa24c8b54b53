"""The proofs of the methods: each family runs in its short form, and the report tells the truth."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.methods.__main__ import families, main
from benchmarks.methods.proofs import Figure, keep_figures, report

FAMILIES = families()


class _Family:
    TITLE = "A family"
    ABOUT = "About it."


def _figure(value: float, baseline_value: float, **fields: object) -> Figure:
    return Figure("accuracy", "trained", value, "untrained", baseline_value, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("figure", "held"),
    [
        (_figure(0.9, 0.8), True),
        (_figure(0.8, 0.8), False),
        (_figure(0.8, 0.9, better="lower"), True),
        (_figure(0.9, 0.8, factor=2), False),
        (_figure(0.3, 0.8, better="lower", factor=0.5), True),
        (_figure(math.nan, 0.8), False),
        (_figure(math.nan, 0.8, better="lower"), False),
    ],
)
def test_a_claim_holds_only_where_the_figure_is_better(figure: Figure, held: bool) -> None:
    assert figure.held is held


def test_the_report_has_all_seeds_and_the_latest_figures_of_each(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    keep_figures(path, 0, [_figure(0.1, 0.5)], ["a machine"])
    keep_figures(path, 1, [_figure(0.6, 0.8)], ["a machine"])
    keep_figures(path, 0, [_figure(0.8, 0.6)], ["another"])
    text = report(tmp_path, {"some": _Family, "none": _Family})  # type: ignore[dict-item]
    row = "| accuracy | trained | 0.7 ± 0.14 | above untrained | 0.7 ± 0.14 | 1 of 2 |"
    assert row in text
    assert text.count("## A family") == 1
    assert "- another\n- a machine\n- seeds 0, 1\n" in text


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_runs_in_its_short_form(name: str, tmp_path: Path) -> None:
    try:
        status = main(["--only", name, "--seed", "0", "--short", "--out", str(tmp_path)])
    except ModuleNotFoundError as error:  # of the dependency group ``proofs``
        if str(error.name).partition(".")[0] in ("pyfeat", "benchmarks"):
            raise
        pytest.skip(f"{error.name} is not installed")
    assert status in (0, 1)
    kept = json.loads((tmp_path / "figures" / f"{name}.json").read_text())
    figures = [Figure(**each) for each in kept["0"]["figures"]]
    assert figures
    assert all(math.isfinite(each.value + each.baseline_value) for each in figures)
    assert len({(each.claim, each.subject, each.baseline) for each in figures}) == len(figures)
    assert FAMILIES[name].TITLE in (tmp_path / "RESULTS.md").read_text()


def test_figures_of_the_short_form_do_not_replace_the_results() -> None:
    with pytest.raises(SystemExit):
        main(["--short"])
