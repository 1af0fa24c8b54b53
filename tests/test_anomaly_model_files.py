"""The folder of a saved PatchCore model: what is kept, what is refused, what survives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.features import load_backbone
from pyfeat.memory import MemoryBank
from tests.support_anomaly import LAYERS, Means, model, network, plates

Patch = pytest.MonkeyPatch


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def assert_same(loaded: PatchCore, saved: PatchCore) -> None:
    """Same scores, and same settings as far as a model keeps them."""
    size = (8, *saved.image_size)
    expected = saved.score(plates(8, seed=2, size=saved.image_size))
    found = loaded.score(plates(8, seed=2, size=saved.image_size))
    assert found.maps.shape == size
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.maps, expected.maps)
    for name in (
        "image_size",
        "neighbourhood",
        "coreset_ratio",
        "candidates",
        "scoring",
        "kinds",
        "false_alarm_rate",
        "seed",
        "grid",
        "threshold",
        "map_threshold",
        "normal_scores",
        "learned",
        "summary",
    ):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert torch.equal(loaded.bank.ids, saved.bank.ids)


@pytest.fixture
def fitted() -> PatchCore:
    return model().fit(plates(6, seed=1))


@pytest.fixture
def saved(fitted: PatchCore, tmp_path: Path) -> Path:
    fitted.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_of_a_named_backbone_is_loaded_by_its_folder_alone(tmp_path: Path) -> None:
    fitted = PatchCore(image_size=(64, 96), layers=["_blocks.2", "_blocks.4"])
    fitted.fit(plates(3, seed=1, size=(64, 96))).save(tmp_path / "model")
    loaded = PatchCore.load(tmp_path / "model", batch_size=3)
    assert (loaded.batch_size, loaded.backbone.layers) == (3, ("_blocks.2", "_blocks.4"))
    assert_same(loaded, fitted)


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "backbone"])
def test_a_model_of_a_module_is_loaded_with_the_module(tmp_path: Path, wrapped: bool) -> None:
    fitted = model(
        image_size=(32, 64),
        neighbourhood=1,
        coreset_ratio=0.3,
        candidates=None,
        scoring="anomalydino",
        false_alarm_rate=0.2,
        seed=7,
    )
    fitted.fit(plates(6, seed=1, size=(32, 64))).save(str(tmp_path / "new" / "model"))
    same = load_backbone(network(), layers=LAYERS) if wrapped else network()
    assert_same(PatchCore.load(str(tmp_path / "new" / "model"), backbone=same), fitted)


def test_a_loaded_model_can_be_saved_calibrated_and_fitted_again(saved: Path) -> None:
    loaded = PatchCore.load(saved, backbone=network())
    threshold = loaded.calibrate(plates(30, seed=3))
    loaded.save(saved, force=True)
    again = PatchCore.load(saved, backbone=network())
    assert again.threshold == threshold
    assert_same(again, loaded)
    again.fit(plates(4, seed=4))
    other = model().fit(plates(4, seed=4))
    assert torch.equal(again.bank.features, other.bank.features)
    assert again.threshold == other.threshold != threshold


def test_a_model_without_a_threshold_is_saved_too(tmp_path: Path) -> None:
    fitted = model().fit(plates(1, seed=1))
    fitted.save(tmp_path / "model")
    assert_same(PatchCore.load(tmp_path / "model", backbone=network()), fitted)


def test_numpy_numbers_are_saved_as_numbers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": np.int64(3), "coreset_ratio": np.float32(0.25)}
    fitted = model(image_size=tuple(np.array([32, 40])), **options)
    fitted.fit(plates(3, seed=1, size=(32, 40))).save(tmp_path / "model")
    assert_same(PatchCore.load(tmp_path / "model", backbone=network()), fitted)


# What save refuses to do.


def test_save_replaces_a_model_only_with_force(fitted: PatchCore, saved: Path) -> None:
    before = contents(saved)
    with pytest.raises(FileExistsError, match=r"PatchCore\.save: output must not exist unless"):
        fitted.save(saved)
    assert contents(saved) == before
    other = model().fit(plates(3, seed=9))
    other.save(saved, force=True)
    assert_same(PatchCore.load(saved, backbone=network()), other)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_save_never_replaces_a_folder_that_is_no_model(fitted: PatchCore, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"folder written by pyfeat \(with patchcore.json\)"):
        fitted.save(tmp_path, force=True)
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_leaves_the_older_model_whole(
    fitted: PatchCore, saved: Path, monkeypatch: Patch, error: BaseException
) -> None:
    before = contents(saved)
    write_into = PatchCore.write_into

    def fail(model: PatchCore, folder: Path) -> None:
        write_into(model, folder)
        raise error

    monkeypatch.setattr(PatchCore, "write_into", fail)
    for target in (saved, saved.with_name("other")):
        with pytest.raises(type(error)):
            fitted.save(target, force=True)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_model_that_is_not_fitted_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PatchCore\.save: model must be fitted first"):
        model().save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# What load refuses to read.


def edited(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "patchcore.json"
        manifest = json.loads(path.read_text()) | fields
        kept = {name: value for name, value in manifest.items() if value != "absent"}
        path.write_text(json.dumps(kept))

    return edit


def cut(name: str, length: int) -> Callable[[Path], None]:
    def shorten(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    return shorten


def write(path: Path, text: str) -> None:
    path.write_text(text)


def shorten_bank(folder: Path) -> None:
    bank = MemoryBank.load(folder / "bank.safetensors")
    bank.remove(bank.ids[:1])
    bank.save(folder / "bank.safetensors")


def newer_bank(folder: Path) -> None:
    metadata = {"kind": "MemoryBank", "version": "3", "header": "{}"}
    safetensors.torch.save_file({"x": torch.eye(2)}, folder / "bank.safetensors", metadata)


def damage_bank(folder: Path) -> None:
    whole = bytearray((folder / "bank.safetensors").read_bytes())
    whole[-1] ^= 1
    (folder / "bank.safetensors").write_bytes(whole)


BROKEN: dict[str, tuple[type[Exception], str, Callable[[Path], None]]] = {
    "no manifest": (
        FileNotFoundError,
        r"PatchCore\.load: path must be the folder of a saved model \(with patchcore\.json\), got",
        lambda folder: (folder / "patchcore.json").unlink(),
    ),
    "empty manifest": (ValueError, "whole model, got .* no JSON", cut("patchcore.json", 0)),
    "cut manifest": (ValueError, "whole model, got .* no JSON", cut("patchcore.json", 300)),
    "list": (
        ValueError,
        "whole model, got .* without format_version",
        lambda folder: write(folder / "patchcore.json", "[]"),
    ),
    "no weights": (ValueError, "whole model, .* fingerprint", edited(fingerprint="absent")),
    "no threshold": (ValueError, "whole model, got .*threshold", edited(threshold="absent")),
    "no ratio": (ValueError, "whole model, got .*coreset_ratio", edited(coreset_ratio="absent")),
    "no grid": (ValueError, "whole model, got .*IndexError", edited(grid=[])),
    "newer": (ValueError, "format version 2 or older, got .* version 3;", edited(format_version=3)),
    "no version": (
        ValueError,
        "whole model, got .* without format_version",
        edited(format_version="absent"),
    ),
    "no names": (ValueError, "whole model, .*FileNotFound", lambda f: (f / "images.json").unlink()),
    "cut names": (ValueError, "whole model, got .*JSON", cut("images.json", 40)),
    "few names": (
        ValueError,
        r"name all 6 images that were learned, got 1 in .*images\.json",
        lambda folder: write(
            folder / "images.json",
            '{"learned": [["a", [8, 8]]], "scales": null, '
            '"normal_scores": {"images": [], "peaks": []}}',
        ),
    ),
    "no bank": (
        FileNotFoundError,
        r"MemoryBank\.load: path must be an existing file, got .*bank\.safetensors",
        lambda folder: (folder / "bank.safetensors").unlink(),
    ),
    "empty bank": (ValueError, "whole safetensors file", cut("bank.safetensors", 0)),
    "cut bank": (ValueError, "whole safetensors file", cut("bank.safetensors", 3000)),
    "other bank": (ValueError, r"bank of \d+ rows, got \d+ in .*bank\.safetensors", shorten_bank),
    "newer bank": (ValueError, r"MemoryBank\.load: path must .* older, got .* 3;", newer_bank),
    "damaged bank": (ValueError, r"MemoryBank\.load: path must be an undamaged", damage_bank),
}


@pytest.mark.parametrize("case", BROKEN)
def test_load_refuses_a_broken_model(saved: Path, case: str) -> None:
    kind, message, damage = BROKEN[case]
    damage(saved)
    with pytest.raises(kind, match=message):
        PatchCore.load(saved, backbone=network())


def test_load_refuses_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load: path must be the folder of a saved model"):
        PatchCore.load(tmp_path / "none")


OTHERS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "none": (ValueError, "must be given for a model fitted with module:Sequential", lambda: None),
    "weights": (ValueError, "must have the weights that .*, got another", lambda: network(1)),
    "layers": (
        ValueError,
        r"must have the layers \['1', '3'\], got \['3', '1'\]",
        lambda: load_backbone(network(), layers=("3", "1")),
    ),
    "kind": (ValueError, r"must have the layers \['1', '3'\], got \['rgb'\]", Means),
    "module": (ValueError, "layers must be layers of module:Linear", lambda: nn.Linear(1, 1)),
    "type": (TypeError, "spec must be a name, a module or a Backbone, got int", lambda: 3),
}


@pytest.mark.parametrize("case", OTHERS)
def test_load_refuses_another_backbone(saved: Path, case: str) -> None:
    kind, message, make = OTHERS[case]
    with pytest.raises(kind, match=message):
        PatchCore.load(saved, backbone=make())


def test_load_acts_on_dtype_or_refuses_it(saved: Path) -> None:
    loaded = PatchCore.load(saved, backbone=network(), dtype=torch.bfloat16)
    maps = loaded.backbone(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(m, m.bfloat16().float()) for m in maps)
    ready = load_backbone(network(), layers=LAYERS)
    with pytest.raises(ValueError, match="dtype and compile must be left out for a Backbone"):
        PatchCore.load(saved, backbone=ready, dtype=torch.bfloat16)
