"""The plots of a report as SVG, which take text colour and font from the page."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyfeat._extras import require
from pyfeat.anomaly._values import BoolArray
from pyfeat.anomaly.metrics import roc_curve

Scores = NDArray[np.float64]

_MAX_BINS = 50
# Seen on white and on near-black alike (contrast >= 3), and apart for colour-blind readers.
_GOOD, _BAD = "#2f7fc1", "#d2600c"
_TEXT = "#010203"  # stands for the text colour of the page until the SVG is embedded


def histogram(
    scores: Scores, labels: BoolArray, threshold: float | None, number: Callable[[float], str]
) -> str:
    """Draw how scores (N,), N >= 1, are spread, by class where there are labels (N,), else (0,).

    Args:
        scores: Of all images.
        labels: True is defective.
        threshold: A line; None for none.
        number: Writes a score.
    """
    edges = _edges(scores)
    groups = [("good", ~labels, _GOOD), ("defective", labels, _BAD)]
    if not labels.size:
        groups = [("images", np.ones(scores.shape, dtype=bool), _GOOD)]

    def draw(axes: Any) -> None:
        for name, members, colour in groups:
            count = members.sum()
            heights = np.histogram(scores[members], edges)[0]
            if labels.size:  # as shares, few defects stay visible beside many good images
                heights = 100 * heights / max(count, 1)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, label=f"{name} ({count:,})")
        if threshold is not None:
            label = f"threshold {number(threshold)}"
            position: Sequence[float] = [threshold]
            margin = edges[-1] - edges[0]
            if not edges[0] - margin <= threshold <= edges[-1] + margin:
                # Drawn to scale, it would squeeze the scores into a line.
                label += ", far right" if threshold > edges[0] else ", far left"
                position = []
            height = {"ymin": 0, "ymax": 1, "transform": axes.get_xaxis_transform()}
            axes.vlines(position, color=_TEXT, linestyle=(0, (4, 3)), label=label, **height)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("anomaly score")
        axes.set_ylabel("share of the class (%)" if labels.size else "images")
        axes.yaxis.get_major_locator().set_params(integer=not labels.size)

    return _svg("scores", "Score histogram", draw)


def roc(scores: Scores, labels: BoolArray, above: BoolArray | None) -> str:
    """Draw the ROC curve of scores (N,) with labels (N,) of both kinds.

    Args:
        scores: Of all images.
        labels: True is defective.
        above: (N,) which images are above the threshold, a point on the curve; None for none.
    """
    false_alarms, found, _ = roc_curve(labels, scores)

    def draw(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=_TEXT, linewidth=1, alpha=0.7, linestyle=(0, (1, 3)))
        axes.plot(100 * false_alarms, 100 * found, color=_GOOD, linewidth=2, clip_on=False)
        if above is not None:
            x, y = 100 * above[~labels].mean(), 100 * above[labels].mean()
            label = f"threshold: {y:.3g} % found, {x:.3g} % false alarms"
            axes.plot(x, y, "D", color=_BAD, markersize=7, clip_on=False, label=label)
        axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.set_xlabel("good images flagged (%)")
        axes.set_ylabel("defective images found (%)")

    return _svg("roc", "ROC curve", draw)


def _svg(salt: str, title: str, draw: Callable[[Any], None]) -> str:
    """Draw on fresh axes."""
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


def _edges(scores: Scores) -> Scores:
    """Histogram edges over all of ``scores``, which may all be equal."""
    low, high = float(scores.min()), float(scores.max())
    bins = min(_MAX_BINS, max(10, int(2 * math.sqrt(len(scores)))))
    edges = np.linspace(low, high, bins + 1)
    if not (np.diff(edges) > 0).all():
        margin = 0.1 * max(abs(low), abs(high)) or 1.0
        edges = np.linspace(low - margin, high + margin, bins + 1)
    return edges
