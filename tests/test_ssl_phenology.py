"""Seasons of places: found in curves, filled in, dates chosen by them, and places drawn by weight."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pyfeat.ssl.data.phenology import (
    CALENDAR,
    YEAR_DAYS,
    Array,
    Phenology,
    choose_date,
    find_seasons,
    median_seasons,
    nearest_seasons,
    place_weights,
)
from pyfeat.ssl.data.sampler import StepSampler
from pyfeat.ssl.data.seasons import SeasonOptions, SeasonSource
from tests.test_ssl_data import _draw, _image, _table

T = 46  # samples, 8 days apart
STEP = YEAR_DAYS / T


def trapezoid(known: Phenology, amplitude: float = 0.5, base: float = 0.1) -> Array:
    """A curve that crosses 15 % and 90 % on known days, and is straight where it rises and falls."""
    rise = (known.maturity - known.greenup) % YEAR_DAYS / 0.75
    fall = (known.dormancy - known.senescence) % YEAR_DAYS / 0.75
    start = known.greenup - 0.15 * rise
    end = (known.dormancy - start) % YEAR_DAYS + 0.15 * fall
    days = (np.arange(T) * STEP - start) % YEAR_DAYS
    shape = np.minimum(np.clip(days / rise, 0, 1), np.clip((end - days) / fall, 0, 1))
    curve: Array = base + amplitude * shape
    return curve


def circular(a: float, b: float) -> float:
    return abs((a - b + YEAR_DAYS / 2) % YEAR_DAYS - YEAR_DAYS / 2)


def test_seasons_are_found_to_a_sample_whatever_the_phase_and_length() -> None:
    rng = np.random.default_rng(0)
    for phase in np.arange(0, 365, 7.3):  # the southern hemisphere and all between
        lengths = rng.uniform(30, 75, 3)
        known = Phenology(*((phase + np.concatenate([[0], np.cumsum(lengths)])) % YEAR_DAYS))
        found = find_seasons(trapezoid(known, amplitude=rng.uniform(0.15, 0.8)))
        assert found is not None
        for name, day, truth in zip(Phenology._fields, found, known, strict=True):
            assert 0 <= day < YEAR_DAYS
            assert circular(day, truth) < STEP, (phase, name)


def test_flat_and_bare_places_have_no_seasons() -> None:
    rng = np.random.default_rng(0)
    assert find_seasons(np.full(T, 0.3)) is None
    assert find_seasons(0.05 + 0.04 * rng.random(T)) is None
    curve = trapezoid(CALENDAR, amplitude=0.09)
    assert find_seasons(curve) is None
    assert find_seasons(curve, min_amplitude=0.08) is not None


def test_the_largest_of_several_cycles_counts_and_small_dips_are_none() -> None:
    large = Phenology(200, 230, 260, 290)
    small = Phenology(40, 60, 90, 110)
    both = np.maximum(trapezoid(large, 0.6), trapezoid(small, 0.4))
    found = find_seasons(both)
    assert found is not None
    assert all(circular(day, truth) < STEP for day, truth in zip(found, large, strict=True))
    turned = find_seasons(np.roll(both, 20))  # the large one spans new year
    assert turned is not None
    for day, truth in zip(turned, large, strict=True):
        assert circular(day, truth + 20 * STEP) < STEP
    dipped = trapezoid(CALENDAR, 0.6)
    dipped[int(200 / STEP)] -= 0.1  # of a range of 0.6: clouds in one summer
    whole = find_seasons(dipped)
    assert whole is not None
    assert all(circular(day, truth) < STEP for day, truth in zip(whole, CALENDAR, strict=True))


@pytest.mark.parametrize(
    ("curve", "error"),
    [
        ([0.1, 0.2, 0.3], r"curve must be at least 4 finite values, got float64 \(3,\)"),
        ([0.1, 0.2, np.nan, 0.3], "at least 4 finite values"),
        ([[0.1, 0.2], [0.3, 0.4]], r"got float64 \(2, 2\)"),
    ],
)
def test_what_is_no_curve_is_refused(curve: list[float], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        find_seasons(curve)
    with pytest.raises(ValueError, match="min_amplitude must be positive, got 0"):
        find_seasons(np.zeros(9), min_amplitude=0.0)


def test_the_median_of_years_goes_round_new_year() -> None:
    years = [Phenology(d % YEAR_DAYS, 100, 200, 300 + d) for d in (-9.0, -2.0, 0.0, 4.0, 30.0)]
    found = median_seasons([*years, None])
    assert found is not None
    assert circular(found.greenup, 0.0) < 1e-6
    assert found[1:] == pytest.approx((100, 200, 300))
    assert median_seasons([None, None]) is None


def test_a_place_without_seasons_takes_the_nearest_on_the_globe() -> None:
    north, south = CALENDAR, Phenology(244, 335, 60, 152)
    places = [north, None, south, None, None]
    latitudes, longitudes = [60, 58, -30, -25, 89], [179.5, -179.5, 20, 21, -1]
    assert nearest_seasons(places, latitudes, longitudes) == [north, north, south, south, north]
    with pytest.raises(ValueError, match="places must have one with seasons, got none of 1"):
        nearest_seasons([None], [0], [0])
    with pytest.raises(ValueError, match=r"must have shape \(2,\), got \(1,\) and \(2,\)"):
        nearest_seasons([north, None], [0], [0, 1])
    with pytest.raises(ValueError, match=r"latitudes in \[-90, 90\]"):
        nearest_seasons([north, None], [0, 91], [0, 1])


def test_a_date_is_clear_and_near_the_middle_of_its_season() -> None:
    days, clouds = [95, 100, 112, 130, 140, 200], [0.1, 0.15, 0.19, 0.0, 0.0, 0.0]
    assert choose_date(days, clouds, 0, CALENDAR) == 0  # 106 is the middle: 91 to 121
    assert choose_date(days, clouds, 0, CALENDAR, window=5) == 1  # the nearest: none is near
    assert choose_date(days, clouds, 0, CALENDAR, window=7) == 1
    assert choose_date(days, clouds, 0, CALENDAR, max_cloud=0.1) == 3
    assert choose_date(days, clouds, 0, CALENDAR, max_cloud=0.0) is None
    assert choose_date(days, clouds, 2, CALENDAR) is None


def test_the_middle_of_a_season_that_spans_new_year() -> None:
    assert CALENDAR.season(350) == CALENDAR.season(10) == 3
    assert CALENDAR.from_middle(14.625) < 1
    assert CALENDAR.from_middle(340) > 35


def test_places_are_drawn_by_their_weights() -> None:
    weights = torch.from_numpy(
        place_weights([False, True, True, False], [False, False, True, True])
    )
    assert weights.tolist() == [0.25, 1.0, 2.0, 0.5]
    with pytest.raises(ValueError, match=r"must have one shape \(N,\), got \(2,\) and \(1,\)"):
        place_weights([True, False], [True])
    sampler = StepSampler(4, 4, epochs=2000, seed=3, weights=weights)
    drawn = torch.tensor([index for batch in sampler for _, index in batch])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, (weights / 3.75).float(), atol=0.02, rtol=0)
    halves = [
        StepSampler(4, 4, epochs=3, seed=3, rank=r, world_size=2, weights=weights) for r in (0, 1)
    ]
    joined = [first + second for first, second in zip(*halves, strict=True)]
    assert joined == list(StepSampler(4, 4, epochs=3, seed=3, weights=weights))


def test_seasons_of_a_place_are_those_of_its_own_vegetation(tmp_path: Path) -> None:
    days = {"north": (20, 75, 110, 200, 290), "south": (20, 110, 200, 290), "poor": (100, 101, 102)}
    rows = []
    for place, seen in days.items():
        for day in seen:
            _image(tmp_path / f"{place}{day}.png", day % 256)
            rows.append((place, day, f"{place}{day}.png", place))
    table = _table(tmp_path / "dates.csv", "place,day,image,label", *rows)
    phenology = _table(
        tmp_path / "phenology.csv",
        "place,greenup,maturity,senescence,dormancy",
        ("north", 60, 152, 244, 335),
        ("south", 244, 335, 60, 152),
        ("poor", 60, 152, 244, 335),
    )
    options = SeasonOptions(str(table), phenology=str(phenology), size=(2, 2), views=4)
    source = SeasonSource(options)
    assert [source.name(i) for i in range(len(source))] == ["north", "south"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]
    for index, day_of_spring in ((0, 110), (1, 290)):
        sample = source.read(index, _draw(index))
        assert sample["images"].shape == (4, 3, 2, 2)
        assert sorted(sample["seasons"].tolist()) == [0, 1, 2, 3]
        spring = sample["seasons"].tolist().index(0)
        assert int(sample["days"][spring]) == day_of_spring  # of 75 and 110 nearer to the middle
    orders = {tuple(source.read(0, _draw(seed))["days"].tolist()) for seed in range(9)}
    assert len(orders) > 3
    pair = SeasonSource(SeasonOptions(str(table), size=(2, 2), views=1))
    assert len(pair) == 3
    with pytest.raises(
        ValueError, match="must hold places with 4 seasons, got 1 places with fewer"
    ):
        SeasonSource(
            SeasonOptions(str(_table(tmp_path / "x.csv", "place,day,image", ("a", 3, "poor100.png"))),
                          views=4)
        )  # fmt: skip
    bad = _table(tmp_path / "x.csv", "place,day,image", ("a", 400, "poor100.png"))
    with pytest.raises(
        ValueError, match=r"day must be of the year, 1 to 366, got '400' in .*x.csv"
    ):
        SeasonSource(SeasonOptions(str(bad)))
    one = _table(
        tmp_path / "p.csv", "place,greenup,maturity,senescence,dormancy", ("a", 1, 2, 3, 4)
    )
    with pytest.raises(
        ValueError, match="phenology must have every place, got none for north, poor"
    ):
        SeasonSource(SeasonOptions(str(table), phenology=str(one)))


def test_clouds_weights_and_few_seasons_of_a_table(tmp_path: Path) -> None:
    for i in range(6):
        _image(tmp_path / f"{i}.png", 51 * i)
    rows = [
        ("a", 106, "0.png", 0.15, 2), ("a", 100, "1.png", 0.05, 2), ("a", 200, "2.png", 0.9, 2),
        ("a", 290, "3.png", 0.0, 2), ("b", 100, "4.png", 0.0, 0.5), ("b", 15, "5.png", "", ""),
    ]  # fmt: skip
    path = str(_table(tmp_path / "dates.csv", "place,day,image,cloud,weight", *rows[:-1]))
    source = SeasonSource(SeasonOptions(path, size=(2, 2), views=3, fewest=2))
    assert [source.name(i) for i in range(len(source))] == ["a"]  # b has one season
    assert source.weights is None
    drawn = [source.read(0, _draw(seed))["days"].tolist() for seed in range(8)]
    assert {tuple(days) for days in drawn} == {(100, 290, 290), (290, 100, 100)}
    assert len(SeasonSource(SeasonOptions(path, size=(2, 2), views=3, fewest=1))) == 2
    alone = SeasonSource(SeasonOptions(path, size=(2, 2), views=1, window=3))
    assert alone.weights is not None
    assert alone.weights.tolist() == [2.0, 0.5]
    assert {float(alone.read(0, _draw(seed))["days"]) for seed in range(9)} == {106.0, 290.0}
    cloudy = SeasonSource(SeasonOptions(path, size=(2, 2), views=3, max_cloud=1.0))
    assert {*cloudy.read(0, _draw())["days"].tolist()} == {100, 200, 290}
    for row, error in (
        (("b", 15, "5.png", 2, 1), r"cloud must be in \[0, 1\], got '2'"),
        (("a", 15, "5.png", 0, 3), r"one positive number a place, got 3.0 for a in .*x.csv"),
        (("c", 15, "5.png", 0, 0), "one positive number a place, got 0.0 for c"),
        (("c", 15, "5.png", 0, "inf"), "weight must be in"),
    ):
        bad = _table(tmp_path / "x.csv", "place,day,image,cloud,weight", *rows[:-1], row)
        with pytest.raises(ValueError, match=error):
            SeasonSource(SeasonOptions(str(bad)))
    with pytest.raises(ValueError, match="fewest must be at most views = 2, got 3"):
        SeasonOptions(path, views=2, fewest=3)
