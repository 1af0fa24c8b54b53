"""The configuration of a run: what it takes, and how it refuses the rest."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from pyfeat import ssl
from pyfeat.ssl import config as module
from pyfeat.ssl.config import Training, config_values, help_text, load_config, make_config
from pyfeat.ssl.options import Range, keys_of, read_options, write_options
from pyfeat.ssl.registry import Registry


@dataclass(frozen=True)
class Options:
    """Options of a thing."""

    size: Annotated[tuple[int, int], "Height and width.", Range(low=1)]
    temperature: Annotated[float, "Of the softmax.", Range(above=0)] = 0.1
    mode: Annotated[Literal["soft", "hard"], "How."] = "soft"
    limit: Annotated[int | None, "Most of it."] = None
    stages: Annotated[tuple[str, ...], "Which."] = ("a",)

    def __post_init__(self) -> None:
        if self.mode == "hard" and self.limit is None:
            message = "limit must be given in mode 'hard', got null"
            raise ValueError(message)


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for section in module._TABLES:
        table: Registry[object] = Registry(section, "tests.native")
        for name in ("thing", "other"):
            table.register(name, Options)(object)
        table._complete = True
        monkeypatch.setitem(module._TABLES, section, table)


def _values(**sections: object) -> dict[str, object]:
    named = {"name": "thing", "size": [2, 3]}
    return {"out": "run", "data": named, "network": named, "objective": named, **sections}


def test_a_configuration_is_read_and_written_back() -> None:
    config = make_config(_values(optimiser={"lr": "1e-3", "betas": [0.8, 0.9]}))
    assert config.optimiser.lr == 1e-3
    assert config.optimiser.betas == (0.8, 0.9)
    assert config.network.options == Options((2, 3))
    assert config.training == Training()
    assert make_config(config_values(config)) == config


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(_values(training={"epochs": 3, "seed": 1})))
    config = load_config(path, ["training.epochs=7", "watch.every=0", "data.size=[4, 5]"])
    assert (config.training.epochs, config.training.seed, config.watch.every) == (7, 1, 0)
    assert config.data.options.size == (4, 5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainig": {}}, "trainig must be a known section, got 'trainig'; the nearest is 'training'"),
        ({"training": {"epoch": 3}}, "training.epoch must be a known key, got 'epoch'; the nearest is 'epochs'"),
        ({"training": {"epochs": 0}}, "training.epochs must be at least 1, got 0"),
        ({"training": {"epochs": True}}, "training.epochs must be a whole number, got True"),
        ({"training": {"epochs": 2.5}}, "training.epochs must be a whole number, got 2.5"),
        ({"training": []}, r"training must be a section with keys, got \[\]"),
        ({"optimiser": {"lr": 0}}, "optimiser.lr must be above 0, got 0"),
        ({"optimiser": {"lr": float("nan")}}, "optimiser.lr must be a number, got nan"),
        ({"optimiser": {"lr": "fast"}}, "optimiser.lr must be a number, got 'fast'"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, "optimiser.betas must be at least 0 and below 1"),
        ({"optimiser": {"betas": [0.9]}}, "optimiser.betas must be a list of 2, each a number"),
        ({"optimiser": {"name": "adam"}}, "name must be one of .*, got 'adam'; the nearest is 'adamw'"),
        ({"data": {"size": [1, 1]}}, "data.name must be one of 'other', 'thing', got nothing"),
        ({"data": {"name": "thingy"}}, "got 'thingy'; the nearest is 'thing'"),
        ({"data": {"name": "thing"}}, r"data.size must be given \(Height and width.\), got nothing"),
        (
            {"objective": {"name": "thing", "size": [1, 1], "mode": "hard"}},
            "objective: limit must be given in mode 'hard', got null",
        ),
        ({"out": 3}, "out must be the folder of the run, got 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^pyfeat train: .*{message}"):
        make_config(_values(**sections))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "overrides must read key=value, got 'epochs'"),
        ("out.x=1", "out must be a section with keys, got 'run'"),
        ("training.epochs=[", "config must be YAML"),
        ("training.epocs=3", "the nearest is 'epochs'"),
    ],
)
def test_overrides_are_checked(tmp_path: Path, override: str, message: str) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(_values()))
    with pytest.raises(ValueError, match=message):
        load_config(path, [override])


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config must be an existing YAML file"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="config must hold sections with keys"):
        load_config(path)


def test_the_help_has_every_key_of_every_name() -> None:
    text = help_text()
    for key in keys_of(Options):
        for section in module._TABLES:
            assert f"{section}.{key.name} (" in text
    for section, options in module._SECTIONS.items():
        for key in keys_of(options):
            assert f"{section}.{key.name} (" in text
    assert "objective.temperature (a number, above 0; default 0.1)\n    Of the softmax." in text
    assert "data.size (a list of 2, each a whole number, at least 1; must be given)" in text


def test_a_field_without_a_text_is_an_error_of_ours() -> None:
    @dataclass(frozen=True)
    class Silent:
        size: int = 1

    with pytest.raises(TypeError, match="size must be Annotated with a text"):
        read_options("op", "", Silent, {})


def test_options_are_written_as_yaml_holds_them() -> None:
    assert write_options(Options((1, 2)))["size"] == [1, 2]


def test_a_name_is_entered_once() -> None:
    table: Registry[object] = Registry("thing", "tests.native")
    table.register("a", Options)(int)
    table.register("a", Options)(int)
    with pytest.raises(ValueError, match="name must be free, got 'a'"):
        table.register("a", Options)(str)


def test_the_names_of_the_package_are_there_or_say_what_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lightning")
    assert set(ssl.__all__) <= set(dir(ssl))
    for name in ssl.__all__:
        assert getattr(ssl, name) is not None
    assert ssl.make_config is make_config
    with pytest.raises(AttributeError, match=r"'pyfeat\.ssl' has no attribute 'train'"):
        ssl.train  # noqa: B018
    monkeypatch.setitem(sys.modules, "lightning", None)
    message = r"pyfeat.ssl.fit: needs lightning.*pip install 'pyfeat-kernels\[train\]'"
    with pytest.raises(ImportError, match=message):
        ssl.fit  # noqa: B018
