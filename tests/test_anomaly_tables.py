"""The usual table of a model on a data set, and every kind of model by one face."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat.anomaly.ear import EAR
from pyfeat.anomaly.images import SkippedImage
from pyfeat.anomaly.metrics import PixelMetrics, Threshold, image_auroc
from pyfeat.anomaly.models import about, load_model, load_models
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.reconstruction import RebuildOptions
from pyfeat.anomaly.results import ScoredImage
from pyfeat.anomaly.samples import Dataset, Sample, Split
from pyfeat.anomaly.synthesis import synthesise
from pyfeat.anomaly.tables import ALL, MEAN, evaluate, score_records
from tests.support_anomaly import LAYERS, Means, model, network


class Known:
    """A record in memory."""

    has_points = False

    def __init__(
        self, category: str, defective: bool | None, brightness: float, **told: Any
    ) -> None:
        self.name = f"{category}/{defective}/{brightness:g}"
        self.category, self.defective, self.kind = category, defective, "any"
        self.split: Split = "test"
        self.mask: Tensor | None = torch.zeros(16, 16, dtype=torch.bool)
        if defective:
            self.mask = torch.arange(256).view(16, 16) < 64
        self.mask = told.get("mask", self.mask)
        self.brightness, self.broken = brightness, told.get("broken", False)
        self.loads = 0

    @property
    def has_mask(self) -> bool:
        return self.mask is not None

    def load(self) -> Sample:
        self.loads += 1
        if self.broken:
            message = "it is gone"
            raise OSError(message)
        rgb = torch.full((3, 16, 16), self.brightness)
        if self.defective:
            rgb[:, :4] += 0.25  # where the mask is
        return Sample(self.name, self.category, "test", "any", self.defective, rgb, None, self.mask)


class Brightness:
    """Scores by the brightest pixel; the map is the brightness. Reads two records ahead."""

    image_size = (16, 16)
    threshold = Threshold(0.5, 3, false_alarm_rate=0.25)

    def __init__(self) -> None:
        self.skipped: list[SkippedImage] = []

    def stream(self, images: Any, *, strict: bool, progress: bool) -> Iterator[ScoredImage]:
        self.skipped = []
        waiting = []
        for record in images:
            try:
                sample = record.load()
            except OSError as error:
                if strict:
                    raise
                self.skipped.append(SkippedImage(record.name, str(error)))
                continue
            heat = sample.rgb[0]
            if float(heat[-1, -1]) == 0.0:  # loaded, then skipped
                self.skipped.append(SkippedImage(record.name, "black"))
                continue
            waiting.append(ScoredImage(sample.name, sample.rgb, float(heat.max()), heat, (16, 16)))
            if len(waiting) == 2:
                yield waiting.pop(0)
        yield from waiting


def two_classes() -> list[Known]:
    discs = [Known("disc", False, b) for b in (0.1, 0.2, 0.3)]
    discs += [Known("disc", True, b) for b in (0.02, 0.6)]
    plates = [Known("plate", False, b) for b in (0.4, 0.7)]
    return discs + plates + [Known("plate", True, b) for b in (0.5, 0.65)]


def test_the_table_holds_the_figures_of_each_class_their_mean_and_all_together() -> None:
    records = two_classes()
    table = evaluate(Brightness(), Dataset(records))
    assert [record.loads for record in records] == [1] * len(records)
    disc, plate, mean, together = table.rows
    assert (disc.category, plate.category, mean.category, together.category) == (
        "disc",
        "plate",
        MEAN,
        ALL,
    )
    assert (disc.num_good, disc.num_defective, mean.num_good, together.num_defective) == (
        3,
        2,
        5,
        4,
    )
    # Discs: good 0.1, 0.2, 0.3, defective 0.27, 0.85; plates: good 0.4, 0.7, defective 0.75, 0.9.
    assert (disc.image_auroc, plate.image_auroc) == (5 / 6, 1.0)
    assert mean.image_auroc == pytest.approx((5 / 6 + 1) / 2)
    goods, bads = [0.1, 0.2, 0.3, 0.4, 0.7], [0.27, 0.85, 0.75, 0.9]
    assert together.image_auroc == image_auroc([0] * 5 + [1] * 4, goods + bads)
    assert disc.f1 == pytest.approx(0.8)  # above 0.2: two of two, and one good
    assert (disc.recall, disc.false_alarms) == (0.5, 0.0)
    assert (plate.recall, plate.false_alarms) == (1.0, 0.5)
    assert (together.recall, together.false_alarms) == (0.75, 0.2)
    pixels = PixelMetrics()
    for record in records[:5]:
        sample = record.load()
        assert sample.mask is not None
        pixels.update(sample.rgb[:1], sample.mask[None])
    assert (disc.pixel_auroc, disc.aupro) == tuple(pixels.compute())
    assert together.pixel_auroc is None


def test_what_is_not_known_is_left_out_and_said() -> None:
    records = [
        *two_classes(),
        Known("disc", None, 0.9),
        Known("ring", False, 0.3),
        Known("rod", True, 0.3, mask=None),
        Known("rod", False, 0.3),
        Known("rod", False, 0.2, broken=True),
    ]
    table = evaluate(Brightness(), Dataset(records))
    rows = {row.category: row for row in table.rows}
    assert rows["ring"].image_auroc is rows["ring"].pixel_auroc is rows["ring"].recall is None
    assert rows["ring"].false_alarms == 0.0
    assert (rows["rod"].image_auroc, rows["rod"].pixel_auroc, rows["rod"].num_good) == (
        1.0,
        None,
        1,
    )
    assert rows["disc"].image_auroc == 5 / 6
    assert rows[MEAN].image_auroc == pytest.approx((5 / 6 + 1 + 1) / 3)
    text = table.markdown()
    assert "1 samples are not known to be good or defective" in text
    assert "rod: no pixel figures, 1 samples have no mask." in text
    assert [image.name for image in table.skipped] == ["rod/False/0.2"]
    with pytest.raises(OSError, match="it is gone"):
        evaluate(Brightness(), Dataset(records), strict=True)


def test_a_sample_that_the_model_skips_does_not_shift_the_others() -> None:
    records = [Known("a", False, b) for b in (0.2, 0.0, 0.1)] + [Known("a", True, 0.6)]
    found = [(s.name, i.name) for s, i in score_records(Brightness(), records)]
    assert found == [(f"a/{name}",) * 2 for name in ("False/0.2", "False/0.1", "True/0.6")]


def test_the_files_hold_the_table(tmp_path: Path) -> None:
    table = evaluate(Brightness(), Dataset(two_classes()))
    table.write(tmp_path)
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["disc", "plate", MEAN, ALL]
    assert float(rows[0]["image_auroc"]) == 5 / 6
    assert rows[3]["pixel_auroc"] == ""
    lines = (tmp_path / "evaluation.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("|")[4].strip() == "I-AUROC"
    assert [line.split("|")[4].strip() for line in lines[2:4]] == ["0.833", "1.000"]
    assert len({len(line) for line in lines}) == 1


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="evaluate: dataset must hold test samples known to be"):
        evaluate(Brightness(), Dataset([Known("a", None, 0.1)]))
    with pytest.raises(ValueError, match=r"evaluate: dataset must hold samples that can be read"):
        evaluate(Brightness(), Dataset([Known("a", True, 0.1, broken=True)]))
    with pytest.raises(ValueError, match=r"evaluate: models must hold one .* got none for \['b'\]"):
        evaluate({"a": Brightness()}, Dataset([Known("a", True, 0.1), Known("b", True, 0.1)]))


def test_plates_are_learned_scored_and_evaluated_by_their_records() -> None:
    plates = synthesise(train=6, good=4, defective=6, size=64)
    fitted = model(Means()).fit(plates.select(split="train"))
    assert [image.name for image in fitted.learned] == [
        r.name for r in plates.select(split="train")
    ]
    (row,) = evaluate(fitted, plates).rows
    assert (row.num_good, row.num_defective) == (4, 6)
    found = fitted.score(plates.select(split="test"))
    labels = [bool(record.defective) for record in plates.select(split="test")]
    assert row.image_auroc == image_auroc(labels, found.scores)
    assert row.pixel_auroc is not None
    assert 0.3 < row.pixel_auroc <= 1.0


def test_a_model_of_any_kind_is_loaded_by_its_folder(tmp_path: Path) -> None:
    plates = synthesise(train=4, good=1, defective=1, size=32).select(split="train")
    patchcore = PatchCore(image_size=32).fit(plates)
    ear = EAR(image_size=32, width=4, levels=2, training=RebuildOptions(steps=2)).fit(plates)
    kinds: dict[str, PatchCore | EAR] = {"patchcore": patchcore, "ear": ear}
    for kind, fitted in kinds.items():
        fitted.save(tmp_path / kind)
        loaded = load_model(tmp_path / kind, batch_size=4)
        assert type(loaded) is type(fitted)
        assert loaded.threshold == fitted.threshold
        assert about(loaded) == about(fitted)
        assert about(loaded).map_threshold is not None
        assert kind in about(loaded).sentence.lower()
    both = load_models(tmp_path, ["patchcore", "ear"])
    assert isinstance(both, dict)
    assert list(both) == ["patchcore", "ear"]
    assert isinstance(load_models(tmp_path / "ear", ["patchcore"]), EAR)
    with pytest.raises(FileNotFoundError, match=r"one of patchcore\.json, ear\.json, .*got"):
        load_models(tmp_path, ["patchcore", "others"])
    (tmp_path / "ear" / "patchcore.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold one model, got patchcore\.json and ear\.json"):
        load_model(tmp_path / "ear")


def test_a_model_of_a_network_of_your_own_asks_for_it(tmp_path: Path) -> None:
    plates = synthesise(train=2, good=1, defective=1, size=32).select(split="train")
    PatchCore(network(), layers=LAYERS, image_size=32).fit(plates).save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"PatchCore\.load: backbone must be given"):
        load_model(tmp_path / "own")
