"""Every objective on two processes, and interrupted: like one process that nothing interrupts."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("kornia")

from pyfeat.ssl.config import make_config
from pyfeat.ssl.registry import OBJECTIVES
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit
from tests.support_ssl import (
    interrupt_at,
    loaded,
    same,
    start_processes,
    tiny_config,
    tiny_values,
    write_images,
)
from tests.support_ssl_objectives import (
    NAMES,
    draw_nothing,
    give_views,
    objective_values,
    write_other_data,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")

PLAIN = {"network": {"dropout": 0.0}, "objective": {"noise": 0.0, "queue": 0}}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_images(tmp_path_factory.mktemp("images"))
    write_other_data(path)
    return path


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


class Pair(NamedTuple):
    """What two processes did, one run after the other."""

    folder: Path
    outputs: list[str]


@pytest.fixture(scope="module")
def pair(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("two")
    runs = [objective_values(name, images, folder / name) for name in NAMES]
    runs.append(tiny_values(images, folder / "tiny", **PLAIN))
    broken = {"objective": {"nan_at": 8, "nan_rank": 1}}
    runs.append(tiny_values(images, folder / "broken", **broken))
    started = start_processes(runs, 2, "tests.support_ssl_objectives")
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    return Pair(folder, outputs)


def _losses(run: Run) -> list[float]:
    return [value for _, _, name, value in run.metrics() if name == "loss"]


@pytest.mark.parametrize("name", [*NAMES, "tiny"])
def test_two_processes_train_like_one(
    name: str, images: Path, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_views(monkeypatch)
    if name == "tiny":
        config = tiny_config(images, tmp_path / "one", **PLAIN)
    else:
        config = make_config(objective_values(name, images, tmp_path / "one"))
    one, two = fit(config), Run(pair.folder / name)
    assert two.finished
    assert len(_losses(one)) == 20
    assert max(abs(a - b) for a, b in zip(_losses(one), _losses(two), strict=True)) < 1e-5
    assert max(_losses(one)) - min(_losses(one)) > 1e-3  # they have something to agree on
    weights = [loaded(run)["state_dict"] for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_nan_in_one_process_stops_all(pair: Pair) -> None:
    said = "loss must be finite, got NaN or infinity in step 8 with"
    assert f"{said} the batch of another process" in pair.outputs[0]
    assert f"{said} image 000" in pair.outputs[1]
    assert Run(pair.folder / "broken").steps_done == 5
    assert len((pair.folder / "broken" / "failed_batch.txt").read_text().split()) == 2 * 4


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_goes_on_with_the_bits_of_a_run_that_was_not_interrupted(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"epochs": 3, "batch_size": 16}
    whole, parts = (
        make_config(objective_values(name, images, tmp_path / out, training=short))
        for out in ("whole", "parts")
    )
    run = fit(whole)
    expected = loaded(run)
    part = OBJECTIVES.find(name).make.handed_over  # type: ignore[attr-defined]
    assert part == ("teacher.module.0" if name == "dino" else "backbone")
    for key, value in run.backbone().state_dict().items():
        assert torch.equal(value, expected["state_dict"][f"{part}.{key}"]), key
    made = OBJECTIVES.find(name).make
    with monkeypatch.context() as patch:
        patch.setattr(made, "training_loss", interrupt_at(made, 3))  # type: ignore[arg-type]
        assert fit(parts).steps_done == 3
    torch.manual_seed(123)  # the state of the process must not matter
    found = loaded(fit(parts, resume=True))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert same(found[key], expected[key]), key
