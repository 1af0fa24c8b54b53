import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyfeat.anomaly.metrics import (
    PixelMetrics,
    PixelScores,
    Threshold,
    average_precision,
    f1_optimal_threshold,
    image_auroc,
    normal_threshold,
    roc_curve,
)

pytest.importorskip("sklearn")
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]


def regions_of(mask: npt.NDArray[np.bool_]) -> Iterator[list[tuple[int, int]]]:
    """Yield the 8-connected regions, by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        yield region


def share_at(scores: list[float], threshold: float) -> Fraction:
    return Fraction(sum(score >= threshold for score in scores), len(scores))


def brute_force(maps: npt.NDArray[Any], masks: npt.NDArray[np.bool_], limit: float) -> PixelScores:
    """Evaluate every distinct threshold in rational arithmetic."""
    regions = [
        [float(score_map[pixel]) for pixel in region]
        for score_map, mask in zip(maps, masks, strict=True)
        for region in regions_of(mask)
    ]
    normal = maps[~masks].tolist()
    defective = maps[masks].tolist()
    curve = [(Fraction(0), Fraction(0), Fraction(0))]  # false positives, true positives, overlap
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = [share_at(region, threshold) for region in regions]
        overlap = sum(overlaps, Fraction(0)) / len(regions)
        curve.append((share_at(normal, threshold), share_at(defective, threshold), overlap))
    auroc = aupro = Fraction(0)
    edge = Fraction(limit)
    for (x0, t0, p0), (x1, t1, p1) in itertools.pairwise(curve):
        auroc += (x1 - x0) * (t0 + t1) / 2
        if x1 <= edge:
            aupro += (x1 - x0) * (p0 + p1) / 2
        elif x0 < edge:
            at_edge = p0 + (p1 - p0) * (edge - x0) / (x1 - x0)
            aupro += (edge - x0) * (p0 + at_edge) / 2
    return PixelScores(float(auroc), float(aupro / edge))


def evaluate(maps: Any, masks: Any, *, fpr_limit: float = 0.3) -> PixelScores:
    metrics = PixelMetrics(fpr_limit=fpr_limit)
    metrics.update(maps, masks)
    return metrics.compute()


def random_batch(seed: int, shape: tuple[int, int, int], levels: int, share: float) -> Batch:
    rng = np.random.default_rng(seed)
    maps = (rng.integers(0, levels, shape) / levels).astype(np.float32)
    return maps, rng.random(shape) < share


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.floats(0.02, 0.98))
    maps, masks = random_batch(seed, shape, draw(st.sampled_from([1, 2, 3, 7, 1000])), share)
    assume(masks.any() and not masks.all())
    return maps, masks


def test_image_metrics_agree_with_scikit_learn_for_arrays_tensors_and_lists() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 60), rng.integers(0, 9, 60) / 8
    auroc, precision = roc_auc_score(labels, scores), average_precision_score(labels, scores)
    for truth, values in (
        (labels, scores),
        (labels.astype(bool), scores.astype(np.float16)),
        (labels.tolist(), scores.tolist()),
        (torch.tensor(labels), torch.tensor(scores, requires_grad=True)),
        (torch.tensor(labels).float(), torch.tensor(scores, dtype=torch.bfloat16)),
    ):
        assert image_auroc(truth, values) == auroc
        assert average_precision(truth, values) == precision
    assert type(image_auroc(labels, scores)) is type(average_precision(labels, scores)) is float


def test_the_roc_curve_runs_from_corner_to_corner_and_encloses_the_auroc() -> None:
    labels, scores = [0, 0, 1, 1, 0], [0.1, 0.4, 0.4, 0.8, 0.4]
    x, y, thresholds = roc_curve(labels, scores)
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, 0.0, 1.0, 1.0)
    area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
    assert area == pytest.approx(image_auroc(labels, scores), abs=1e-15)
    assert thresholds.tolist() == [math.inf, 0.8, 0.4, 0.1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batch=batches(), limit=st.sampled_from([0.01, 0.05, 0.3, 0.5, 0.77, 1.0]))
def test_pixel_scores_equal_a_brute_force_over_every_threshold(batch: Batch, limit: float) -> None:
    scores = evaluate(*batch, fpr_limit=limit)
    assert scores == pytest.approx(brute_force(*batch, limit), rel=1e-12, abs=1e-12)
    maps, masks = batch
    assert scores.auroc == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), rel=1e-12)
    assert 0.0 <= min(scores) <= max(scores) <= 1.0


# Ten normal pixels (columns 2 to 11), a region of two and a region of one.
HAND_MASK = [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]
HAND_MAP = [[9, 5, 8, 7, 6, 4, 4, 3, 3, 2, 1, 0, 4]]


@pytest.mark.parametrize(
    ("limit", "area"),
    [
        # PRO is 1/4 up to FPR 0.3, jumps to 1/2, climbs to 1 at 0.5 (three scores of 4 tie).
        (0.2, 0.2 / 4),
        (0.3, 0.3 / 4),
        (0.4, 0.3 / 4 + 0.1 * (1 / 2 + 3 / 4) / 2),
        (0.5, 0.3 / 4 + 0.2 * (1 / 2 + 1) / 2),
        (1.0, 0.3 / 4 + 0.2 * (1 / 2 + 1) / 2 + 0.5),
    ],
)
def test_aupro_equals_the_area_computed_by_hand_and_is_cut_at_the_limit(
    limit: float, area: float
) -> None:
    assert evaluate(HAND_MAP, HAND_MASK, fpr_limit=limit).aupro == pytest.approx(area / limit)


def test_regions_connect_diagonally_but_not_across_images() -> None:
    # As one region the diagonal weighs 1/2; as two it would weigh 2/3.
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    found = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, -1]])
    assert evaluate(found, mask).aupro == 0.5
    # As one region these three pixels would score 1/3.
    masks = np.array([[[0, 0, 1]], [[0, 1, 1]]])
    assert evaluate(np.array([[[0, 0, 1]], [[0, -1, -1]]]), masks).aupro == 0.5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=batches(), limit=st.sampled_from([0.01, 0.3, 1.0]))
def test_a_perfect_map_scores_exactly_one_and_its_negative_zero(batch: Batch, limit: float) -> None:
    _, masks = batch
    assert evaluate(masks.astype(float), masks, fpr_limit=limit) == (1.0, 1.0)
    assert evaluate(-masks.astype(float), masks, fpr_limit=limit).auroc == 0.0


def test_maps_of_any_real_dtype_and_kind_give_the_same_answer() -> None:
    maps, masks = random_batch(2, (2, 9, 7), 8, 0.3)
    whole = (8 * maps).astype(int)
    expected = evaluate(maps, masks)
    for same in (
        maps.astype(np.float64),
        maps.astype(np.float16),
        maps.tolist(),
        torch.tensor(maps).requires_grad_(),
        torch.tensor(maps, dtype=torch.bfloat16),
        whole.astype(np.uint8),
        torch.tensor(whole),
        np.asfortranarray(maps),
    ):
        assert evaluate(same, masks) == expected
    for same in (masks.astype(np.uint8), masks.tolist(), torch.tensor(masks).float()):
        assert evaluate(maps, same) == expected
    assert {type(area) for area in expected} == {float}
    assert evaluate([[0.0, -0.0]], [[0, 1]]) == evaluate([[-0.0, 0.0]], [[0, 1]]) == (0.5, 0.15)


def test_good_images_whole_defects_empty_batches_and_other_sizes_mix() -> None:
    maps = np.random.default_rng(3).random((2, 6, 6)).astype(np.float32)
    masks = np.zeros((2, 6, 6), dtype=bool)
    masks[1] = True
    metrics = PixelMetrics()
    for part in ((slice(0), ...), 1, (0, slice(4)), (0, slice(4, None))):
        metrics.update(maps[part], masks[part])
    assert metrics.compute() == pytest.approx(brute_force(maps, masks, 0.3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batch=batches(), seed=st.integers(0, 99))
def test_order_and_batching_of_updates_do_not_change_a_bit(batch: Batch, seed: int) -> None:
    maps, masks = batch
    metrics = PixelMetrics()
    for index in np.random.default_rng(seed).permutation(len(maps)):
        metrics.update(maps[index], masks[index])
    assert metrics.compute() == metrics.compute() == evaluate(maps, masks)


def test_updates_go_on_after_compute_and_a_refusal_and_keep_nothing_of_the_arguments() -> None:
    maps, masks = random_batch(4, (2, 8, 8), 50, 0.3)
    masks[1] = False
    metrics, expected = PixelMetrics(), evaluate(maps, masks)
    metrics.update(maps[0], masks[0])
    assert metrics.compute() == evaluate(maps[0], masks[0])
    with pytest.raises(ValueError, match="masks must have shape"):
        metrics.update(maps[1], masks[1, :, :4])
    metrics.update(maps[1], masks[1])
    maps[:], masks[:] = 0.0, False
    assert metrics.compute() == expected


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.booleans(), min_size=2, max_size=14),
    levels=st.sampled_from([1, 2, 5, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_f1_threshold_beats_or_equals_every_other(
    labels: list[bool], levels: int, seed: int
) -> None:
    assume(0 < sum(labels) < len(labels))
    scores = np.random.default_rng(seed).integers(0, levels, len(labels)) / levels
    found = f1_optimal_threshold(labels, scores)
    flagged = scores > found.value
    best = max(f1_score(labels, scores >= cut) for cut in set(scores.tolist()))
    assert found.f1 == pytest.approx(f1_score(labels, flagged), rel=1e-12)
    assert found.f1 == pytest.approx(best, rel=1e-12)
    hits = int((flagged & np.array(labels)).sum())
    assert (found.precision, found.recall) == (hits / int(flagged.sum()), hits / sum(labels))
    assert found.num_normal == len(labels) - sum(labels)
    assert found.false_alarm_rate is None


def test_the_f1_threshold_lies_midway_between_its_neighbours() -> None:
    assert f1_optimal_threshold([0, 0, 1, 1], [1, 2, 5, 9]).value == 3.5
    assert f1_optimal_threshold([0, 1], [-1.5e308, 1.5e308]).value == 0.0
    # Flagging 4 gives 2/3, and so does flagging 4, 3, 2, 1: the higher threshold wins.
    found = f1_optimal_threshold([1, 0, 0, 1], [1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.f1, found.precision) == (3.5, 2 / 3, 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_f1_threshold_parts_adjacent_floats_in_their_own_dtype(
    dtype: type[np.float32 | np.float64],
) -> None:
    value = dtype(1.0)
    for _ in range(4):
        above = np.nextafter(value, dtype(2.0))
        scores = np.array([value, above])
        cut = f1_optimal_threshold([0, 1], scores).value
        assert (scores > cut).tolist() == [False, True]
        assert (torch.tensor(scores) > cut).tolist() == [False, True]
        everything = f1_optimal_threshold([1, 0], scores).value
        assert everything == np.nextafter(value, dtype(0.0))
        assert (torch.tensor(scores) > everything).all()
        value = above


@pytest.mark.parametrize(
    ("num_normal", "rate", "rank", "bound"),
    [
        (99, 0.01, 99, 0.01),
        (98, 0.01, 98, 1 / 99),
        (9, 0.3, 7, 0.3),  # 0.3 as a binary fraction lies below 3/10
        (4, 0.5, 3, 0.4),
        (1, 0.01, 1, 0.5),
        (3, 0.999, 1, 0.75),
    ],
)
def test_the_normal_threshold_has_the_exact_rank_and_states_the_bound_that_holds(
    num_normal: int, rate: float, rank: int, bound: float
) -> None:
    scores = np.random.default_rng(num_normal).permutation(num_normal) + 1
    expected = Threshold(value=float(rank), num_normal=num_normal, false_alarm_rate=bound)
    assert normal_threshold(scores, false_alarm_rate=rate) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(num_normal=st.integers(1, 400), per_mille=st.integers(1, 999))
def test_the_bound_keeps_the_asked_rate_whenever_enough_images_are_given(
    num_normal: int, per_mille: int
) -> None:
    rate = Fraction(per_mille, 1000)
    found = normal_threshold(torch.arange(num_normal), false_alarm_rate=per_mille / 1000)
    rank = math.ceil((num_normal + 1) * (1 - rate))
    assert found.value == min(rank, num_normal) - 1
    assert found.false_alarm_rate is not None
    assert (found.false_alarm_rate <= per_mille / 1000) == (rank <= num_normal)


@pytest.mark.parametrize("levels", [None, 6], ids=["continuous", "ties"])
@pytest.mark.parametrize(("num_normal", "rate"), [(19, 0.1), (50, 0.05), (5, 0.05)])
def test_false_alarms_on_exchangeable_images_keep_the_stated_bound(
    num_normal: int, rate: float, levels: int | None
) -> None:
    rng = np.random.default_rng(6)
    trials = 4000
    shape = (trials, num_normal + 1)
    draws = rng.standard_normal(shape) if levels is None else rng.integers(0, levels, shape)
    # A shift common to a trial leaves its images exchangeable, though not independent.
    draws = draws + rng.standard_normal((trials, 1))
    found = [normal_threshold(row[:-1], false_alarm_rate=rate) for row in draws]
    bound = found[0].false_alarm_rate
    assert bound is not None
    alarms = np.mean([row[-1] > one.value for row, one in zip(draws, found, strict=True)])
    spread = 4 * math.sqrt(bound * (1 - bound) / trials)
    assert alarms <= bound + spread
    if levels is None:
        assert alarms >= bound - spread


def test_thresholds_survive_json() -> None:
    measured = f1_optimal_threshold([0, 1], torch.tensor([0.1, 0.7]))
    for threshold in (measured, normal_threshold(np.array([0.5, 0.25], dtype=np.float32))):
        text = json.dumps(asdict(threshold), allow_nan=False)
        assert Threshold(**json.loads(text)) == threshold


@pytest.mark.parametrize("call", [image_auroc, average_precision, roc_curve, f1_optimal_threshold])
@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 2], [0.1, 0.2], r"labels must hold only 0 and 1, got \[2\]"),
        ([0.0, math.nan], [0.1, 0.2], r"labels must hold only 0 and 1, got \[nan\]"),
        (["a", "b"], [0.1, 0.2], r"labels must hold real numbers, got <U1"),
        ([[0, 1]], [0.1, 0.2], r"labels must have shape \(B,\), got \(1, 2\)"),
        ([0, 1], [[0.1, 0.2]], r"scores must have shape \(B,\), got \(1, 2\)"),
        ([0, 1], [0.1, 0.2, 0.3], r"scores must have shape \(2,\), got \(3,\)"),
        ([0, 1], [0.1, math.nan], r"scores must be finite in float64, got \[nan\]"),
        ([0, 1], torch.tensor([0.1, -math.inf]), r"scores must be finite in float32, got \[-inf\]"),
        ([1, 1], [0.1, 0.2], r"labels must hold both 0 and 1, got \[1\]"),
    ],
)
def test_labelled_scores_that_do_not_fit_are_refused(
    call: Any, labels: Any, scores: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{call.__name__}: {message}$"):
        call(labels, scores)


ZERO = np.zeros((1, 2, 3))


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.full((1, 2), np.nan), [[0, 1]], r"maps must be finite in float32, got \[nan nan\]"),
        (torch.tensor([[math.inf]]), [[1]], r"maps must be finite in float32, got \[inf\]"),
        ([[1e300, 0.0]], [[0, 1]], r"maps must be finite in float32, got \[inf\]"),
        (torch.eye(2) * 1j, np.eye(2), r"maps must hold real numbers, got complex64"),
        ([1.0], [0], r"maps must have shape \(H, W\) or \(B, H, W\), got \(1,\)"),
        (ZERO[None], ZERO[None], r"maps must have shape .*, got \(1, 1, 2, 3\)"),
        (ZERO[0], ZERO[0].T, r"masks must have shape \(2, 3\), got \(3, 2\)"),
        (ZERO, ZERO[0], r"masks must have shape \(1, 2, 3\), got \(2, 3\)"),
        (ZERO, ZERO + 255, r"masks must hold only 0 and 1, got \[255. 255. 255.\]"),
    ],
)
def test_maps_and_masks_that_do_not_fit_are_refused(maps: Any, masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^PixelMetrics\.update: {message}$"):
        PixelMetrics().update(maps, masks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PixelMetrics().compute(), r"masks must hold a defective pixel, got none"),
        (lambda: evaluate(ZERO, ZERO), r"masks must hold a defective pixel, got none"),
        (lambda: evaluate(ZERO, ZERO + 1), r"masks must hold a normal pixel, got none"),
        (lambda: PixelMetrics(fpr_limit=0.0), r"fpr_limit must lie in \(0, 1\], got 0.0"),
        (lambda: PixelMetrics(fpr_limit=1.1), r"fpr_limit must lie in \(0, 1\], got 1.1"),
        (lambda: PixelMetrics(fpr_limit=math.nan), r"fpr_limit must lie in \(0, 1\], got nan"),
        (lambda: normal_threshold([]), r"scores must hold at least one score, got none"),
        (lambda: normal_threshold([math.nan]), r"scores must be finite in float64, got \[nan\]"),
        (lambda: normal_threshold([[1.0]]), r"scores must have shape \(B,\), got \(1, 1\)"),
        (lambda: normal_threshold([1], false_alarm_rate=0), r"false_alarm_rate must .*, got 0"),
        (lambda: normal_threshold([1], false_alarm_rate=1), r"false_alarm_rate must .*, got 1"),
    ],
)
def test_empty_streams_and_rates_outside_their_range_are_refused(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"^(PixelMetrics(\.compute)?|normal_threshold): {message}$"
    ):
        call()
