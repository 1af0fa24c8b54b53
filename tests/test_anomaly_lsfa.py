"""LSFA from samples to scores and back from disk."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfeat.anomaly import (
    LSFA,
    AnomalyScores,
    Dataset,
    Sample,
    image_auroc,
    read_dataset,
    write_dataset,
)
from pyfeat.anomaly.adaptation import AdaptationRun
from pyfeat.anomaly.extractors import BackbonePatches, GeometryPatches, NormalPatches
from pyfeat.anomaly.lsfa_files import MANIFEST
from pyfeat.anomaly.metrics import normal_threshold
from pyfeat.anomaly.patches import Patches
from pyfeat.anomaly.sample_features import SampleFeatures
from pyfeat.anomaly.scoring import SCORINGS
from pyfeat.memory import MemoryBank
from tests.support_anomaly import LAYERS, network
from tests.support_lsfa import GRID, SIZE, Cells, loaded, model, plates


def train_and_test(**options: Any) -> tuple[Dataset, Dataset]:
    dataset = plates(**options)
    return dataset.select(split="train"), dataset.select(split="test")


def assert_same(actual: AnomalyScores, expected: AnomalyScores) -> None:
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.maps, expected.maps)
    assert actual.names == expected.names


def test_defects_score_higher_and_maps_are_higher_on_them() -> None:
    train, test = train_and_test(train=10, good=6, defective=6, severity=3.0)
    fitted = model(adaptation=None).fit(train)
    found = fitted.score(test)
    assert found.maps.shape == (12, SIZE, SIZE)
    assert found.names == [record.name for record in test]
    assert image_auroc([bool(record.defective) for record in test], found.scores) > 0.8
    inside = outside = 0.0
    for heat, sample in zip(found.maps[6:], loaded(test)[6:], strict=True):
        assert sample.mask is not None
        inside, outside = inside + heat[sample.mask].mean(), outside + heat[~sample.mask].mean()
    assert inside > outside + 1


def test_without_adaptation_a_bank_is_that_of_patchcore() -> None:
    train, test = train_and_test()
    fitted = model(adaptation=None, xyz=None, coreset_ratio=1.0).fit(train)
    found = fitted.score(test)
    bank = fitted.banks["plate"].banks["rgb"]
    spread = fitted.banks["plate"].spreads["rgb"]
    rows = torch.cat([Cells()(s.rgb[None]).features[0] for s in loaded(train)])
    assert torch.allclose(bank.features.sort(dim=0).values, (rows / spread).sort(dim=0).values)
    for sample, score in zip(loaded(test), found.scores, strict=True):
        patches = Cells()(sample.rgb[None]).features / spread
        near = bank.search(patches[0])
        expected = SCORINGS["m3dm"].image_scores(near.distances.T, near.indices.T, patches, bank)
        assert score.item() == pytest.approx(float(expected), rel=1e-5)


def test_adapted_models_are_equal_for_equal_seeds_and_survive_a_file(tmp_path: Path) -> None:
    train, test = train_and_test()
    fitted = model().fit(train)
    found = fitted.score(test)
    assert_same(model().fit(train).score(test), found)
    assert not torch.equal(model(seed=1).fit(train).score(test).scores, found.scores)
    fitted.save(tmp_path / "model")
    again = LSFA.load(tmp_path / "model", rgb=Cells(), xyz=Cells())
    assert_same(again.score(test), found)
    assert again.threshold == fitted.threshold
    assert again.map_threshold == fitted.map_threshold is not None
    assert again.adaptation == fitted.adaptation
    # Memories and adaptors are there: going on is the same from the file as from memory.
    more = plates(seed=5).select(split="train")
    assert_same(again.fit(more, resume=True).score(test), fitted.fit(more, resume=True).score(test))
    assert again.num_seen == fitted.num_seen == 16
    remembered = again.memories["rgb"].samples("plate")
    assert set(remembered.tolist()) <= set(range(8, 16))  # none is taken for an earlier sample
    assert not torch.equal(model().fit(more).score(test).scores, again.score(test).scores)


@pytest.mark.parametrize("fusion", ["weighted", "mean", "one_class_svm"])
def test_fusions_survive_a_file(fusion: str, tmp_path: Path) -> None:
    train, test = train_and_test()
    fitted = model(fusion=fusion, adaptation=None, weights=(1.0, 0.5)).fit(train)
    fitted.save(tmp_path / "model")
    assert_same(
        LSFA.load(tmp_path / "model", rgb=Cells(), xyz=Cells()).score(test), fitted.score(test)
    )


def test_extractors_of_our_own_are_made_again_from_the_file(tmp_path: Path) -> None:
    train, test = train_and_test(size=64)
    geometry = GeometryPatches(cell=8, stride=4, neighbours=8)
    fitted = LSFA(None, geometry, adaptation=None, image_size=64, coreset_ratio=0.5).fit(train)
    fitted.save(tmp_path / "model")
    assert_same(LSFA.load(tmp_path / "model").score(test), fitted.score(test))
    other = GeometryPatches(cell=8, stride=4, neighbours=9)
    with pytest.raises(
        ValueError, match="xyz must give the features that the model was fitted with"
    ):
        LSFA.load(tmp_path / "model", xyz=other)


def test_extractors_have_names() -> None:
    names = {name: LSFA(None, name).extractors["xyz"].name for name in ("fpfh", "normals")}
    assert names == {"fpfh": "fpfh", "normals": "normals, backbone efficientnet_lite0"}


def test_an_extractor_of_the_user_must_be_given_again(tmp_path: Path) -> None:
    train, _ = train_and_test()
    model(adaptation=None).fit(train).save(tmp_path / "model")
    with pytest.raises(
        ValueError, match="rgb must be given for a model fitted with cells, got None"
    ):
        LSFA.load(tmp_path / "model", xyz=Cells())
    (tmp_path / "model" / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="path must hold a whole model"):
        LSFA.load(tmp_path / "model", rgb=Cells(), xyz=Cells())
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a saved model \(with lsfa"):
        LSFA.load(tmp_path)


def test_classes_have_banks_and_thresholds_of_their_own() -> None:
    both = Dataset([*plates(category="disc"), *plates(category="plate")])
    fitted = model().fit(both.select(split="train"))
    assert fitted.categories == ["disc", "plate"]
    assert fitted.threshold is None
    values = {c: banks.threshold for c, banks in fitted.banks.items()}
    assert values["disc"] != values["plate"]
    one, other = (banks.fusion.state() for banks in fitted.banks.values())
    assert one["images"] != other["images"]
    alone = {c: banks.banks["rgb"] for c, banks in fitted.banks.items()}
    assert len(alone["disc"]) > 0
    assert not torch.equal(alone["disc"].features[:9], alone["plate"].features[:9])
    with pytest.raises(
        ValueError, match=r"must be of the classes learned, \['disc', 'plate'\], got"
    ):
        fitted.score(plates(category="cup"))
    found = fitted.calibrate(both.select(split="test", defective=False))
    assert {c: t.num_normal for c, t in found.items()} == {"disc": 3, "plate": 3}
    limits = [banks.map_threshold for banks in fitted.banks.values()]
    assert [limit.num_normal for limit in limits if limit is not None] == [3, 3]
    assert fitted.banks["disc"].threshold == found["disc"]


def test_the_threshold_is_of_samples_scored_without_their_own_patches() -> None:
    train, _ = train_and_test()
    options: dict[str, Any] = {"adaptation": None, "coreset_ratio": 1.0, "fusion": "mean"}
    fitted = model(**options).fit(train)
    assert fitted.threshold is not None
    assert fitted.threshold.num_normal == 8
    banks = fitted.banks["plate"]
    scores, peaks = [], []
    for number, (_, features, valid) in enumerate(fitted.adapted(train)):
        said, maps = [], []
        for m, bank in banks.banks.items():
            rest = MemoryBank(bank.features[bank.ids[:, 0] != number])
            near = rest.search(features[m][valid])
            own = features[m][valid][None]
            said.append(SCORINGS["m3dm"].image_scores(near.distances.T, near.indices.T, own, rest))
            spread = torch.zeros(len(valid)).masked_scatter(valid, near.distances[:, 0])
            maps.append(SCORINGS["m3dm"].pixel_maps(spread.view(1, *GRID), (SIZE, SIZE)))
        scores.append(float(sum(said)) / 2)
        peaks.append(float((maps[0] + maps[1]).max()) / 2)
    expected = normal_threshold(scores, false_alarm_rate=0.05)
    assert fitted.threshold.value == pytest.approx(expected.value, rel=1e-5)
    assert float(fitted.score(train).scores.max()) < fitted.threshold.value
    assert fitted.map_threshold is not None
    highest = normal_threshold(peaks, false_alarm_rate=0.05)
    assert fitted.map_threshold.value == pytest.approx(highest.value, rel=1e-5)


def test_an_interrupted_fit_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = train_and_test()
    fitted = model().fit(train)
    found = fitted.score(test)
    remembered = fitted.memories["rgb"].rows("plate").clone()

    step = AdaptationRun._step

    def interrupted(run: AdaptationRun, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(run.losses) == 2:
            raise KeyboardInterrupt
        return step(run, numbers)

    monkeypatch.setattr(AdaptationRun, "_step", interrupted)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            fitted.fit(plates(seed=9).select(split="train"), resume=resume)
    assert_same(fitted.score(test), found)
    assert torch.equal(fitted.memories["rgb"].rows("plate"), remembered)


def test_a_single_sample_is_enough_but_for_a_threshold() -> None:
    train, test = train_and_test(train=1)
    fitted = model().fit(train)
    assert fitted.threshold is None
    assert fitted.score(test).scores.isfinite().all()


def without_points(sample: Sample) -> Sample:
    assert sample.xyz is not None
    return dataclasses.replace(sample, name="blind", xyz=torch.zeros_like(sample.xyz))


def test_samples_without_any_point_are_skipped_and_named() -> None:
    train, test = train_and_test()
    fitted = model().fit([*loaded(train), without_points(loaded(train)[0])])
    assert [(each.name, each.reason) for each in fitted.skipped] == [("blind", "it has no points")]
    found = fitted.score([without_points(loaded(test)[0]), *loaded(test)])
    assert len(found.scores) == 6
    assert [each.name for each in fitted.skipped] == ["blind"]
    with pytest.raises(ValueError, match="must all be usable, got blind: it has no points"):
        fitted.score([without_points(loaded(test)[0])], strict=True)
    with pytest.raises(ValueError, match=r"at least one that can be used, got none \(1 skipped\)"):
        model().fit([without_points(loaded(train)[0])])


def test_a_batch_of_blind_samples_alone_is_no_batch() -> None:
    sample = without_points(loaded(plates())[0])
    read = SampleFeatures({"xyz": Cells()}, (SIZE, SIZE), 2, op="op", strict=False)
    assert list(read([sample, sample])) == []
    assert len(read.skipped) == 2


def test_files_that_cannot_be_read_are_skipped_and_named(tmp_path: Path) -> None:
    write_dataset(plates(), tmp_path, layout="mvtec_3d_ad")
    (tmp_path / "plate/train/good/rgb/003.png").write_bytes(b"no picture")
    fitted = model(adaptation=None).fit(read_dataset(tmp_path).select(split="train"))
    assert [each.name for each in fitted.skipped] == ["plate/train/good/003"]
    assert "Pillow" in fitted.skipped[0].reason


def test_patches_without_points_score_nothing_in_any_bank() -> None:
    train, test = train_and_test()
    fitted = model(adaptation=None, fusion="mean").fit(train)
    sample = loaded(test)[0]
    assert sample.xyz is not None
    sample.xyz[:, :, :16] = 0
    (_, features, valid), *_ = fitted.adapted([sample])
    said, image, patches = fitted.banks["plate"].score(
        {m: rows[None] for m, rows in features.items()}, valid[None], SCORINGS["m3dm"]
    )
    assert not valid.view(GRID)[:, :4].any()
    assert set(said) == {"rgb", "xyz"}
    assert not patches[0][~valid].any()
    assert image.isfinite().all()


def test_points_are_not_invented_where_samples_are_resized() -> None:
    (sample,) = loaded(plates(train=1, good=0, defective=0, size=80))
    seen: list[torch.Tensor] = []

    class Watching(Cells):
        def __call__(self, values: torch.Tensor) -> Patches:
            seen.append(values)
            return super().__call__(values)

    model(rgb=Watching(), xyz=Watching(), adaptation=None).fit([sample])
    assert sample.xyz is not None
    colours, points = seen
    assert colours.shape == points.shape == (1, 3, SIZE, SIZE)
    known = {tuple(point) for point in sample.xyz.flatten(1).T.tolist()}
    assert {tuple(point) for point in points[0].flatten(1).T.tolist()} <= known
    small = torch.nn.functional.avg_pool2d(sample.rgb, 5)
    assert (small - torch.nn.functional.avg_pool2d(colours[0], 2)).abs().mean() < 0.02


def test_modalities_that_do_not_fit_are_refused() -> None:
    train, test = train_and_test()
    flat = [dataclasses.replace(sample, xyz=None) for sample in loaded(train)]
    with pytest.raises(ValueError, match=r"LSFA.fit: samples must have points, got 'plate/train/"):
        model().fit(flat)
    with pytest.raises(ValueError, match=r"patches of one grid, got 8 x 8 of rgb and 4 x 4 of xyz"):
        model(xyz=Cells(cell=8)).fit(train)
    with pytest.raises(TypeError, match="samples must hold records or samples, got Tensor"):
        model().fit(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"LSFA.score: model must be fitted first, got no banks"):
        model().score(test)
    with pytest.raises(ValueError, match="resume must be False before the first fit, got True"):
        model().fit(train, resume=True)
    assert model(xyz=None).fit(flat).score(flat).scores.shape == (8,)


class Bad(Cells):
    """Features that no model can use."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__("bad")
        self.features = features

    def __call__(self, values: torch.Tensor) -> Patches:
        return self.features.expand(len(values), -1, -1)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.full((1, 4, 2), torch.nan), "features of bad must be finite"),
        (torch.zeros(1, 5, 2), "patches of bad must fill a grid of 2 x 2, got 5 of them"),
        (torch.zeros(1, 4, 2).double(), "features of bad must be float32 of shape"),
    ],
    ids=["nan", "square", "dtype"],
)
def test_wrong_features_of_an_extractor_are_refused(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(rgb=Bad(features), xyz=None).fit(plates())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rgb": None, "xyz": None}, "rgb must be given where xyz is None"),
        ({"xyz": "pointnet"}, "xyz must be one of 'fpfh', 'normals', got 'pointnet'"),
        ({"scoring": "anomalydino"}, "scoring must be one of"),
        ({"weights": (1.0,)}, r"weights must hold 2, got \(1.0,\)"),
        ({"weights": (0.0, 0.0)}, "weights must be at least 0 and not all 0"),
        ({"fusion": "vote"}, "kind must be one of 'weighted', 'mean', 'one_class_svm', got 'vote'"),
        ({"image_size": 0}, "image_size must hold positive pixels, got 0"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_argument_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_extractors_describe_what_is_there() -> None:
    (sample,) = loaded(plates(train=1, good=0, defective=0, size=64))
    assert sample.xyz is not None
    colours = BackbonePatches(network(), layers=LAYERS)
    normals = NormalPatches(network(), layers=LAYERS, neighbours=8)
    geometry = GeometryPatches(cell=4, stride=2, neighbours=12)
    assert colours(sample.rgb[None]).features.shape == (1, 256, 24)
    for extractor, stride in ((normals, 1), (geometry, 2)):
        taken = (sample.xyz != 0).any(dim=0)[::stride, ::stride]
        cell = 4 // stride
        seen = taken.view(16, cell, 16, cell).any(dim=3).any(dim=1).flatten()
        patches, grid = extractor(sample.xyz[None])
        assert grid == (16, 16)
        assert torch.equal((patches[0] != 0).any(dim=1), seen)
    # Histograms do not depend on the pose.
    ten = torch.tensor([0.9848, 0.1736])
    x, y, z = sample.xyz
    turned = torch.stack([x * ten[0] + z * ten[1], y, z * ten[0] - x * ten[1]])
    was, found = (geometry(points[None]).features for points in (sample.xyz, turned))
    assert (found - was).norm() < 0.05 * was.norm()
    assert len({e.fingerprint() for e in (colours, normals, geometry, Cells())}) == 4
