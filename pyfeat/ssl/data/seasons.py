"""Places seen at several dates, drawn by the seasons of their own vegetation."""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch

from pyfeat.ssl.data.images import check_formats, read_pixels, read_table
from pyfeat.ssl.data.phenology import CALENDAR, Phenology, choose_date
from pyfeat.ssl.data.source import OP, Sample, Source, label_codes
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, Range
from pyfeat.ssl.registry import SOURCES


@dataclass(frozen=True)
class SeasonOptions:
    """Images of places at dates."""

    path: Annotated[
        str,
        "CSV file with the columns place, day (of the year, 1 to 366) and image (path, relative to "
        "the file), and maybe label, cloud (share of the image, 0 to 1) and weight (of the place, "
        "against others: how often it is drawn).",
    ]
    phenology: Annotated[
        str | None,
        "CSV file with the columns place, greenup, maturity, senescence, dormancy: days of the year "
        "between which the seasons of a place lie; null takes the quarters of the calendar.",
    ] = None
    size: Annotated[tuple[int, int], "Height and width to resize to.", AT_LEAST_ONE] = (64, 64)
    views: Annotated[int, "Dates drawn of a place, of different seasons.", Range(low=1, high=4)] = 3
    fewest: Annotated[
        int | None,
        "Fewest seasons of a place; where they are fewer than views, the last date is repeated. "
        "null: views.",
        Range(low=1, high=4),
    ] = None
    max_cloud: Annotated[float, "Dates with as much cloud or more are left out.", FRACTION] = 0.2
    window: Annotated[
        float,
        "Days from the middle of a season within which the clearest date is taken.",
        NOT_NEGATIVE,
    ] = 15.0

    def __post_init__(self) -> None:
        if self.fewest is not None and self.fewest > self.views:
            message = f"fewest must be at most views = {self.views}, got {self.fewest}"
            raise ValueError(message)


class _Place(NamedTuple):
    name: str
    label: str | None
    weight: float
    seasons: tuple[tuple[float, str], ...]  # the day and file chosen for each season


@SOURCES.register("seasons", SeasonOptions)
class SeasonSource(Source):
    """Places as ``images`` (V, C, H, W) float32 in [0, 1], ``days`` (V,) and ``seasons`` (V,) int64.

    Of each season of a place one date is kept, by ``choose_date``; dates without a cloud count as
    clear and as equal. V of them are drawn without repetition and in random order. Places with fewer
    seasons than V, or than ``fewest``, are left out.

    Args:
        options: As a configuration has them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If no place has enough seasons, or a day, cloud or weight is none.

    Source: Plekhanova et al., SSL4Eco, CVPR workshops 2025, arXiv:2504.18256.
    """

    def __init__(self, options: SeasonOptions) -> None:
        self._options = options
        path = Path(options.path)
        self._phenology = _read_phenology(options.phenology)
        places = self._read_places(path)
        fewest = options.views if options.fewest is None else options.fewest
        self._places = [place for place in places if len(place.seasons) >= fewest]
        if not self._places:
            message = (
                f"{OP}: data.path must hold places with {fewest} seasons, got {len(places)} "
                f"places with fewer in {path}"
            )
            raise ValueError(message)
        check_formats([file for place in self._places for _, file in place.seasons])
        self.sample_shape = (3, *options.size)
        if any(place.label is not None for place in self._places):
            self.labels = label_codes([place.label for place in self._places])
        weights = [place.weight for place in self._places]
        if len(set(weights)) > 1:
            self.weights = torch.tensor(weights, dtype=torch.float64)

    def __len__(self) -> int:
        """Return N, the number of places."""
        return len(self._places)

    def read(self, index: int, generator: torch.Generator) -> Sample:
        """Return one place."""
        place = self._places[index]
        order = torch.randperm(len(place.seasons), generator=generator)[: self._options.views]
        drawn = [place.seasons[i] for i in order.tolist()]
        drawn += drawn[-1:] * (self._options.views - len(drawn))
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
        weights: dict[str, float] = {}
        for row in read_table(path, ("place", "day", "image")):
            name, cloud = row["place"], _number(row.get("cloud") or "0", path, "cloud", 1)
            rows[name].append((_number(row["day"], path, "day", 366), cloud, row["image"]))
            labels[name] = row.get("label") or labels.get(name)
            weight = _number(row.get("weight") or "1", path, "weight", math.inf)
            if weights.setdefault(name, weight) != weight or weight == 0:
                message = (
                    f"{OP}: weight must be one positive number a place, got {weight} for {name} "
                    f"in {path}"
                )
                raise ValueError(message)
        missing = set(rows) - set(self._phenology)
        if self._phenology and missing:
            shown = ", ".join(sorted(missing)[:5])
            message = f"{OP}: data.phenology must have every place, got none for {shown}"
            raise ValueError(message)
        return [
            _Place(name, labels[name], weights[name], self._chosen(name, dates, path.parent))
            for name, dates in rows.items()
        ]

    def _chosen(
        self, name: str, dates: list[tuple[float, float, str]], folder: Path
    ) -> tuple[tuple[float, str], ...]:
        phenology = self._phenology.get(name, CALENDAR)
        dates = sorted(dates)
        days, clouds, files = zip(*dates, strict=True)
        options = {"max_cloud": self._options.max_cloud, "window": self._options.window}
        if len(set(clouds)) == 1:  # nothing tells near dates apart but the middle
            options["window"] = 0.0
        chosen = (choose_date(days, clouds, season, phenology, **options) for season in range(4))
        return tuple((days[i], str(folder / files[i])) for i in chosen if i is not None)


def _read_phenology(path: str | None) -> dict[str, Phenology]:
    if path is None:
        return {}
    rows = read_table(Path(path), ("place", *Phenology._fields))
    return {
        row["place"]: Phenology(
            *(_number(row[field], Path(path), "day", 366) for field in Phenology._fields)
        )
        for row in rows
    }


def _number(text: str, path: Path, name: str, highest: float) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= highest or number == math.inf:
        most = f"of the year, 1 to {highest}" if name == "day" else f"in [0, {highest}]"
        message = f"{OP}: {name} must be {most}, got {text!r} in {path}"
        raise ValueError(message)
    return number
