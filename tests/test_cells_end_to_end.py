"""Solar cells of both types from the command line: fit, score, evaluate."""

import csv
from pathlib import Path

from typer.testing import CliRunner

from pyfeat.anomaly import Dataset, write_dataset
from pyfeat.anomaly.demo import solar_cells
from pyfeat.cli import app


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_both_types_are_learned_together_and_judged_apart(tmp_path: Path) -> None:
    cells = solar_cells()
    some = Dataset(
        record
        for category in ("mono", "poly")
        for split, defective, count in (
            ("train", False, 14),
            ("test", False, 7),
            ("test", True, 7),
        )
        for record in cells.select(category=category, split=split, defective=defective)[:count]  # type: ignore[arg-type]
    )
    write_dataset(some, tmp_path / "cells", layout="mvtec_ad")
    chosen = ("--dataset", "--scoring", "anomalydino", "--kinds", 2, "--image-size", 128, 128)
    assert "learned 28 images" in _run("fit", tmp_path / "cells", "-o", tmp_path / "model", *chosen)
    table = _run("evaluate", tmp_path / "model", tmp_path / "cells", "-o", tmp_path / "table")
    assert "mono: no pixel figures, 7 samples have no mask." in table
    with (tmp_path / "table" / "evaluation.csv").open(newline="") as file:
        rows = {row["category"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["mono", "poly", "mean", "all together"]
    assert rows["all together"]["num_defective"] == "14"
    assert float(rows["all together"]["image_auroc"]) > 0.75
    assert rows["mono"]["aupro"] == ""
    output = _run(
        "score", tmp_path / "model", tmp_path / "cells", "-o", tmp_path / "page", "--dataset"
    )
    assert "ranked 28 images" in output
    assert (tmp_path / "page" / "regions.csv").is_file()
