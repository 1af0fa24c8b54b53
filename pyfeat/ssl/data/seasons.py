"""Places seen at several dates, drawn by the seasons of their own vegetation."""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch

from pyfeat.ssl.data.images import check_formats, read_pixels, read_table
from pyfeat.ssl.data.source import OP, Sample, Source, label_codes
from pyfeat.ssl.options import AT_LEAST_ONE, Range
from pyfeat.ssl.registry import SOURCES

YEAR_DAYS = 365.25
SEASONS = ("spring", "summer", "autumn", "winter")


@dataclass(frozen=True)
class SeasonOptions:
    """Images of places at dates."""

    path: Annotated[
        str,
        "CSV file with the columns place, day (of the year, 1 to 366) and image (path, relative to "
        "the file), and maybe label.",
    ]
    phenology: Annotated[
        str | None,
        "CSV file with the columns place, greenup, maturity, senescence, dormancy: days of the year "
        "between which the seasons of a place lie; null takes the quarters of the calendar.",
    ] = None
    size: Annotated[tuple[int, int], "Height and width to resize to.", AT_LEAST_ONE] = (64, 64)
    views: Annotated[int, "Dates drawn of a place, of different seasons.", Range(low=1, high=4)] = 3


class Phenology(NamedTuple):
    """Days of the year on which the seasons of a place begin, in the order of ``SEASONS``."""

    greenup: float
    maturity: float
    senescence: float
    dormancy: float

    def season(self, day: float) -> int:
        """Return the season of a day, as its index in ``SEASONS``.

        Examples:
            >>> [CALENDAR.season(day) for day in (1, 100, 200, 300)]
            [3, 0, 1, 2]
            >>> Phenology(250, 300, 50, 100).season(20)  # south of the equator: summer
            1
        """
        return min(range(4), key=lambda season: (day - self[season]) % YEAR_DAYS)

    def from_middle(self, day: float) -> float:
        """Return the days between a day and the middle of its season."""
        season = self.season(day)
        length = (self[(season + 1) % 4] - self[season]) % YEAR_DAYS
        return abs((day - self[season]) % YEAR_DAYS - length / 2)


CALENDAR = Phenology(60, 152, 244, 335)  # March, June, September, December


class _Place(NamedTuple):
    name: str
    label: str | None
    seasons: tuple[tuple[float, str], ...]  # the day and file nearest to the middle of each season


@SOURCES.register("seasons", SeasonOptions)
class SeasonSource(Source):
    """Places as ``images`` (V, C, H, W) float32 in [0, 1], ``days`` (V,) and ``seasons`` (V,) int64.

    Of each season of a place the date nearest to its middle is kept. V of them are drawn without
    repetition and in random order. Places with fewer seasons than V are left out.

    Args:
        options: As a configuration has them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If no place has V seasons, or a day is none.

    Source: Plekhanova et al., SSL4Eco, CVPR workshops 2025, arXiv:2504.18256.
    """

    def __init__(self, options: SeasonOptions) -> None:
        self._options = options
        path = Path(options.path)
        self._phenology = _read_phenology(options.phenology)
        places = self._read_places(path)
        self._places = [place for place in places if len(place.seasons) >= options.views]
        if not self._places:
            message = (
                f"{OP}: data.path must hold places with {options.views} seasons, got {len(places)} "
                f"places with fewer in {path}"
            )
            raise ValueError(message)
        check_formats([file for place in self._places for _, file in place.seasons])
        self.sample_shape = (3, *options.size)
        if any(place.label is not None for place in self._places):
            self.labels = label_codes([place.label for place in self._places])

    def __len__(self) -> int:
        """Return N, the number of places."""
        return len(self._places)

    def read(self, index: int, generator: torch.Generator) -> Sample:
        """Return one place."""
        place = self._places[index]
        order = torch.randperm(len(place.seasons), generator=generator)[: self._options.views]
        drawn = [place.seasons[i] for i in order.tolist()]
        images = [read_pixels(file, self._options.size, file) for _, file in drawn]
        days = [day for day, _ in drawn]
        phenology = self._phenology.get(place.name, CALENDAR)
        return {
            "images": torch.stack(images),
            "days": torch.tensor(days),
            "seasons": torch.tensor([phenology.season(day) for day in days]),
        }

    def name(self, index: int) -> str:
        """Return the name of a place."""
        return self._places[index].name

    def _read_places(self, path: Path) -> list[_Place]:
        rows = defaultdict(list)
        labels: dict[str, str | None] = {}
        for row in read_table(path, ("place", "day", "image")):
            day = _day(row["day"], path)
            rows[row["place"]].append((day, str(path.parent / row["image"])))
            labels[row["place"]] = row.get("label") or labels.get(row["place"])
        missing = set(rows) - set(self._phenology)
        if self._phenology and missing:
            shown = ", ".join(sorted(missing)[:5])
            message = f"{OP}: data.phenology must have every place, got none for {shown}"
            raise ValueError(message)
        return [_Place(name, labels[name], self._best(name, dates)) for name, dates in rows.items()]

    def _best(self, name: str, dates: list[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
        phenology = self._phenology.get(name, CALENDAR)
        best: dict[int, tuple[float, str]] = {}
        for day, file in sorted(dates, key=lambda date: (phenology.from_middle(date[0]), date)):
            best.setdefault(phenology.season(day), (day, file))
        return tuple(best[season] for season in sorted(best))


def _read_phenology(path: str | None) -> dict[str, Phenology]:
    if path is None:
        return {}
    rows = read_table(Path(path), ("place", *Phenology._fields))
    return {
        row["place"]: Phenology(*(_day(row[field], Path(path)) for field in Phenology._fields))
        for row in rows
    }


def _day(text: str, path: Path) -> float:
    try:
        day = float(text)
    except (TypeError, ValueError):
        day = math.nan
    if not 0 <= day <= 366:
        message = f"{OP}: days must be of the year, 1 to 366, got {text!r} in {path}"
        raise ValueError(message)
    return day
