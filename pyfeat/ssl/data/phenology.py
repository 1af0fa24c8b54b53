"""The seasons of a place, found in a year's curve of its vegetation, and what follows from them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyfeat.search import knn

YEAR_DAYS = 365.25
SEASONS = ("spring", "summer", "autumn", "winter")

Array = npt.NDArray[np.float64]


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


def find_seasons(curve: npt.ArrayLike, *, min_amplitude: float = 0.1) -> Phenology | None:
    """Find where a vegetation index crosses 15 % and 90 % of its rise and of its fall.

    The samples are evenly spaced over one year, the first at its beginning, and the year is taken for
    periodic, so that a cycle may span new year, as it does south of the equator. A cycle lies between
    two dips; a dip ends one if the curve falls and rises by a third of its whole range around it. Of
    several cycles the one of largest amplitude counts, of equal ones the first. Greenup and maturity
    are the first crossings of 15 % and 90 % of the rise, senescence and dormancy the last crossings of
    90 % and 15 % of the fall, between samples on a straight line. Noise moves first and last
    crossings outwards: smooth a noisy curve before.

    Args:
        curve: (T,), T >= 4, finite, such as EVI.
        min_amplitude: > 0, of rise and fall, below which a curve is flat.

    Returns:
        Days in [0, 365.25), counted from the first sample; None of a flat curve.

    Raises:
        ValueError: If the curve has another shape or is not finite, or the amplitude not positive.

    Source: Plekhanova et al., SSL4Eco, CVPR workshops 2025, arXiv:2504.18256; cycles and their dips are
    ours.

    Examples:
        >>> days = np.arange(73) * 5.0
        >>> found = find_seasons(0.4 - 0.3 * np.cos(2 * np.pi * days / 365.25))
        >>> [round(day) for day in found]
        [46, 145, 220, 319]
    """
    op = "find_seasons"
    values = np.asarray(curve, dtype=np.float64)
    if values.ndim != 1 or len(values) < 4 or not np.isfinite(values).all():
        message = f"{op}: curve must be at least 4 finite values, got {values.dtype} {values.shape}"
        raise ValueError(message)
    if not min_amplitude > 0:
        message = f"{op}: min_amplitude must be positive, got {min_amplitude}"
        raise ValueError(message)
    start = int(values.argmin())
    turned = np.append(np.roll(values, -start), values[start])  # from the lowest dip to itself
    cycles = _cycles(turned, np.ptp(values) / 3)
    amplitudes = [turned[peak] - max(turned[low], turned[end]) for low, peak, end in cycles]
    best = int(np.argmax(amplitudes))
    if amplitudes[best] < min_amplitude:
        return None
    low, peak, end = cycles[best]
    rise, fall = turned[low : peak + 1], turned[peak : end + 1]
    places = [
        *(low + _first_crossing(rise, share) for share in (0.15, 0.9)),
        *(end - _first_crossing(fall[::-1], share) for share in (0.9, 0.15)),
    ]
    # Rounded, so that what is a year by the arithmetic is not a day of it.
    step = YEAR_DAYS / len(values)
    return Phenology(*(round(step * (start + place), 9) % YEAR_DAYS for place in places))


def _cycles(turned: Array, depth: float) -> list[tuple[int, int, int]]:
    """Dip, peak and dip of each cycle, of a curve that begins and ends with its lowest value."""
    cycles = []
    low, peak, dip = 0, 0, 0
    for i, value in enumerate(turned):
        if value > turned[peak] and dip == peak:
            peak = dip = i
        elif value < turned[dip]:
            dip = i
        elif turned[peak] - turned[dip] >= depth and value - turned[dip] >= depth:
            cycles.append((low, peak, dip))
            low, peak, dip = dip, i, i
        elif value > turned[peak]:  # what lay between was no dip
            peak = dip = i
    return [*cycles, (low, peak, len(turned) - 1)]


def _first_crossing(rise: Array, share: float) -> float:
    """Where a curve that ends above its beginning first reaches a share of that rise."""
    level = rise[0] + share * (rise[-1] - rise[0])
    above = int(np.argmax(rise >= level))
    before, after = rise[above - 1], rise[above]
    return float(above - 1 + (level - before) / (after - before))


def median_seasons(years: Sequence[Phenology | None]) -> Phenology | None:
    """Return the median of each day over years; days on both sides of new year are near each other.

    Args:
        years: Of one place; None where a year has no seasons.

    Returns:
        None if no year has seasons.

    Examples:
        >>> median_seasons(
        ...     [
        ...         Phenology(364, 80, 200, 300),
        ...         None,
        ...         Phenology(3, 90, 210, 310),
        ...         Phenology(1, 85, 190, 290),
        ...     ]
        ... )
        Phenology(greenup=1.0, maturity=85.0, senescence=200.0, dormancy=300.0)
    """
    found = np.array([year for year in years if year is not None], dtype=np.float64)
    if not len(found):
        return None
    # The year's days as angles; their mean is where the circle is cut open, on its other side.
    mean = np.angle(np.exp(2j * np.pi * found / YEAR_DAYS).mean(axis=0)) * YEAR_DAYS / (2 * np.pi)
    apart = (found - mean + YEAR_DAYS / 2) % YEAR_DAYS - YEAR_DAYS / 2
    days = np.round(mean + np.median(apart, axis=0), 9) % YEAR_DAYS
    return Phenology(*days.tolist())


def nearest_seasons(
    places: Sequence[Phenology | None], latitudes: npt.ArrayLike, longitudes: npt.ArrayLike
) -> list[Phenology]:
    """Give places without seasons those of the nearest place that has some.

    Args:
        places: N places.
        latitudes: (N,) degrees in [-90, 90].
        longitudes: (N,) degrees.

    Raises:
        ValueError: If shapes disagree, a coordinate is out of range or not finite, or no place has
            seasons.

    Examples:
        >>> nearest_seasons([CALENDAR, None], [50, 51], [179, -179])[1] == CALENDAR
        True
    """
    op = "nearest_seasons"
    latitude, longitude = (np.radians(np.asarray(x, np.float64)) for x in (latitudes, longitudes))
    if latitude.shape != (len(places),) or longitude.shape != (len(places),):
        got = f"{latitude.shape} and {longitude.shape}"
        message = f"{op}: coordinates must have shape ({len(places)},), got {got}"
        raise ValueError(message)
    if not (np.isfinite(longitude).all() and (np.abs(latitude) <= math.pi / 2).all()):
        message = f"{op}: coordinates must be finite, latitudes in [-90, 90], got others"
        raise ValueError(message)
    known = np.array([place is not None for place in places], dtype=bool)
    if not known.any():
        message = f"{op}: places must have one with seasons, got none of {len(places)}"
        raise ValueError(message)
    flat = np.cos(latitude)
    points = np.stack(
        [flat * np.cos(longitude), flat * np.sin(longitude), np.sin(latitude)], axis=1
    )  # on the unit sphere, where the nearest by chord is the nearest by arc
    indices = np.flatnonzero(known)
    found = indices[knn(points, points[known]).indices[:, 0]]
    nearest = [places[i] for i in found]
    return [own or other for own, other in zip(places, nearest, strict=True)]


def choose_date(
    days: Sequence[float],
    clouds: Sequence[float],
    season: int,
    phenology: Phenology,
    *,
    max_cloud: float = 0.2,
    window: float = 15.0,
) -> int | None:
    """Choose a date for a season: near its middle the clearest, else the one nearest to it.

    Args:
        days: Of the year, years pooled.
        clouds: Of the same dates, shares in [0, 1] that clouds cover.
        season: Index in ``SEASONS``.
        phenology: Of the place.
        max_cloud: Dates with as much or more are not taken.
        window: Days from the middle of the season within which the clearest is taken.

    Returns:
        Index of the date, None if there is none in the season.

    Examples:
        >>> choose_date([100, 110, 112, 140], [0.1, 0.05, 0.3, 0.0], 0, CALENDAR)
        1
    """
    usable = [
        (phenology.from_middle(day), cloud, i)
        for i, (day, cloud) in enumerate(zip(days, clouds, strict=True))
        if cloud < max_cloud and phenology.season(day) == season
    ]
    near = [(cloud, apart, i) for apart, cloud, i in usable if apart <= window]
    if near:
        return min(near)[-1]
    return min(usable)[-1] if usable else None


def place_weights(vegetated: npt.ArrayLike, mountain: npt.ArrayLike) -> Array:
    """Return how often places are drawn, against each other: a quarter if bare, twice in mountains.

    A place is bare if its mean NDVI is below 0.1 in all seasons. A bare mountain has a half.

    Args:
        vegetated: (N,) bool.
        mountain: (N,) bool.

    Raises:
        ValueError: If the shapes differ.

    Source: Plekhanova et al., SSL4Eco, CVPR workshops 2025, arXiv:2504.18256.

    Examples:
        >>> place_weights([True, False, True, False], [False, False, True, True])
        array([1.  , 0.25, 2.  , 0.5 ])
    """
    green, high = np.asarray(vegetated, dtype=bool), np.asarray(mountain, dtype=bool)
    if green.shape != high.shape or green.ndim != 1:
        message = (
            f"place_weights: arguments must have one shape (N,), got {green.shape} and {high.shape}"
        )
        raise ValueError(message)
    return np.where(green, 1.0, 0.25) * np.where(high, 2.0, 1.0)
