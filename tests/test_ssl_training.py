"""Runs: resumed, interrupted, on several processes, and refused."""

import csv
import json
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from pyfeat.ssl.checkpoints import FolderIO, checkpoints_of, read_weights
from pyfeat.ssl.config import make_config
from pyfeat.ssl.registry import SOURCES
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit, make_objective
from tests import support_ssl
from tests.support_ssl import Tiny, loaded, same, tiny_config, tiny_values, write_images

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    return fit(tiny_config(images, tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_leaves_what_it_should(whole: Run) -> None:
    assert whole.finished
    assert whole.steps_done == 20
    assert [path.name for path in checkpoints_of(whole.folder)] == [
        "step-000000015",
        "step-000000020",
    ]
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {"config.yaml", "versions.json", "metrics.csv", "curves.png", "checkpoints"}
    assert json.loads((whole.folder / "versions.json").read_text())["torch"] == torch.__version__
    assert (whole.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = whole.metrics()
    losses = [value for _, _, name, value in rows if name == "loss"]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.log(8 + 24) - 0.1  # below chance among batch and queue
    probes = [(step, name) for step, _, name, _ in rows if name.startswith("probe/")]
    assert probes == [(10, "probe/knn"), (20, "probe/knn"), (20, "probe/linear")]
    assert {name for _, _, name, _ in rows} >= {"lr", "loss/norm", "collapse/alignment"}


@pytest.mark.parametrize(
    ("step", "number"),
    [(7, signal.SIGINT), (10, signal.SIGINT), (8, signal.SIGTERM)],
    ids=["in mid-epoch", "at the end of an epoch", "by the end of a job"],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    images: Path,
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: signal.Signals,
) -> None:
    config = tiny_config(images, tmp_path / "run", training={"checkpoint_every": 3, "keep": 9})
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "training_loss", support_ssl.interrupt_at(Tiny, step, number))
        stopped = fit(config)
    assert signal.getsignal(number) is before
    assert not stopped.finished
    assert stopped.steps_done == step
    torch.manual_seed(123)  # the state of the process must not matter
    resumed = fit(config, resume=True)
    assert resumed.finished
    found, expected = loaded(resumed), loaded(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert same(found[key], expected[key]), key
    assert resumed.metrics() == whole.metrics()
    assert fit(config, resume=True).steps_done == 20  # nothing is left to do


def test_epochs_begin_once_each(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(Tiny, "start_epoch", lambda self, epoch: begun.append(epoch))
    config = tiny_config(images, tmp_path / "run", watch={"every": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "training_loss", support_ssl.interrupt_at(Tiny, 10))
        fit(config)
    assert begun == [0, 1]
    fit(config, resume=True)
    assert begun == [0, 1, 2, 3]


def test_readers_in_other_processes_change_nothing(
    images: Path, whole: Run, tmp_path: Path
) -> None:
    config = tiny_config(images, tmp_path / "run", training={"workers": 1})
    assert same(loaded(fit(config))["state_dict"], loaded(whole)["state_dict"])


def test_a_loss_that_is_nan_names_step_and_files_and_keeps_the_last_good_checkpoint(
    images: Path, tmp_path: Path
) -> None:
    config = tiny_config(images, tmp_path / "run", objective={"nan_at": 13})
    with pytest.raises(ValueError, match=r"got NaN or infinity in step 13 with image 000\d\d, .*; "
                                         r"the last good checkpoint is .*step-000000010$"):  # fmt: skip
        fit(config)
    run = Run(tmp_path / "run")
    assert run.steps_done == 10
    assert len((run.folder / "failed_batch.txt").read_text().split("\n")) == 8 + 1
    assert all(value.isfinite().all() for value in read_weights(run.checkpoint() or "").values())
    assert run.metrics()[-1][0] == 12


def test_weights_that_are_nan_are_not_saved(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])}
    with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity in b"):
        FolderIO("tiny", total_steps=1).save_checkpoint(
            {"state_dict": weights, "global_step": 1}, tmp_path / "step-1"
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    weights = {"a": shared, "b": shared}
    folder = FolderIO("tiny", total_steps=1)
    folder.save_checkpoint({"state_dict": weights, "global_step": 1}, tmp_path / "step-1")
    assert same(folder.load_checkpoint(tmp_path / "step-1")["state_dict"], weights)


def test_a_dead_run_is_said_to_be_dead(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(images, tmp_path / "run", objective={"collapse": True})
    with caplog.at_level(logging.WARNING, logger="pyfeat"):
        fit(config)
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == [
        "step 10: the embeddings have collapsed: effective rank 0.00 is below 2",
        "step 10: the embeddings have collapsed: uniformity 0.000 is above -0.05",
    ]


def test_a_run_is_not_overwritten_and_not_continued_as_another(
    images: Path, whole: Run, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match="must not exist unless force is given"):
        fit(tiny_config(images, whole.folder))
    with pytest.raises(
        ValueError, match=r"objective.noise must be that of the run in .*, 0.1, got 0.3"
    ):
        fit(tiny_config(images, whole.folder, objective={"noise": 0.3}), resume=True)
    other = tiny_config(images, tmp_path / "run", training={"epochs": 1}, watch={"every": 0})
    run = fit(other, resume=True)  # there is nothing to go on from
    newest = run.checkpoint()
    assert newest is not None
    manifest = json.loads((newest / "checkpoint.json").read_text())
    (newest / "checkpoint.json").write_text(json.dumps({**manifest, "objective": "simclr"}))
    with pytest.raises(ValueError, match=r"checkpoint must be of tiny, got .* of simclr"):
        fit(other, resume=True)
    (newest / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint must be whole"):
        fit(other, resume=True)
    assert fit(other, force=True).steps_done == 5


def test_a_run_does_not_go_on_with_other_data(images: Path, whole: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.load(images)[:-1])
    np.save(tmp_path / "labels.npy", np.load(images.with_name("labels.npy"))[:-1])
    shutil.copytree(whole.folder, tmp_path / "run")
    values = tiny_values(tmp_path / "images.npy", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(images.parent), str(tmp_path)))
    with pytest.raises(ValueError, match=r"as many samples as those that .* on, 40, got 39$"):
        fit(make_config(values), resume=True)


def test_what_is_due_after_a_step_is_done(whole: Run) -> None:
    source = SOURCES.find("images").make(whole.config.data.options)
    first, last = make_objective(whole.config, source).state_dict(), loaded(whole)["state_dict"]
    assert not torch.equal(last["teacher.weight"], first["teacher.weight"])
    assert not torch.equal(last["teacher.weight"], last["head.weight"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off_is_named_in_one_line(
    images: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    values = tiny_values(images, tmp_path / "run", watch={"every": 0})
    values["data"] = {"name": "images", "path": str(tmp_path / "images"), "size": [8, 8]}
    values["data"]["cache_mb"] = 0
    values["training"] |= {"workers": workers, "epochs": 2, "batch_size": 5}
    path = tmp_path / "images" / "07.png"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(
        ValueError, match=r"^pyfeat train: data must be readable, got .*07.png[^\n]*$"
    ):
        fit(make_config(values))
    assert not Run(tmp_path / "run").finished


def test_the_rate_rises_in_the_warm_up_and_falls_to_its_end(whole: Run) -> None:
    rates = [value for _, _, name, value in whole.metrics() if name == "lr"]
    # Of the step that follows: 5 of 20 steps rise.
    assert rates[:4] == pytest.approx([0.004, 0.006, 0.008, 0.01])
    assert rates[4] < rates[3]
    assert rates[11] == pytest.approx(0.005)
    assert rates[-1] == 0.0


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"devices": 41}, "processes must be at most as many as samples, got 41 for 40"),
        ({"batch_size": 64}, "batch_size must be at most the number of samples, 40, got 64"),
        ({"devices": 3}, "batch_size must be a multiple of the 3 processes, got 8"),
    ],
)
def test_what_does_not_suit_the_data_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tiny_config(images, tmp_path / "run", training=training))
    assert not (tmp_path / "run").exists()


def test_a_cut_off_checkpoint_is_refused(images: Path, tmp_path: Path) -> None:
    config = tiny_config(images, tmp_path / "run", training={"epochs": 2}, watch={"every": 0})
    run = fit(config)
    newest = run.checkpoint()
    assert newest is not None
    for name in ("weights.safetensors", "state.pt"):
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="must be"):
            FolderIO("tiny", total_steps=10).load_checkpoint(newest)
        (newest / name).write_bytes(data)


def test_figures_are_rows_of_step_epoch_name_and_value(whole: Run) -> None:
    with (whole.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "epoch", "name", "value"]
    assert float(rows[0]["epoch"]) == 0.2
