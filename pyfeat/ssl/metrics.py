"""The figures of a run: one CSV file, and curves of it."""

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from pyfeat._extras import require
from pyfeat._storage import written_aside

METRICS, CURVES = "metrics.csv", "curves.png"
_COLUMNS = ("step", "epoch", "name", "value")
_GROUPS = ("loss", "probe", "retrieval", "collapse", "lr")


class MetricsFile:
    """Rows of step, epoch, name and value; written to the file when asked.

    Args:
        folder: Of the run.
        until: Rows after this step are dropped: a run that goes on writes them again.
    """

    def __init__(self, folder: Path, *, until: int = 0) -> None:
        self._folder = folder
        self._rows = [row for row in read_metrics(folder) if row[0] <= until]

    def add(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Add a row for each value."""
        self._rows += [(step, epoch, name, value) for name, value in values.items()]

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with written_aside(self._folder / METRICS) as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows((s, f"{e:.6g}", n, repr(v)) for s, e, n, v in self._rows)

    def draw(self) -> None:
        """Draw curves over epochs, one panel for each kind of them."""
        draw_curves(self._rows, self._folder / CURVES)


def read_metrics(folder: Path) -> list[tuple[int, float, str, float]]:
    """Return step, epoch, name and value of each row; nothing if there is no file."""
    path = folder / METRICS
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(step), float(epoch), name, float(value)) for step, epoch, name, value in rows]


def draw_curves(rows: list[tuple[int, float, str, float]], path: Path) -> None:
    """Draw a panel for each group of names that has rows."""
    figures = require("matplotlib.figure", extra="train", op="pyfeat train")
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = defaultdict(dict)
    for _, epoch, name, value in rows:
        group = name.partition("/")[0]
        xs, ys = curves[group if group in _GROUPS else "loss"].setdefault(name, ([], []))
        xs.append(epoch)
        ys.append(value)
    shown = [group for group in _GROUPS if group in curves]
    figure = figures.Figure(figsize=(7, 2.6 * max(1, len(shown))), layout="constrained")
    for i, group in enumerate(shown):
        axes = figure.add_subplot(len(shown), 1, i + 1)
        for name, (xs, ys) in curves[group].items():
            axes.plot(xs, ys, marker="." if len(xs) < 30 else None, label=name)
        axes.set_ylabel(group)
        axes.legend(fontsize="small")
        axes.set_xlabel("epoch")
    with written_aside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
