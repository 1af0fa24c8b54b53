"""One self-contained page about the scores of a set of images."""

import base64
import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray

from pyfeat.anomaly.gallery import Entry, Gallery, HeatScale, overlay
from pyfeat.anomaly.regions import Region
from pyfeat.anomaly.report_plots import histogram, roc

_MAX_ROWS = 500  # rows of the ranking, and of the skipped files, that the page shows
_MAX_NAME = 56  # characters of a name shown; the whole name is in the title attribute


@dataclass(frozen=True, eq=False)
class Report:
    """What a page shows.

    The page adds by itself: the number of images, how many are above the threshold and, with
    labels, how many defects that finds and how many good images it flags.

    Attributes:
        title: Heading of the page.
        gallery: Scores of all images, and the pictures of some.
        subtitle: A sentence below the heading; "" for none.
        threshold: An image is anomalous when its score is greater; None for no verdicts.
            Infinity is allowed: a promise that no finite threshold keeps.
        threshold_text: What the threshold promises, or why there is none.
        facts: Headline figures, such as ``{"Image AUROC": "0.943"}``, in the order shown.
        seconds: Seconds spent per stage, >= 0.
        skipped: Name of each file that has no score, and the reason.
        heat_unit: What a value of a heat map is.
        csv_name: File that holds the whole ranking, named where the page shows a part; "" for
            none.

    Raises:
        ValueError: If the threshold is NaN.
    """

    title: str
    gallery: Gallery
    subtitle: str = ""
    threshold: float | None = None
    threshold_text: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: Sequence[tuple[str, str]] = ()
    heat_unit: str = "distance to the nearest normal patch"
    csv_name: str = ""

    def __post_init__(self) -> None:
        if self.threshold is not None and math.isnan(self.threshold):
            message = "Report: threshold must be a number or None, got nan"
            raise ValueError(message)


def write_report(path: Path, report: Report) -> None:
    """Write ``report`` as one HTML page that loads nothing else and runs no script.

    The same report gives the same bytes. Rank 1 is the highest score; among equal scores, the
    image added first comes first.

    Args:
        path: File to write, replaced if it exists; its folder must exist.
        report: What to show; its gallery may be empty.

    Raises:
        ImportError: If matplotlib or Pillow is missing or, with labels, scikit-learn.
    """
    page = _Page(report)
    template = resources.files("pyfeat.anomaly").joinpath("report.html").read_text("utf-8")
    text = Template(template).substitute(
        title=_escape(report.title),
        subtitle=f'<p class="soft">{_escape(report.subtitle)}</p>' if report.subtitle else "",
        body="\n".join(filter(None, page.sections())),
    )
    path.write_text(text, encoding="utf-8", newline="\n")


class _Page:
    """The sections of a page, each as HTML; "" for a section with nothing to show."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.gallery = report.gallery
        self.scores = np.array(self.gallery.scores, dtype=np.float64)  # [N]
        self.labels = np.array(self.gallery.labels, dtype=bool)  # [N], or [0] without labels
        self.ranking = np.argsort(-self.scores, kind="stable")  # [N], highest score first
        self.ranks = np.empty_like(self.ranking)
        self.ranks[self.ranking] = np.arange(1, len(self.scores) + 1)
        self.has_both = bool(self.labels.any() and not self.labels.all())
        self.above = None if report.threshold is None else self.scores > report.threshold  # [N]
        self.scale = self.gallery.scale()
        self.decimals = _decimals(self.scores)

    def sections(self) -> list[str]:
        return [self.figures(), self.plots(), self.pictures(), self.skipped(), self.table()]

    def pictures(self) -> str:
        most = self.gallery.most
        shown = {entry.order for entry in most}
        least = [entry for entry in self.gallery.least if entry.order not in shown]
        parts = [
            self.cards("Most anomalous", "The highest scores, highest first.", most),
            self.cards("Most normal", "The lowest scores, lowest first.", least),
        ]
        if self.has_both:
            good, bad = self.scores[~self.labels].max(), self.scores[self.labels].min()
            missed = [entry for entry in self.gallery.missed if entry.score <= good]
            alarms = [entry for entry in self.gallery.alarms if entry.score >= bad]
            text = "Defective images that score no higher than some good image, lowest first."
            parts.append(self.cards("Defective, but ranked low", text, missed))
            text = "Good images that score no lower than some defective image, highest first."
            parts.append(self.cards("Good, but ranked high", text, alarms))
            if good < bad:
                parts.append("<h2>No image is ranked wrongly</h2>")
                parts.append("<p>Every defective image scores higher than every good one.</p>")
        if self.scale.low < self.scale.high:
            parts.insert(0, _colour_bar(self.scale, self.report.heat_unit))
        return "\n".join(["<section>", *filter(None, parts), "</section>"]) if any(parts) else ""

    def figures(self) -> str:
        report = self.report
        tiles = [_tile(name, value) for name, value in report.facts.items()]
        tiles.append(_tile("Images scored", f"{len(self.scores):,}"))
        if self.above is not None and self.labels.size:
            for name, label in (("Defects found", True), ("False alarms", False)):
                members = self.labels == label
                total = f"of {members.sum():,}"
                tiles.append(_tile(name, f"{(self.above & members).sum():,}", of=total))
        elif self.above is not None:
            tiles.append(_tile("Above the threshold", f"{self.above.sum():,}"))
        if report.skipped:
            tiles.append(_tile("Files skipped", f"{len(report.skipped):,}"))
        if report.threshold is not None or report.threshold_text:
            value = "none" if report.threshold is None else self.number(report.threshold)
            tiles.append(_tile("Threshold", value, note=report.threshold_text))
        return f'<dl class="figures">\n{"".join(tiles)}</dl>'

    def plots(self) -> str:
        figures = []
        if self.scores.size:
            threshold = self.report.threshold
            drawn = histogram(self.scores, self.labels, threshold, self.number)
            figures.append(("Scores", drawn))
        if self.has_both:
            figures.append(("ROC curve", roc(self.scores, self.labels, self.above)))
        if self.report.seconds:
            figures.append(("Time", _stages(self.report.seconds)))
        parts = [
            f"<figure><figcaption>{name}</figcaption>{plot}</figure>" for name, plot in figures
        ]
        return f'<div class="plots">{"".join(parts)}</div>' if parts else ""

    def cards(self, title: str, text: str, entries: list[Entry]) -> str:
        if not entries:
            return ""
        figures = "\n".join(self.card(entry) for entry in entries)
        return (
            f'<h2>{title}</h2>\n<p class="soft">{text}</p>\n<div class="cards">\n{figures}\n</div>'
        )

    def card(self, entry: Entry) -> str:
        width, height = entry.size
        name = _escape(_shorten(entry.name))
        data = {
            "Picture": entry.jpeg,
            "Height of": entry.height,
            "Heat map of": overlay(entry, self.scale),
            "Mask of": entry.mask,
        }
        pictures = [
            f'<img width="{width}" height="{height}" alt="{kind} {name}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
            for kind, jpeg in data.items()
            if jpeg is not None
        ]
        shape = "pair stacked" if width >= 2 * height else "pair"
        if len(pictures) > 2:
            shape = f"row of{len(pictures)}"
        wide = ' class="wide"' if len(pictures) > 2 else ""
        rank = f"rank {self.ranks[entry.order]:,} of {len(self.scores):,}"
        return (
            f'<figure{wide}><div class="{shape}">{"".join(pictures)}</div><figcaption>'
            f"{_name(entry.name)}"
            f'<div class="line"><span class="number"><b>{self.number(entry.score)}</b></span>'
            f'<span class="number soft">{rank}</span>{self.tags(entry.order)}</div>'
            f"{_places(entry.regions)}"
            f"</figcaption></figure>"
        )

    def tags(self, order: int) -> str:
        """Truth of an image, and its verdict where there is no truth or the two disagree."""
        above = None if self.above is None else bool(self.above[order])
        if not self.labels.size:
            return "" if above is None else _tag("anomalous" if above else "normal", bad=above)
        bad = bool(self.labels[order])
        truth = _tag("defective" if bad else "good", bad=bad)
        if above is None or above == bad:
            return truth
        return truth + _tag("false alarm" if above else "missed", bad=True)

    def table(self) -> str:
        if not self.scores.size:
            return ""
        total = len(self.scores)
        text = "All images, most anomalous first."
        if total > _MAX_ROWS:
            text = f"The first {_MAX_ROWS} of {total:,} images, most anomalous first."
            if self.report.csv_name:
                text += f" {_escape(self.report.csv_name)} has all of them."
        judged = self.labels.size or self.above is not None
        rows = [
            f'<tr><td class="number rank soft">{rank:,}</td>'
            f"<td>{_name(self.gallery.names[order])}</td>"
            f'<td class="number">{self.number(self.scores[order])}</td>'
            + (f"<td>{self.tags(order)}</td></tr>" if judged else "</tr>")
            for rank, order in enumerate(self.ranking[:_MAX_ROWS].tolist(), 1)
        ]
        head = '<th class="number rank">Rank</th><th>Image</th><th class="number">Score</th>'
        head += f"<th>{'Truth' if self.labels.size else 'Verdict'}</th>" if judged else ""
        return _table("Ranking", text, head, rows)

    def skipped(self) -> str:
        skipped = self.report.skipped
        if not skipped:
            return ""
        text = "These files have no score."
        if len(skipped) > _MAX_ROWS:
            text = f"The first {_MAX_ROWS} of {len(skipped):,} files without a score."
        rows = [
            f"<tr><td>{_name(name)}</td><td>{_escape(reason)}</td></tr>"
            for name, reason in skipped[:_MAX_ROWS]
        ]
        return _table("Skipped files", text, "<th>File</th><th>Reason</th>", rows)

    def number(self, value: float) -> str:
        if self.decimals is None or not math.isfinite(value):
            return f"{value:.4g}".replace("inf", "∞")
        return f"{value:.{self.decimals}f}"


def _stages(seconds: Mapping[str, float]) -> str:
    longest = max(*seconds.values(), 1e-9)
    rows = [
        f'<dt>{_escape(stage)}</dt><dd class="bar"><i style="width:{100 * value / longest:.1f}%">'
        f'</i></dd><dd class="number">{value:,.1f} s</dd>'
        for stage, value in seconds.items()
    ]
    return (
        f'<dl class="stages">{"".join(rows)}<dt><b>Total</b></dt><dd></dd>'
        f'<dd class="number"><b>{sum(seconds.values()):,.1f} s</b></dd></dl>'
    )


def _places(regions: Sequence[Region]) -> str:
    """How many regions stand out, and where the hottest one is."""
    if not regions:
        return ""
    count = f"{len(regions):,} regions, the hottest" if len(regions) > 1 else "One region,"
    box, area = regions[0].box, regions[0].area
    place = f"rows {box.top}\u2013{box.bottom}, columns {box.left}\u2013{box.right}"
    return f'<div class="soft">{count} of {area:,.0f} px at {place}</div>'


def _colour_bar(scale: HeatScale, unit: str) -> str:
    """The scale over mid-grey, from transparent at the low end."""
    stops = []
    for red, green, blue, opacity in scale.colours(np.linspace(scale.low, scale.high, 17)):
        levels = ",".join(f"{255 * level:.0f}" for level in (red, green, blue))
        stops.append(f"rgba({levels},{opacity:.3f})")
    return (
        f'<div class="scale"><span>{_escape(unit[:1].upper() + unit[1:])}</span>'
        f'<span class="bar"><span class="number">\u2264 {scale.low:.3g}</span>'
        f'<i style="background:linear-gradient(to right,{",".join(stops)}),#808080"></i>'
        f'<span class="number">\u2265 {scale.high:.3g}</span></span>'
        '<span class="soft">one scale for all pictures</span></div>'
    )


def _table(title: str, text: str, head: str, rows: list[str]) -> str:
    body = "\n".join(rows)
    return (
        f'<section><h2>{title}</h2>\n<p class="soft">{text}</p>\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></section>"
    )


def _tile(name: str, value: str, *, of: str = "", note: str = "") -> str:
    kind = ' class="wide"' if note else ""
    total = f" <small>{of}</small>" if of else ""
    below = f'<dd class="note">{_escape(note)}</dd>' if note else ""
    return f"<div{kind}><dt>{_escape(name)}</dt><dd>{_escape(value)}{total}</dd>{below}</div>\n"


def _tag(text: str, *, bad: bool) -> str:
    return f'<span class="tag {"bad" if bad else "good"}">{text}</span>'


def _name(name: str) -> str:
    return f'<div class="name" title="{_escape(name)}">{_escape(_shorten(name))}</div>'


def _shorten(name: str) -> str:
    """Drop the middle of a long path: its start and the file name tell more."""
    if len(name) <= _MAX_NAME:
        return name
    head = _MAX_NAME // 3
    return f"{name[:head]}\u2026{name[head + 1 - _MAX_NAME :]}"


def _escape(text: str) -> str:
    """Escape for text and attributes; what UTF-8 or HTML cannot hold becomes U+FFFD."""
    legal = (c if unicodedata.category(c) not in {"Cc", "Cs"} else "\ufffd" for c in text)
    return html.escape("".join(legal))


def _decimals(scores: NDArray[np.float64]) -> int | None:
    """Decimals that tell ``scores`` apart, about four digits of their range; None: use %g."""
    if not scores.size or not scores.any():
        return 3
    spread = float(np.ptp(scores)) or float(np.abs(scores).max())
    decimals = max(0, 3 - math.floor(math.log10(spread)))
    return decimals if decimals <= 9 and float(np.abs(scores).max()) < 1e9 else None
