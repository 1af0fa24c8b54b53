"""Every command and snippet of the README runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pyfeat.anomaly import synthesise, write_dataset
from pyfeat.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("good", "new"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{i}.png")
    bottles = synthesise(train=2, good=1, defective=1, size=32, category="bottle")
    write_dataset(bottles, tmp_path / "data", layout="mvtec_ad")
    [yaml] = [block for language, block in BLOCKS if language == "yaml"]
    (tmp_path / "run.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*deterministic.*")
def test_the_python_snippets_run_in_order(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = [block for language, block in BLOCKS if language == "python"]
    assert len(snippets) >= 5
    scope: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    missed_by_cdist, missed = re.findall(r"tensor\((\d+)\)", printed)
    assert int(missed_by_cdist) > 50
    assert int(missed) == 0
    assert "200 " in printed


def test_the_pyfeat_commands_run(photos: Path) -> None:
    commands = [words[1:] for words in COMMANDS if words and words[0] == "pyfeat"]
    kinds = ["fit", "score", "fit", "evaluate", "train", "train", "train", "fit", "export", "info"]
    assert [words[0] for words in commands] == kinds
    short = ["training.epochs=1", "training.batch_size=2", "network.width=8"]
    for words in commands:
        result = CliRunner().invoke(app, words + (short if "run.yaml" in words else []))
        assert result.exit_code == 0, result.output
    assert (photos / "report" / "index.html").is_file()
    assert (photos / "report" / "ranking.csv").is_file()
    assert (photos / "table" / "evaluation.md").is_file()
    assert (photos / "run" / "curves.png").is_file()
    assert (photos / "backbone" / "model.safetensors").is_file()


def test_the_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    cmake = (ROOT / "CMakeLists.txt").read_text()
    targets = [words[1] for words in COMMANDS if words and words[0] == "make"]
    assert targets == ["demo", "test", "wheel", "wheel-cuda", "test-wheel"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for words in COMMANDS:
        if words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[(\w+)\]", words[-1]):
                assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
            for option in re.findall(r"cmake\.define\.(\w+)", " ".join(words)):
                assert f"option({option} " in cmake


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    assert {words[0] for words in COMMANDS if words} <= {"make", "pip", "pyfeat"}


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
