"""Heights, masks and regions on a page and in its tables."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyfeat.anomaly.evaluation import collect, heights, write_ranking
from pyfeat.anomaly.gallery import Gallery, HeatScale, overlay
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.regions import Box, Region
from pyfeat.anomaly.samples import Dataset, Sample
from pyfeat.anomaly.synthesis import synthesise
from tests.support_anomaly import Means, model, plates, scratched
from tests.test_anomaly_report import Page


def pixels(jpeg: bytes | None) -> np.ndarray:
    assert jpeg is not None
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_heights_and_masks_are_kept_at_the_size_of_the_thumbnail() -> None:
    height = torch.arange(40.0).expand(30, 40).clone()
    height[:, :8] = float("nan")
    mask = torch.zeros(30, 40, dtype=torch.bool)
    mask[10:20, 20:40] = True
    gallery = Gallery()
    image, heat = torch.full((3, 30, 40), 0.5), torch.rand(5, 5)
    gallery.add("a", 1.0, image, heat, True, (60, 80), height=height, mask=mask)
    (entry,) = gallery.most
    assert entry.size == (300, 225)
    shown, known = pixels(entry.height), pixels(entry.mask)
    assert shown.shape == known.shape == (225, 300, 3)
    assert np.abs(shown[:, 5:50] - 128).max() < 12  # no point: grey
    assert shown[100, 290].sum() > 1.5 * shown[100, 80].sum()  # higher is brighter
    assert known[112, 225].min() > 240
    assert known[20, 225].max() < 15
    assert known[112, 50].max() < 15


def test_a_flat_height_and_one_without_points_are_pictures_too() -> None:
    for height in (torch.ones(8, 8), torch.full((8, 8), float("nan"))):
        gallery = Gallery()
        gallery.add("a", 1.0, torch.rand(3, 8, 8), torch.rand(4, 4), height=height)
        assert pixels(gallery.most[0].height).std(axis=(0, 1)).max() < 4


def test_regions_are_boxed_on_the_heat_map() -> None:
    gallery = Gallery(thumbnail=100)
    box = Region(Box(20, 40, 60, 120), 100.0, 2.0, (1.0, 1.0))
    image = torch.full((3, 100, 100), 0.5)
    gallery.add("a", 1.0, image, torch.zeros(4, 4), None, (100, 200), regions=[box])
    (entry,) = gallery.most
    assert entry.size == (100, 50)
    drawn = pixels(overlay(entry, HeatScale(0.0, 1.0)))[..., 0]
    assert drawn[20, 30] == pytest.approx(128, abs=25)
    for row, column in ((9, 40), (30, 40), (20, 19), (20, 60)):
        assert drawn[row - 2 : row + 3, column - 2 : column + 3].max() > 220
    assert drawn[40:, :].max() < 170
    assert drawn[:, 70:].max() < 170


@pytest.fixture(scope="module")
def fitted() -> PatchCore:
    return model(Means(), neighbourhood=1).fit(plates(12, seed=1))


def test_the_tables_hold_every_region(fitted: PatchCore, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    bad = scratched(plates(2, seed=3, size=(128, 64)), slice(32, 64), slice(8, 32))
    for name, image in {"bad": bad[0], "good": plates(1, seed=4, size=(128, 64))[0]}.items():
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
    write_ranking(fitted, tmp_path / "images", tmp_path / "out")
    ranking, regions = (
        list(csv.DictReader(io.StringIO((tmp_path / "out" / name).read_text())))
        for name in ("ranking.csv", "regions.csv")
    )
    assert ranking[0]["name"] == "bad.png"
    own = [row for row in regions if row["name"] == "bad.png"]
    assert int(ranking[0]["regions"]) == len(own) >= 1
    assert float(ranking[0]["area"]) == pytest.approx(sum(float(row["area"]) for row in own))
    first = own[0]
    assert (int(first["top"]) < 40) & (int(first["bottom"]) > 56) & (int(first["bottom"]) <= 128)
    assert 40 < float(first["row"]) < 56
    assert 12 < float(first["column"]) < 28
    assert fitted.map_threshold is not None
    assert float(first["peak"]) > fitted.map_threshold.value
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    Page(page)
    assert "egion" in page
    assert f"rows {first['top']}\u2013{first['bottom']}" in page


def test_a_page_shows_colours_heights_heat_and_mask_side_by_side(tmp_path: Path) -> None:
    data = synthesise(train=4, good=1, defective=3, size=64)
    fitted = model(Means()).fit(data.select(split="train"))
    write_ranking(fitted, data.select(split="test"), tmp_path / "out")
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    alts = [str(image["alt"]).rsplit(" ", 1)[0] for image in page.named("img")]
    assert alts[:4] == ["Picture", "Height of", "Heat map of", "Mask of"]
    assert "row of4" in [attributes.get("class") for attributes in page.named("div")]
    assert "Defects found" in page.text
    gallery, regions = collect(fitted, data.select(split="test"))
    assert gallery.labels == [False, True, True, True]
    assert len(regions) == 4


def test_there_is_no_height_where_there_is_no_point() -> None:
    xyz = torch.ones(3, 2, 2)
    xyz[:, 0, 1] = 0.0
    xyz[2, 1, 0] = 0.0  # a point at height 0
    sample = Sample("a", "b", "test", "good", False, torch.zeros(3, 2, 2), xyz)
    found = heights(sample)
    assert found is not None
    assert found.isnan().tolist() == [[False, True], [False, False]]
    assert heights(Sample("a", "b", "test", "good", False, torch.zeros(3, 2, 2))) is None
    assert heights(None) is None


def test_labels_are_shown_only_if_all_are_known() -> None:
    data = synthesise(train=4, good=1, defective=1, size=64)

    class Unsure:
        def __init__(self, record: object) -> None:
            self.record = record

        def __getattr__(self, name: str) -> object:
            return getattr(self.record, name)

        defective = None

    fitted = model(Means()).fit(data.select(split="train"))
    test = data.select(split="test")
    mixed = Dataset([test[0], Unsure(test[1])])  # type: ignore[list-item]
    assert collect(fitted, mixed)[0].labels == []
