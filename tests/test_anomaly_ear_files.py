"""The folder of an EAR model: what is kept, what is found again, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("kornia")

from pyfeat.anomaly import EAR
from pyfeat.anomaly.excision import Excision
from pyfeat.anomaly.saliency import AttentionSaliency, EnergySaliency, MemorySaliency
from tests.support_anomaly import LAYERS, network
from tests.test_anomaly_ear import Oddness, good, model
from tests.test_anomaly_saliency import SIZE, vit

SOURCES: dict[str, tuple[Any, Any]] = {
    "own": (Oddness, Oddness),
    "attention": (lambda: AttentionSaliency(vit(), heads="max"), vit),
    "energy": (lambda: EnergySaliency(network(), layers=LAYERS[1:]), network),
    "memory": (lambda: MemorySaliency(network(), layers=LAYERS), network),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_loaded_model_is_the_same(kind: str, tmp_path: Path) -> None:
    make, again = SOURCES[kind]
    fitted = model(
        make(),
        skips=np.array([False, True]),
        residual="absolute",
        relative=np.True_,
        weighting="masked",
        excision=Excision(area=0.2, dilation=1, hint="mosaic"),
        block="auto" if kind == "own" else np.int64(4),
        seed=np.int64(3),
    ).fit(good(20 if kind == "own" else 6, seed=1))
    assert (fitted.normal is not None) == (kind == "own")
    fitted.save(tmp_path / "model")
    loaded = EAR.load(tmp_path / "model", saliency=again(), batch_size=5)
    expected, found = (each.score(good(5, seed=2)) for each in (fitted, loaded))
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.maps, expected.maps)
    for name in (
        "image_size",
        "chooses_block",
        "excision",
        "skips",
        "residual",
        "relative",
        "weighting",
        "training",
        "holdout",
        "threshold",
        "summary",
    ):
        assert getattr(loaded, name) == getattr(fitted, name), name
    loaded.save(tmp_path / "model", force=True)
    assert json.loads((tmp_path / "model" / "ear.json").read_text())["kind"] == "EAR"
    with pytest.raises(ValueError, match=r"EAR\.load: saliency must be given"):
        EAR.load(tmp_path / "model")


def test_a_model_without_its_normal_residuals_is_refused_unless_it_is_older(tmp_path: Path) -> None:
    fitted = model().fit(good(20, seed=1))
    fitted.save(tmp_path / "model")
    (tmp_path / "model" / "normal.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"EAR|normal\.safetensors"):
        EAR.load(tmp_path / "model", saliency=Oddness())
    manifest = json.loads((tmp_path / "model" / "ear.json").read_text())
    older = {k: v for k, v in manifest.items() if k not in ("relative", "normal")}
    (tmp_path / "model" / "ear.json").write_text(json.dumps({**older, "format_version": 1}))
    loaded = EAR.load(tmp_path / "model", saliency=Oddness())
    assert not loaded.relative
    fitted.normal = None
    assert torch.equal(loaded.score(good(2, seed=2)).maps, fitted.score(good(2, seed=2)).maps)


def test_a_model_of_a_named_backbone_is_loaded_by_its_folder_alone(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    saliency = EnergySaliency(layers=["_blocks.2"], dtype=torch.float32)
    fitted = model(saliency).fit(good(3, seed=1))
    fitted.save(tmp_path / "model")
    loaded = EAR.load(tmp_path / "model")
    assert isinstance(loaded.saliency, EnergySaliency)
    assert loaded.saliency.backbone.layers == ("_blocks.2",)


def test_attention_comes_from_a_run_and_is_found_again_by_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from pyfeat.ssl.config import make_config
    from pyfeat.ssl.runs import Run
    from pyfeat.ssl.training import fit
    from tests.support_ssl import tiny_values, write_images

    values = tiny_values(write_images(tmp_path), tmp_path / "run", training={"epochs": 1})
    sizes = {"image_size": 8, "patch_size": 4, "width": 16, "heads": 2, "depth": 1}
    values["network"] = {"name": "vit", **sizes}
    fit(make_config(values))
    saliency = AttentionSaliency(f"run:{tmp_path / 'run'}", heads="max")
    images = torch.rand(2, 3, *SIZE)
    same = AttentionSaliency(Run(tmp_path / "run").backbone(), heads="max")
    assert torch.equal(saliency(images), same(images))
    assert saliency(images).shape == (2, 8, 8)
    fitted = model(saliency).fit(good(3, seed=1))
    fitted.save(tmp_path / "model")
    loaded = EAR.load(tmp_path / "model")
    pixels = good(2, seed=2)
    assert torch.equal(loaded.score(pixels).maps, fitted.score(pixels).maps)


def test_models_that_are_not_whole_or_have_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EAR\.save: model must be fitted first"):
        model().save(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"EAR\.load: path must be the folder of a saved"):
        EAR.load(tmp_path)
    path = tmp_path / "model"
    model(EnergySaliency(network(), layers=["3"])).fit(good(3, seed=1)).save(path)
    with pytest.raises(ValueError, match="must be the one that the model was fitted with, energy"):
        EAR.load(path, saliency=network(seed=1))
    with pytest.raises(ValueError, match="got Oddness of others"):
        EAR.load(path, saliency=Oddness())
    with pytest.raises(FileExistsError, match=r"EAR\.save: output must not exist"):
        model().fit(good(2, seed=1)).save(path)
    manifest = json.loads((path / "ear.json").read_text())
    for text, message in (
        ("{", "must hold a whole model"),
        (json.dumps({**manifest, "format_version": 99}), "a newer pyfeat wrote it"),
        (json.dumps({k: v for k, v in manifest.items() if k != "width"}), "whole model"),
        (json.dumps({**manifest, "width": 5}), "must hold a whole model"),
        ("[]", "must hold a whole model"),
    ):
        (path / "ear.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            EAR.load(path, saliency=network())
