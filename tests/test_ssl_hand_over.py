"""What a run hands over, and its command line."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("lightning")

from pyfeat import features
from pyfeat.anomaly import PatchCore
from pyfeat.cli import app
from pyfeat.ssl.checkpoints import read_weights
from pyfeat.ssl.runs import Run
from pyfeat.ssl.training import fit
from pyfeat.ssl.watch import (
    alignment,
    effective_rank,
    knn_accuracy,
    knn_votes,
    looking,
    uniformity,
)
from tests import support_ssl
from tests.support_ssl import Tiny, tiny_config, tiny_values, write_images

pytestmark = pytest.mark.filterwarnings("ignore:.*deterministic.*")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / "run"
    return fit(tiny_config(images, folder, training={"epochs": 1}, watch={"every": 0}))


def test_a_run_gives_its_trained_backbone(run: Run) -> None:
    backbone = run.backbone()
    newest = run.checkpoint()
    assert newest is not None
    trained = read_weights(newest)
    assert not backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, trained[f"backbone.{name}"])
    pixels = torch.rand(2, 3, 8, 8)
    loaded = features.load(run.folder, layers=["0"])
    torch.testing.assert_close(loaded(pixels)[0], backbone.maps(pixels)[0].detach())  # type: ignore[operator]
    assert loaded.name == f"run:{run.folder}"


def test_the_backbone_of_a_run_serves_patchcore(run: Run, tmp_path: Path) -> None:
    model = PatchCore(f"run:{run.folder}", layers=["0"], image_size=(8, 8), coreset_ratio=0.5).fit(
        torch.rand(5, 3, 8, 8)
    )
    model.save(tmp_path / "model")
    again = PatchCore.load(tmp_path / "model")
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(again.score(pixels).scores, model.score(pixels).scores)


def test_what_is_no_run_is_refused(run: Run, tmp_path: Path, images: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run must be a folder with config.yaml"):
        features.load(tmp_path)
    with pytest.raises(ValueError, match="layers must be layers of run:"):
        features.load(run.folder, layers=["4"])
    with pytest.raises(ValueError, match="'hf:<folder or name>' or 'run:<folder>'"):
        features.load_backbone("run:")
    (tmp_path / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    with pytest.raises(FileNotFoundError, match="run must have a checkpoint"):
        Run(tmp_path).backbone()


def _command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_a_run_from_the_command_line_stops_and_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_values(images, tmp_path / "run", watch={"every": 0})))
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "training_loss", support_ssl.interrupt_at(Tiny, 3))
        result = _command(path, "training.epochs=2")
    assert result.exit_code == 130
    assert "stopped after step 3; go on with --resume" in result.output
    assert _command(path, "training.epochs=2").exit_code == 1
    result = _command(path, "training.epochs=2", "--resume")
    assert result.exit_code == 0, result.output
    assert f"trained 10 steps\nwrote {tmp_path / 'run'}" in result.output
    result = _command(path, "training.epoch=2")
    assert result.exit_code == 1
    assert "the nearest is 'epochs'" in result.output


def test_the_help_of_the_configuration_names_every_table() -> None:
    result = _command("--help-config")
    assert result.exit_code == 0, result.output
    for line in ("data.name: images", "data.name: pairs", "data.name: volumes", "data.name: seasons",
                 "network.name: tiny", "objective.name: tiny", "optimiser.lr ("):  # fmt: skip
        assert line in result.output
    assert "CONFIG must be given" in _command().output


def test_signs_of_collapse() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(400, 6, generator=generator)
    assert 5.5 < effective_rank(spread + 100) <= 6
    assert effective_rank(torch.ones(9, 4) * 0.3) == 0
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([[1.0, 2.0]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-6)
    x = torch.nn.functional.normalize(spread.double(), dim=1)
    pairs = torch.cdist(x, x)[torch.triu(torch.ones(400, 400), 1) == 1]
    assert uniformity(spread) == pytest.approx(float((-2 * pairs**2).exp().mean().log()), rel=1e-9)
    assert uniformity(torch.ones(9, 4)) == 0
    assert alignment(spread, 3 * spread) == pytest.approx(0, abs=1e-12)
    assert alignment(spread, -spread) == pytest.approx(4)


def test_the_nearest_vote() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.9, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    test = torch.tensor([[2.0, 0.1], [0.0, 3.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1]), 2) == 1.0
    assert knn_accuracy(train, labels, test, torch.tensor([1, 1]), 2) == 0.5
    assert knn_accuracy(train, labels, test, torch.tensor([0, 0]), 99) == 1.0  # a tie of all


def test_votes_weigh_by_similarity_and_ties_come_in_row_order() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(12, 3, generator=generator)[
        torch.arange(30) % 12
    ]  # each two or three times
    labels = torch.arange(30) % 4
    test = torch.cat([torch.randn(20, 3, generator=generator), train[:9]])
    for k, temperature in ((1, 0.07), (5, 0.07), (30, 0.5), (99, None)):
        votes = knn_votes(train, labels, test, k, num_classes=5, temperature=temperature)
        x, y = (torch.nn.functional.normalize(each.double(), dim=1) for each in (test, train))
        cosines = x @ y.T
        # Ties by row: equal rows have equal cosines but for rounding.
        order = (-cosines.round(decimals=9)).argsort(dim=1, stable=True)[:, :k]
        expected = torch.zeros(len(test), 5, dtype=torch.float64)
        for q, row in enumerate(order.tolist()):
            for i in row:
                near = (cosines[q, i] - cosines[q, row[0]]) / (temperature or torch.inf)
                expected[q, labels[i]] += near.exp()
        torch.testing.assert_close(votes, expected, atol=1e-5, rtol=1e-4)
    line = torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 0.55]])  # one near, two not so near
    truth = torch.tensor([1, 0, 0])
    arguments = line, truth, line[:1], truth[:1]
    assert knn_accuracy(*arguments, 3) == 0.0
    assert knn_accuracy(*arguments, 3, temperature=0.07) == 1.0


def test_a_look_changes_nothing(run: Run) -> None:
    class Device(torch.nn.Module):
        device = torch.device("cpu")

    module = Device()
    module.part = torch.nn.Dropout().eval()
    state = torch.get_rng_state()
    with looking(module, 3):
        torch.rand(3)
        assert not module.training
    assert module.training
    assert not module.part.training
    assert torch.equal(torch.get_rng_state(), state)
