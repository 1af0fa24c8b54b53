"""Plots of the races that lie on an axis: one line for each contender."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.records import Record, Timed
from benchmarks.report import figure_name, grouped

# Okabe and Ito's colours, which the colour-blind tell apart; markers tell them apart in print.
OURS = (("#0072B2", "o", "-"), ("#0072B2", "o", "--"))
PEERS = (("#D55E00", "s", "-"), ("#009E73", "^", "-"), ("#CC79A7", "D", "-"), ("#000000", "v", "-"))
LABEL_DISTANCE = 0.055  # of the height of the axes, between two labels


def write_plots(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Write ``<family>_<figure>.png`` for every figure; returns the file names by figure."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    on_axis = [record for record in records if record.point]
    for name, cases in grouped(on_axis, figure_name).items():
        path = folder / f"{name}.png"
        _figure(cases).savefig(path, dpi=130, metadata={"Software": None})
        names[name] = path.name
    return names


def _figure(cases: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, Timed]]] = {}
    for case in cases:
        for timed in case.contenders:
            lines.setdefault(timed.name, []).append((case.point.value if case.point else 0, timed))
    ours, peers = cycle(OURS), cycle(PEERS)
    ends = []
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        x = [value for value, _ in points]
        medians = [timed.summary.median for _, timed in points]
        low, high = zip(*(timed.summary.quartiles for _, timed in points), strict=True)
        is_ours = points[0][1].ours
        color, marker, style = next(ours if is_ours else peers)
        width = 2.2 if is_ours else 1.4
        axes.plot(x, medians, style, color=color, marker=marker, markersize=4, linewidth=width)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        ends.append((medians[-1], name, color, "bold" if is_ours else "normal"))
    _style(axes, cases)
    _label(axes, ends)
    return figure


def _style(axes: Axes, cases: Sequence[Record]) -> None:
    point = cases[0].point
    values = sorted({case.point.value for case in cases if case.point})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{value:,.0f}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _plain_seconds(y)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(point.axis if point else "")
    subtitle = cases[0].text.splitlines()[0] if cases[0].text else ""
    axes.set_title(cases[0].section, loc="left", fontweight="bold", fontsize=11, pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(which="major", color="#DDDDDD", linewidth=0.7)
    axes.tick_params(labelsize=9)
    axes.minorticks_off()


def _label(axes: Axes, ends: Sequence[tuple[float, str, str, str]]) -> None:
    """Names beside the ends of the lines, pushed apart where they would lie on each other."""
    ends = sorted(ends)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((axes.get_xlim()[0], y))[1]) for y, *_ in ends]
    for (_, name, color, weight), height in zip(ends, spread_out(wanted), strict=True):
        axes.annotate(
            name,
            (1.01, height),
            xycoords="axes fraction",
            color=color,
            fontsize=9,
            fontweight=weight,
            verticalalignment="center",
            annotation_clip=False,
        )


def spread_out(heights: Sequence[float]) -> list[float]:
    """Ascending heights, moved as little as possible to lie ``LABEL_DISTANCE`` apart."""
    blocks: list[list[float]] = []  # each of heights that lie as near as they may, by offsets
    for i, height in enumerate(heights):
        blocks.append([height - i * LABEL_DISTANCE])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    offsets = [_mean(block) for block in blocks for _ in block]
    return [offset + i * LABEL_DISTANCE for i, offset in enumerate(offsets)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain_seconds(seconds: float) -> str:
    """A tick, in the unit that keeps it short."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale * 0.999:
            return f"{seconds / scale:g} {unit}"
    return f"{seconds:g} s"
