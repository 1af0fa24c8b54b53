"""One self-contained page about the scores of a set of images."""

import base64
import html
import io
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfeat._extras import require
from pyfeat.anomaly.gallery import Entry, Gallery, HeatScale, overlay
from pyfeat.anomaly.metrics import roc_curve

_MAX_ROWS = 500  # rows of the ranking, and of the skipped files, that the page shows
_MAX_NAME = 56  # characters of a name shown; the whole name is in the title attribute
_MAX_BINS = 50
# Seen on white and on near-black alike (contrast >= 3), and apart for colour-blind readers.
_GOOD, _BAD = "#2f7fc1", "#d2600c"
_TEXT = "#010203"  # stands for the text colour of the page until the SVG is embedded


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
            figures.append(("Scores", _svg("scores", "Score histogram", self.draw_histogram)))
        if self.has_both:
            figures.append(("ROC curve", _svg("roc", "ROC curve", self.draw_roc)))
        if self.report.seconds:
            figures.append(("Time", _stages(self.report.seconds)))
        parts = [
            f"<figure><figcaption>{name}</figcaption>{plot}</figure>" for name, plot in figures
        ]
        return f'<div class="plots">{"".join(parts)}</div>' if parts else ""

    def draw_histogram(self, axes: Any) -> None:
        edges = _edges(self.scores)
        groups = [("good", ~self.labels, _GOOD), ("defective", self.labels, _BAD)]
        if not self.labels.size:
            groups = [("images", np.ones(self.scores.shape, dtype=bool), _GOOD)]
        for name, members, colour in groups:
            count = members.sum()
            heights = np.histogram(self.scores[members], edges)[0]
            if self.labels.size:  # as shares, few defects stay visible beside many good images
                heights = 100 * heights / max(count, 1)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, label=f"{name} ({count:,})")
        if self.report.threshold is not None:
            label = f"threshold {self.number(self.report.threshold)}"
            position, margin = [self.report.threshold], edges[-1] - edges[0]
            if not edges[0] - margin <= position[0] <= edges[-1] + margin:
                # Drawn to scale, it would squeeze the scores into a line.
                label += ", far right" if position[0] > edges[0] else ", far left"
                position = []
            height = {"ymin": 0, "ymax": 1, "transform": axes.get_xaxis_transform()}
            axes.vlines(position, color=_TEXT, linestyle=(0, (4, 3)), label=label, **height)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("anomaly score")
        axes.set_ylabel("share of the class (%)" if self.labels.size else "images")
        axes.yaxis.get_major_locator().set_params(integer=not self.labels.size)

    def draw_roc(self, axes: Any) -> None:
        false_alarms, found, _ = roc_curve(self.labels, self.scores)
        axes.plot([0, 100], [0, 100], color=_TEXT, linewidth=1, alpha=0.7, linestyle=(0, (1, 3)))
        axes.plot(100 * false_alarms, 100 * found, color=_GOOD, linewidth=2, clip_on=False)
        if self.above is not None:
            x, y = 100 * self.above[~self.labels].mean(), 100 * self.above[self.labels].mean()
            label = f"threshold: {y:.3g} % found, {x:.3g} % false alarms"
            axes.plot(x, y, "D", color=_BAD, markersize=7, clip_on=False, label=label)
        axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.set_xlabel("good images flagged (%)")
        axes.set_ylabel("defective images found (%)")

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
        data = {"Picture": entry.jpeg, "Heat map of": overlay(entry, self.scale)}
        pictures = [
            f'<img width="{width}" height="{height}" alt="{kind} {name}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
            for kind, jpeg in data.items()
        ]
        shape = "pair stacked" if width >= 2 * height else "pair"
        rank = f"rank {self.ranks[entry.order]:,} of {len(self.scores):,}"
        return (
            f'<figure><div class="{shape}">{"".join(pictures)}</div><figcaption>'
            f"{_name(entry.name)}"
            f'<div class="line"><span class="number"><b>{self.number(entry.score)}</b></span>'
            f'<span class="number soft">{rank}</span>{self.tags(entry.order)}</div>'
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


def _svg(salt: str, title: str, draw: Callable[[Any], None]) -> str:
    """Draw on fresh axes; the SVG takes its text colour and font from the page."""
    style = require("matplotlib.style", extra="anomaly", op="write_report")
    figures = require("matplotlib.figure", extra="anomaly", op="write_report")
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options = dict.fromkeys(colours, _TEXT) | {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 12,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    text = io.StringIO()
    with style.context(["default", options]):
        figure = figures.Figure(figsize=(5.6, 3.7), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        unstamped = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=unstamped)
    drawing = text.getvalue().partition("<svg ")[2].replace(_TEXT, "currentColor")
    drawing = f'<svg role="img" aria-label="{title}" {drawing}'
    # Identifiers are unique in a page, and matplotlib numbers them from 1 in each drawing.
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{salt}-", drawing)


def _edges(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Histogram edges over all of ``scores``, which may all be equal."""
    low, high = float(scores.min()), float(scores.max())
    bins = min(_MAX_BINS, max(10, int(2 * math.sqrt(len(scores)))))
    edges = np.linspace(low, high, bins + 1)
    if not (np.diff(edges) > 0).all():
        margin = 0.1 * max(abs(low), abs(high)) or 1.0
        edges = np.linspace(low - margin, high + margin, bins + 1)
    return edges


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
