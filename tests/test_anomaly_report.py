import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pyfeat.anomaly.gallery import Entry, Gallery, HeatScale, overlay
from pyfeat.anomaly.report import Report, write_report

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Parses a page and refuses unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(report: Report, folder: Path) -> Page:
    write_report(folder / "index.html", report)
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def filled(
    scores: list[float],
    labels: list[bool] | None = None,
    *,
    names: list[str] | None = None,
    image_size: tuple[int, int] = (12, 16),
    gallery: Gallery | None = None,
) -> Gallery:
    gallery = Gallery() if gallery is None else gallery
    generator = torch.Generator().manual_seed(0)
    for i, score in enumerate(scores):
        gallery.add(
            f"image{i}.png" if names is None else names[i],
            score,
            torch.rand(3, *image_size, generator=generator),
            torch.rand(5, 7, generator=generator) + max(0.0, min(score, 10.0)),
            None if labels is None else labels[i],
        )
    return gallery


def orders(entries: list[Entry]) -> list[int]:
    return [entry.order for entry in entries]


@pytest.mark.parametrize("distinct", [5, 10_000], ids=["many ties", "few ties"])
def test_the_gallery_keeps_what_a_stable_sort_keeps(distinct: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, distinct, 150).astype(float).tolist()
    labels = (rng.random(150) < 0.3).tolist()
    gallery = filled(scores, labels, gallery=Gallery(most=7, least=5, wrong=4, thumbnail=4))
    ascending = sorted(range(150), key=lambda i: scores[i])
    descending = sorted(range(150), key=lambda i: -scores[i])
    assert orders(gallery.most) == descending[:7]
    assert orders(gallery.least) == ascending[:5]
    assert orders(gallery.missed) == [i for i in ascending if labels[i]][:4]
    assert orders(gallery.alarms) == [i for i in descending if not labels[i]][:4]
    assert len(gallery) == 150
    assert [gallery.scores, gallery.labels] == [scores, labels]


def test_a_gallery_may_keep_no_picture(tmp_path: Path) -> None:
    gallery = filled([1.0, 2.0], [False, True], gallery=Gallery(most=0, least=0, wrong=0))
    assert gallery.scale() == HeatScale(0.0, 0.0)
    assert not page_of(Report("r", gallery), tmp_path).named("img")


def test_a_kept_picture_is_a_thumbnail_of_the_image() -> None:
    gallery = Gallery(thumbnail=20)
    gallery.add("wide", 1.0, torch.full((3, 10, 400), 0.5), torch.zeros(2, 2))
    gallery.add("small", 0.0, torch.full((3, 7, 5), 2.0, dtype=torch.float64), torch.zeros(2, 2))
    wide, small = gallery.most
    assert (wide.size, small.size) == ((20, 1), (5, 7))
    assert np.abs(pixels(wide.jpeg).astype(int) - 128).max() <= 2
    assert pixels(small.jpeg).min() == 255


def test_a_picture_is_stretched_to_the_shape_of_the_original() -> None:
    gallery = Gallery(thumbnail=90)
    image, heat_map = torch.full((3, 16, 16), 0.5), torch.zeros(4, 4)
    gallery.add("photo", 1.0, image, heat_map, shape=(2000, 3000))
    gallery.add("strip", 0.0, image, heat_map, shape=(1, 100_000))
    assert [entry.size for entry in gallery.most] == [(90, 60), (90, 1)]


def test_a_large_heat_map_keeps_its_peak() -> None:
    gallery, heat_map = Gallery(), torch.zeros(300, 500)
    heat_map[217, 401] = 9.0
    gallery.add("peak", 1.0, torch.zeros(3, 4, 4), heat_map)
    assert gallery.most[0].heat_map.shape == (64, 64)
    assert gallery.most[0].heat_map.max() == 9.0


def test_a_kept_heat_map_does_not_follow_later_changes() -> None:
    gallery, heat_map = Gallery(), torch.zeros(2, 2)
    gallery.add("a", 1.0, torch.zeros(3, 4, 4), heat_map)
    heat_map += 1
    assert gallery.most[0].heat_map.max() == 0


def test_one_value_has_one_colour_in_all_pictures() -> None:
    gallery = Gallery()
    grey = torch.full((3, 64, 64), 0.6)
    for name, score, left, right in (("normal", 1.0, 1.0, 3.0), ("defective", 2.0, 3.0, 8.0)):
        heat_map = torch.full((8, 8), left)
        heat_map[:, 4:] = right
        gallery.add(name, score, grey, heat_map)
    hot, cool = (pixels(overlay(entry, gallery.scale())).astype(int) for entry in gallery.most)
    assert np.abs(hot[:, :24] - cool[:, 40:]).max() <= 6  # both 3.0; JPEG rounds
    assert np.abs(hot[:, 40:] - hot[:, :24]).max() > 60
    assert np.ptp(cool[:, :24], axis=-1).max() <= 3  # the normal level has no colour


def test_opacity_grows_with_the_value_and_stops_at_the_ends_of_the_scale() -> None:
    colours = HeatScale(1.0, 3.0).colours(np.array([-5.0, 1.0, 1.5, 2.5, 3.0, 99.0]))
    assert (np.diff(colours[1:5, 3]) > 0).all()
    assert colours[1, 3] == 0
    np.testing.assert_array_equal(colours[[0, 5]], colours[[1, 4]])


def test_an_extreme_image_does_not_take_the_colour_of_the_others() -> None:
    gallery = Gallery()
    for i in range(20):
        peak = 1e6 if i == 19 else 5.0
        gallery.add(str(i), float(i), torch.zeros(3, 4, 4), torch.tensor([[1.0, 1.0, 1.0, peak]]))
    assert gallery.scale() == HeatScale(1.0, 9.0)


def test_flat_heat_maps_have_no_colour() -> None:
    gallery = Gallery()
    gallery.add("flat", 1.0, torch.full((3, 8, 8), 0.5), torch.ones(4, 4))
    assert gallery.scale() == HeatScale(1.0, 1.0)
    assert np.ptp(pixels(overlay(gallery.most[0], gallery.scale())), axis=-1).max() == 0


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("score must be finite, got nan", {"score": math.nan}),
    (r"image must have shape \(3, H, W\), got \(1, 4, 4\)", {"image": torch.zeros(1, 4, 4)}),
    (r"image must have shape \(3, H, W\), got \(3, 0, 4\)", {"image": torch.zeros(3, 0, 4)}),
    ("image must be floating point", {"image": torch.zeros(3, 4, 4, dtype=torch.uint8)}),
    (r"heat_map must have shape \(h, w\), got \(1, 2, 2\)", {"heat_map": torch.zeros(1, 2, 2)}),
    ("heat_map must be floating point", {"heat_map": torch.zeros(2, 2, dtype=torch.int64)}),
    ("heat_map must be finite", {"heat_map": torch.full((2, 2), math.inf)}),
    ("label must be given for all images or for none, got True", {"label": True}),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS, ids=[m for m, _ in REFUSALS])
def test_add_refuses(message: str, change: dict[str, Any]) -> None:
    gallery = filled([1.0])
    arguments: dict[str, Any] = {
        "name": "a",
        "score": 1.0,
        "image": torch.zeros(3, 4, 4),
        "heat_map": torch.zeros(2, 2),
    }
    with pytest.raises(ValueError, match=f"^Gallery.add: {message}"):
        gallery.add(**(arguments | change))
    assert len(gallery) == 1


def test_a_label_may_not_be_missing_later() -> None:
    gallery = filled([1.0], [True])
    with pytest.raises(ValueError, match="for all images or for none, got None"):
        gallery.add("a", 1.0, torch.zeros(3, 4, 4), torch.zeros(2, 2))


def test_sizes_and_threshold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^Gallery: least must be >= 0, got -1"):
        Gallery(least=-1)
    with pytest.raises(ValueError, match=r"^Gallery: thumbnail must be >= 1, got 0"):
        Gallery(thumbnail=0)
    with pytest.raises(ValueError, match=r"^Report: threshold must be a number or None, got nan"):
        Report("r", Gallery(), threshold=math.nan)


def full_report() -> Report:
    rng = np.random.default_rng(1)
    labels = (rng.random(60) < 0.4).tolist()
    scores = (rng.normal(size=60) + 2 * np.array(labels)).tolist()
    return Report(
        "Cells",
        filled(scores, labels, gallery=Gallery(most=6, least=4, wrong=3)),
        "a subtitle",
        threshold=1.0,
        threshold_text="a promise",
        facts={"Image AUROC": "0.921"},
        seconds={"Load": 1.5, "Score": 3.0},
        skipped=[("notes.txt", "not an image")],
    )


def test_a_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(full_report(), tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href"}:
                assert value is not None
                assert value.startswith(("data:image/jpeg;base64,", "#"))
            elif not name.startswith("xmlns"):
                assert "://" not in (value or "")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    policies = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_page_holds_what_the_report_says(tmp_path: Path) -> None:
    report = full_report()
    page = page_of(report, tmp_path)
    for words in ("Cells", "a subtitle", "a promise", "Image AUROC", "0.921", "Load", "1.5 s"):
        assert words in page.text
    for words in ("Most anomalous", "Most normal", "Defective, but ranked low", "ROC curve"):
        assert words in page.text
    for words in ("rank 1 of 60", "false alarm", "missed", "notes.txt", "not an image"):
        assert words in page.text
    scores, labels = np.array(report.gallery.scores), np.array(report.gallery.labels)
    for name, kind in (("Defects found", labels), ("False alarms", ~labels)):
        assert f"{name}{(scores[kind] > 1.0).sum()} of {kind.sum()}" in page.text
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    assert all(image["alt"] for image in page.named("img"))


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", full_report())
    write_report(tmp_path / "b.html", full_report())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_page_neither_follows_nor_changes_the_settings_of_matplotlib(tmp_path: Path) -> None:
    import matplotlib as mpl

    write_report(tmp_path / "a.html", full_report())
    with mpl.rc_context({"font.size": 30, "axes.edgecolor": "red", "svg.fonttype": "path"}):
        settings = dict(mpl.rcParams)
        write_report(tmp_path / "b.html", full_report())
        assert dict(mpl.rcParams) == settings
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_names_are_shown_but_never_obeyed(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)</script>.png",
        "\"onload='x' &amp;.png",
        "$title 日本語 ü.png",
        "lone\udcff\n\0.png",
        "folder/" * 30 + "last.png",
    ]
    gallery = filled([5.0, 4.0, 3.0, 2.0, 1.0], names=names)
    report = Report("<em>$body", gallery, skipped=[("<q>", "<u>")], heat_unit="<s>")
    page = page_of(report, tmp_path)
    assert not {"script", "em", "q", "u", "s"} & {tag for tag, _ in page.tags}
    assert "<em>$body" in page.text
    assert "<q><u>" in page.text
    for name in names[:3]:
        assert name in page.text
    assert "lone\ufffd\ufffd\ufffd.png" in page.text
    titles = [attrs.get("title") for attrs in page.named("div")]
    assert names[4] in titles
    assert names[4] not in page.text
    assert re.search(r"folder/fold\u2026/[a-z/]*/folder/last\.png\d", page.text)


def test_without_labels_a_page_ranks_and_judges(tmp_path: Path) -> None:
    gallery = filled([float(i % 5) for i in range(620)], gallery=Gallery(most=3, least=2))
    report = Report("Line 3", gallery, threshold=3.0, csv_name="scores.csv")
    page = page_of(report, tmp_path)
    assert "Above the threshold124" in page.text  # greater, not equal
    assert "The first 500 of 620 images" in page.text
    assert "scores.csv has all of them" in page.text
    assert len(page.named("tr")) == 501
    assert len(page.named("img")) == 2 * (3 + 2)
    for words in ("ROC", "ranked low", "defective"):
        assert words not in page.text
    rows = re.findall(r"image(\d+)\.png\d\.\d", page.text)
    assert rows[:3] == ["4", "9", "14"]  # equal scores in the order added


EDGES: dict[str, Report] = {
    "no image": Report("r", Gallery(), skipped=[("a", "b")], threshold_text="no normal images"),
    "one image": Report("r", filled([0.0])),
    "one pixel": Report("r", filled([1.0, 2.0], image_size=(1, 1))),
    "very wide": Report("r", filled([1.0, 2.0], image_size=(2, 900))),
    "equal scores": Report("r", filled([2.5] * 4, [True, False] * 2), threshold=2.5),
    "only defective": Report("r", filled([1.0, 2.0], [True, True]), threshold=1.5),
    "only good": Report("r", filled([1.0, 2.0], [False, False]), threshold=1.5),
    "infinite threshold": Report("r", filled([1.0, 2.0]), threshold=math.inf),
    "far threshold": Report("r", filled([1.0, 2.0], [False, True]), threshold=-1e9),
    "tiny scores": Report("r", filled([1e-30, 2e-30])),
    "huge scores": Report("r", filled([-1e300, 1e300])),
    "close scores": Report("r", filled([1e9, 1e9 + 1e-6])),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str, tmp_path: Path) -> None:
    report = EDGES[case]
    page = page_of(report, tmp_path)
    assert f"Images scored{len(report.gallery)}" in page.text
    assert len(page.named("img")) >= 2 * len(report.gallery)
    assert "nan" not in page.text
    assert ("ROC curve" in page.text) == (len(set(report.gallery.labels)) == 2)


def test_a_perfect_ranking_has_no_wrong_images(tmp_path: Path) -> None:
    page = page_of(Report("r", filled([1.0, 2.0, 3.0], [False, False, True])), tmp_path)
    assert "Every defective image scores higher than every good one." in page.text
    assert "ranked low" not in page.text
    assert "ranked high" not in page.text


@pytest.mark.slow
def test_sixty_pictures_stay_below_four_megabytes(tmp_path: Path) -> None:
    gallery, generator = Gallery(), torch.Generator().manual_seed(0)
    image = torch.linspace(0.1, 0.9, 400) + 0.03 * torch.randn(3, 400, 400, generator=generator)
    heat_map = torch.rand(28, 28, generator=generator)
    for i in range(60):
        gallery.add(f"{i}.png", float(i), image, heat_map, i % 2 == 0)
    page = page_of(Report("r", gallery), tmp_path)
    assert len(page.named("img")) == 2 * 60
    assert (tmp_path / "index.html").stat().st_size < 4e6


def pixels(jpeg: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_pictures_of_a_page_are_those_of_the_gallery(tmp_path: Path) -> None:
    gallery = filled([1.0, 2.0])
    page = page_of(Report("r", gallery), tmp_path)
    data = [base64.b64decode((image["src"] or "").partition(",")[2]) for image in page.named("img")]
    scale = gallery.scale()
    expected = [jpeg for entry in gallery.most for jpeg in (entry.jpeg, overlay(entry, scale))]
    assert data == expected
