"""The command line as a person uses it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pyfeat.anomaly import LSFA, Dataset, read_dataset, synthesise, write_dataset
from pyfeat.anomaly.adaptors import Adaptation
from pyfeat.cli import app


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _photo(path: Path, seed: int, *, scratched: bool = False) -> None:
    """A brushed metal plate, 200 x 160 px, with a dark scratch or without."""
    rng = np.random.default_rng(seed)
    plate = 150 + 25 * rng.standard_normal((160, 1)) + 6 * rng.standard_normal((160, 200))
    if scratched:
        for i in range(60):
            plate[50 + i // 2 : 53 + i // 2, 60 + i] = 20
    Image.fromarray(plate.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("good", "new"):
        (folder / name).mkdir()
    for i in range(3):
        _photo(folder / "good" / f"plate {i}.jpg", i)
    _photo(folder / "new" / "scratched.png", 10, scratched=True)
    _photo(folder / "new" / "fine.png", 11)
    (folder / "new" / "notes.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def model(photos: Path) -> Path:
    result = _run("fit", photos / "good", "-o", photos / "model")
    assert result.exit_code == 0, result.output
    assert "learned 3 images" in result.output
    return photos / "model"


def test_three_photos_make_a_model_that_finds_a_scratch(photos: Path, model: Path) -> None:
    out = photos / "report"
    result = _run("score", model, photos / "new", "-o", out)
    assert result.exit_code == 0, result.output
    assert "skipped 1 files" in result.output
    assert "notes.png" in result.output
    with (out / "ranking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["scratched.png", "fine.png"]
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert rows[0]["anomalous"] == "1"
    page = (out / "index.html").read_text()
    HTMLParser().feed(page)
    for name in ("scratched.png", "fine.png", "notes.png"):
        assert name in page
    assert page.count("data:image/jpeg") >= 4  # two pictures and their heat maps


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of plates in the layout of MVTec AD."""
    folder = tmp_path_factory.mktemp("plates") / "data"
    records = [
        record
        for seed, category in ((0, "disc"), (1, "plate"))
        for record in synthesise(
            category=category, train=4, good=2, defective=3, size=64, seed=seed
        )
    ]
    write_dataset(Dataset(records), folder, layout="mvtec_ad")
    return folder


def test_a_data_set_is_learned_scored_and_evaluated(plates: Path, tmp_path: Path) -> None:
    small = ("--image-size", 64, 64)
    for category in ("disc", "plate"):
        chosen = ("--dataset", "--category", category, *small)
        result = _run("fit", plates, "-o", tmp_path / "each" / category, *chosen)
        assert result.exit_code == 0, result.output
        assert "learned 4 images" in result.output
    result = _run("fit", plates, "-o", tmp_path / "both", "--dataset", *small)
    assert "learned 8 images" in result.output
    for model, together in ((tmp_path / "both", True), (tmp_path / "each", False)):
        result = _run("evaluate", model, plates, "-o", tmp_path / "table", "--force")
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert any(line.startswith("| disc ") and " 3 |" in line for line in lines)
        assert any(line.startswith("| mean ") for line in lines)
        assert any(line.startswith("| all together ") for line in lines) == together
        table = (tmp_path / "table" / "evaluation.csv").read_text()
        assert table.startswith("category,num_good,num_defective,image_auroc,pixel_auroc,aupro,f1")
    result = _run("score", tmp_path / "both", plates, "-o", tmp_path / "report", "--dataset")
    assert result.exit_code == 0, result.output
    assert "ranked 10 images" in result.output
    assert "Mask of" in (tmp_path / "report" / "index.html").read_text()


def test_a_model_of_colours_and_points_scores_and_is_evaluated(tmp_path: Path) -> None:
    plates = synthesise(train=4, good=2, defective=3, size=64, severity=2.0)
    write_dataset(plates, tmp_path / "data", layout="mvtec_3d_ad")
    adaptation = Adaptation(epochs=1, batch_size=4, projection=8, heads=2)
    model = LSFA(image_size=64, adaptation=adaptation, coreset_ratio=0.5)
    model.fit(read_dataset(tmp_path / "data").select(split="train")).save(tmp_path / "model")
    result = _run("evaluate", tmp_path / "model", tmp_path / "data", "-o", tmp_path / "table")
    assert result.exit_code == 0, result.output
    assert any(
        line.startswith("| plate ") and " 3 |" in line for line in result.output.splitlines()
    )
    arguments = (tmp_path / "data", "-o", tmp_path / "report", "--dataset")
    result = _run("score", tmp_path / "model", *arguments)
    assert result.exit_code == 0, result.output
    assert "ranked 5 images" in result.output
    page = (tmp_path / "report" / "index.html").read_text()
    about = "LSFA on backbone efficientnet_lite0 and fpfh, adapted, of plate."
    for said in (about, "Height of", "Mask of"):
        assert said in page


def test_strict_turns_a_bad_file_into_an_error(photos: Path, model: Path) -> None:
    result = _run("score", model, photos / "new", "-o", photos / "strict", "--strict")
    assert result.exit_code == 1
    assert "error: PatchCore.score: " in result.output
    assert "notes.png" in result.output
    assert not (photos / "strict").exists()


def test_an_output_folder_is_replaced_only_when_asked(photos: Path, model: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    refused = _run("fit", photos / "good", "-o", model)
    assert refused.exit_code == 1
    assert "pyfeat fit: output must not exist unless force is given" in refused.output
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    replaced = _run("fit", photos / "good", "-o", model, "--force", "--seed", 3)
    assert replaced.exit_code == 0, replaced.output
    assert json.loads((model / "patchcore.json").read_text())["seed"] == 3


def test_force_never_replaces_a_folder_of_somebody_else(photos: Path) -> None:
    result = _run("fit", photos / "good", "-o", photos / "new", "--force")
    assert result.exit_code == 1
    assert "must be a folder written by pyfeat" in result.output
    assert (photos / "new" / "fine.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "missing", "-o", "out"], "images must be an existing"),
        (["fit", "empty", "-o", "out"], "empty"),
        (["fit", "good", "-o", "out", "--coreset-ratio", "0"], "coreset_ratio must be in (0, 1]"),
        (["fit", "good", "-o", "out", "--backbone", "resnet"], "spec must be"),
        (["fit", "good", "-o", "out", "--layer", "_blocks.99"], "_blocks.9"),
        (["score", "missing", "good", "-o", "out"], "must be the folder of a saved model"),
        (["fit", "good", "-o", "out", "--dataset"], "roots must have the layout of"),
        (["evaluate", "missing", "good", "-o", "out"], "roots must have the layout of"),
    ],
)
def test_mistakes_are_told_in_a_line(
    photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(photos)
    Path("empty").mkdir(exist_ok=True)
    result = _run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not Path("out").exists()


def test_info_says_what_is_here() -> None:
    result = _run("info")
    assert result.exit_code == 0
    assert json.loads(result.output)["instruction_sets"][0] == "scalar"


def test_the_module_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pyfeat", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().count(".") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("cells", "auroc"), [("mono", 0.95), ("poly", 0.90)])
def test_the_demo_finds_defective_solar_cells(tmp_path: Path, cells: str, auroc: float) -> None:
    out = tmp_path / "demo"
    result = _run("demo", "--cells", cells, "--out", out)
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["image_auroc"] >= auroc
    assert metrics["average_precision"] > 0.9
    if cells == "mono":
        assert (metrics["num_train"], metrics["num_test"]) == (411, 490)
    assert metrics["threshold"] > 0
    assert set(metrics["seconds"]) >= {"features", "coreset", "score", "total"}
    assert (out / "model" / "patchcore.json").is_file()
    page = (out / "index.html").read_text()
    assert f"{metrics['image_auroc']:.3f}" in page
    assert page.count("data:image/jpeg") > 60


@pytest.mark.slow
def test_ctrl_c_during_a_demo_ends_at_once_and_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "pyfeat", "demo", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    shown = ""
    while "coreset" not in shown:  # the longest stage, all of it inside the kernels
        shown += process.stderr.read(1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    rest = process.communicate(timeout=30)[1]
    assert time.monotonic() - began < 5.0  # a second, but for whatever else the machine does
    assert process.returncode == 130
    assert "interrupted; nothing was written" in rest
    assert list(tmp_path.iterdir()) == []
