"""How good an anomaly score is, per image and per pixel, and where to put its threshold.

The image metrics need scikit-learn and the pixel metrics SciPy; both come with the extra
"anomaly", and what needs a missing one raises ImportError.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pyfeat._extras import require
from pyfeat.anomaly._values import (
    BoolArray,
    FloatArray,
    Values,
    bool_array,
    check,
    float_array,
    image_scores,
    labelled_scores,
)
from pyfeat.anomaly.regions import label_regions

IntArray: TypeAlias = npt.NDArray[np.int64]


class RocCurve(NamedTuple):
    """Receiver operating characteristic; three float64 arrays of equal length.

    ``thresholds`` descends from +inf; a point counts ``score >= threshold`` as anomalous.
    """

    false_positive_rate: npt.NDArray[np.float64]
    true_positive_rate: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]


class PixelScores(NamedTuple):
    """Areas in [0, 1] under the pixel ROC curve and under the per-region-overlap curve."""

    auroc: float
    aupro: float


@dataclass(frozen=True)
class Threshold:
    """An image is anomalous when ``score > value``; the other fields say what that promises.

    A field is None where the method that chose the threshold promises nothing about it.
    ``dataclasses.asdict`` gives what JSON can store, and ``Threshold(**fields)`` reads it back.

    Attributes:
        value: The threshold, in the unit of the scores.
        num_normal: Normal images that it was chosen from.
        f1: F1 of the anomalous class on the images that it was chosen from, in (0, 1].
        precision: Precision on these images, in (0, 1].
        recall: Recall on these images, in (0, 1].
        false_alarm_rate: Bound on the expected rate of false alarms on unseen normal images
            that are exchangeable with the ``num_normal`` ones, in (0, 1).
    """

    value: float
    num_normal: int
    f1: float | None = None
    precision: float | None = None
    recall: float | None = None
    false_alarm_rate: float | None = None


def image_auroc(labels: Values, scores: Values) -> float:
    """Compute the area under the ROC curve of one score per image, in [0, 1].

    It is the chance that an anomalous image scores higher than a normal one; a tie counts half.

    Args:
        labels: (B,) bool or 0 and 1; 1 is anomalous. Both classes must be present.
        scores: (B,) finite; higher is more anomalous.

    Raises:
        ValueError: If an argument is not as described.

    Examples:
        >>> image_auroc([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.8])
        0.875
    """
    truth, values = labelled_scores(labels, scores, op="image_auroc")
    metrics = require("sklearn.metrics", extra="anomaly", op="image_auroc")
    return float(metrics.roc_auc_score(truth, values))


def average_precision(labels: Values, scores: Values) -> float:
    """Compute the average precision of one score per image, in (0, 1].

    It is the sum over distinct thresholds of precision times the gain in recall, without
    interpolation; equal scores enter together. Arguments and errors are those of
    ``image_auroc``.
    """
    truth, values = labelled_scores(labels, scores, op="average_precision")
    metrics = require("sklearn.metrics", extra="anomaly", op="average_precision")
    return float(metrics.average_precision_score(truth, values))


def roc_curve(labels: Values, scores: Values) -> RocCurve:
    """Compute the corners of the ROC curve of one score per image, from (0, 0) to (1, 1).

    Points on a straight piece between two corners are left out. Arguments and errors are those
    of ``image_auroc``.
    """
    truth, values = labelled_scores(labels, scores, op="roc_curve")
    metrics = require("sklearn.metrics", extra="anomaly", op="roc_curve")
    points = metrics.roc_curve(truth, values)
    return RocCurve(*(np.asarray(axis, dtype=np.float64) for axis in points))


def fpr_at_tpr(labels: Values, scores: Values, *, tpr: float = 0.95) -> float:
    """Compute how many anomalous images are accepted where ``tpr`` of the normal ones are.

    It is FPR@95 of the literature on out-of-distribution data, whose positives are the normal
    images: the lowest threshold that no more than a share ``1 - tpr`` of the normal scores exceed
    is set, and the share of anomalous scores that do not exceed it is returned. 0 is perfect.

    Args:
        labels: (B,) bool or 0 and 1; 1 is anomalous. Both classes must be present.
        scores: (B,) finite; higher is more anomalous.
        tpr: Share of normal images to accept, in (0, 1], read as the decimal that it prints as.

    Raises:
        ValueError: If an argument is not as described.

    Examples:
        >>> fpr_at_tpr([0, 0, 0, 0, 1, 1], [1.0, 2.0, 3.0, 9.0, 3.0, 4.0], tpr=0.75)
        0.5
    """
    op = "fpr_at_tpr"
    truth, values = labelled_scores(labels, scores, op=op)
    check(0.0 < tpr <= 1.0, f"{op}: tpr must lie in (0, 1], got {tpr}")
    normal = np.sort(values[~truth])
    accepted = math.ceil(normal.size * Fraction(repr(float(tpr))))
    return float((values[truth] <= normal[accepted - 1]).mean())


def f1_optimal_threshold(labels: Values, scores: Values) -> Threshold:
    """Choose the threshold with the highest F1 on labelled images, exactly.

    Every split of the distinct scores is tried; among equals the highest threshold wins. The
    value lies midway between the scores on its two sides or, if their midpoint rounds out of
    that gap, on the lower one; where everything is best called anomalous, it is the next number
    below the lowest score. F1 is measured on the images that chose the threshold, so it is
    optimistic.

    Args:
        labels: (B,) bool or 0 and 1; 1 is anomalous. Both classes must be present.
        scores: (B,) finite; higher is more anomalous. The value is a number of their dtype, so
            ``score > value`` decides alike in float32 and float64; half precision counts as
            float32 and must be compared in it.

    Returns:
        The threshold with ``f1``, ``precision``, ``recall`` and ``num_normal``.

    Raises:
        ValueError: If an argument is not as described.

    Examples:
        >>> f1_optimal_threshold([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0]).value
        2.5
    """
    truth, values = labelled_scores(labels, scores, op="f1_optimal_threshold")
    distinct, group = np.unique(values, return_inverse=True)  # [S] ascending, [B]
    images = np.bincount(group, minlength=distinct.size)
    positives = np.bincount(group[truth], minlength=distinct.size)
    flagged = images[::-1].cumsum()  # [S], descending threshold
    hits = positives[::-1].cumsum()
    num_anomalous = int(hits[-1])
    f1 = 2 * hits / (flagged + num_anomalous)
    best = int(f1.argmax())
    return Threshold(
        value=_just_below(distinct, distinct.size - 1 - best),
        num_normal=truth.size - num_anomalous,
        f1=float(f1[best]),
        precision=float(hits[best] / flagged[best]),
        recall=float(hits[best] / num_anomalous),
    )


def normal_threshold(scores: Values, *, false_alarm_rate: float = 0.01) -> Threshold:
    """Choose a threshold from normal images alone, with a bound on its false alarms.

    The value is the k-th smallest of n scores, ``k = ceil((n + 1) * (1 - false_alarm_rate))``.
    If the n images and an unseen normal one are exchangeable, the unseen one scores above the
    value with probability at most ``1 - k / (n + 1) <= false_alarm_rate``, whatever the
    distribution; an average over draws of the n images, not a bound for each draw. With fewer
    than ``1 / false_alarm_rate - 1`` images no finite threshold keeps the asked rate; then the
    value is the highest score, and the rate in the result, 1 / (n + 1), exceeds it.

    Args:
        scores: (n,) finite, of normal images that the scored model has not seen; n >= 1.
        false_alarm_rate: Wanted bound, in (0, 1), read as the decimal number that it prints as,
            so that 0.1 of 10 is 1.

    Returns:
        The threshold with ``num_normal`` and, in ``false_alarm_rate``, the bound that holds.

    Raises:
        ValueError: If an argument is not as described.

    Source: Bates et al., Testing for outliers with conformal p-values, 2023, arXiv:2104.08279.

    Examples:
        >>> normal_threshold([3.0, 1.0, 2.0, 4.0], false_alarm_rate=0.4).value
        3.0
    """
    op = "normal_threshold"
    values = image_scores(scores, op=op)
    check(values.size > 0, f"{op}: scores must hold at least one score, got none")
    inside = 0.0 < false_alarm_rate < 1.0
    check(inside, f"{op}: false_alarm_rate must lie in (0, 1), got {false_alarm_rate}")
    ranks = values.size + 1
    above = max(1, int(ranks * Fraction(repr(float(false_alarm_rate)))))
    return Threshold(
        value=float(np.sort(values)[ranks - above - 1]),
        num_normal=values.size,
        false_alarm_rate=above / ranks,
    )


class PixelMetrics:
    """Pixel AUROC and AUPRO of a stream of anomaly maps, exactly.

    AUROC is the chance that a defective pixel scores higher than a normal one; a tie counts
    half. AUPRO is the area under the per-region-overlap curve

        PRO(t) = mean over regions of |{pixels of the region with score >= t}| / |region|

    over the rate of false positives, from 0 to ``fpr_limit``, divided by ``fpr_limit``. A region
    is an 8-connected component of one mask, as in the official evaluation code of MVTec AD. The
    curve is piecewise linear from (0, 0) through the points of all distinct scores and is cut at
    the limit; equal scores enter together. Nothing is binned, neither area exceeds 1, and neither
    depends on the order or the batching of the images.

    Scores are compared as float32: wider ones are rounded, which can tie neighbours but not
    swap them, and integers are exact up to 2**24.

    Args:
        fpr_limit: Highest false-positive rate of the PRO curve, in (0, 1].

    Raises:
        ValueError: If ``fpr_limit`` is out of range.

    Memory: 4 bytes per normal pixel and 8 per defective one; maps and masks are not kept.
    ``compute`` briefly adds the larger of 4 bytes per normal and 70 per defective pixel.
    Source: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021.

    Examples:
        >>> metrics = PixelMetrics()
        >>> metrics.update([[0.1, 0.2], [0.3, 0.9]], [[0, 0], [0, 1]])
        >>> metrics.compute()
        PixelScores(auroc=1.0, aupro=1.0)
    """

    def __init__(self, *, fpr_limit: float = 0.3) -> None:
        inside = 0.0 < fpr_limit <= 1.0
        check(inside, f"PixelMetrics: fpr_limit must lie in (0, 1], got {fpr_limit}")
        self._fpr_limit = float(fpr_limit)
        self._normal_scores: list[FloatArray] = []
        self._defect_scores: list[FloatArray] = []
        # Sizes, because float32 could not hold the weight 1 / size exactly.
        self._region_sizes: list[npt.NDArray[np.int32]] = []

    def update(self, maps: Values, masks: Values) -> None:
        """Add one image or a batch; after an error nothing has been added.

        Args:
            maps: (H, W) or (B, H, W) real and finite; higher is more anomalous. Sizes may
                differ between calls.
            masks: Shape of ``maps``, bool or 0 and 1; 1 is defective. A mask without a
                defective pixel is a good image.

        Raises:
            ValueError: If an argument is not as described.
        """
        op = "PixelMetrics.update"
        scores = float_array(maps, np.float32, name="maps", op=op)
        ndim = f"{op}: maps must have shape (H, W) or (B, H, W), got {scores.shape}"
        check(scores.ndim in (2, 3), ndim)
        defective = bool_array(masks, name="masks", op=op)
        same = f"{op}: masks must have shape {scores.shape}, got {defective.shape}"
        check(defective.shape == scores.shape, same)
        if defective.any():
            images = defective.reshape(-1, *defective.shape[-2:])  # [B, H, W]
            sizes = [_region_sizes(image, op=op) for image in images if image.any()]
            self._region_sizes.append(np.concatenate(sizes))
            self._defect_scores.append(scores[defective])
        self._normal_scores.append(scores[~defective])

    def compute(self) -> PixelScores:
        """Evaluate the images added so far; more may be added afterwards.

        Raises:
            ValueError: If no defective pixel, or no normal one, has been added.
        """
        op = "PixelMetrics.compute"
        check(bool(self._defect_scores), f"{op}: masks must hold a defective pixel, got none")
        normal = np.concatenate(self._normal_scores)
        check(normal.size > 0, f"{op}: masks must hold a normal pixel, got none")
        normal.sort()
        self._normal_scores = [normal]
        scores = np.concatenate(self._defect_scores)
        sizes = np.concatenate(self._region_sizes)
        order = np.lexsort((sizes, scores))  # one order of summation for all orders of images
        weights = 1.0 / sizes[order]
        below = np.searchsorted(normal, scores[order], side="left")
        not_above = np.searchsorted(normal, scores[order], side="right")
        # Stays below 2**63 up to two thousand million pixels of each kind.
        half_wins = int((below + not_above).sum())
        auroc = half_wins / (2 * scores.size * normal.size)
        limit = self._fpr_limit * normal.size
        areas = _ramp_areas(normal.size - not_above, normal.size - below, limit=limit)
        # The sum of the weights is the number of regions. Both sums round alike, and no area
        # exceeds 1, so neither does the ratio.
        aupro = (weights * areas).sum() / weights.sum()
        return PixelScores(auroc, float(aupro))


def _ramp_areas(starts: IntArray, ends: IntArray, *, limit: float) -> npt.NDArray[np.float64]:
    """Return the mean height of each ramp of the PRO curve on [0, limit]: (M,), in [0, 1].

    Over the number of normal pixels, the PRO curve is a weighted sum of one ramp per defective
    pixel: 0 up to its start, the normal pixels above its score; linear up to its end, those that
    tie with it included; 1 from there on. So the area is a sum too, and no curve is built.
    """
    areas = np.zeros(starts.size)
    whole = ends <= limit
    areas[whole] = 1.0 - (starts[whole] + ends[whole]) / 2.0 / limit
    cut = (starts < limit) & ~whole
    inside = limit - starts[cut]
    areas[cut] = inside * inside / (2.0 * (ends[cut] - starts[cut]) * limit)
    return areas


def _region_sizes(mask: BoolArray, *, op: str) -> npt.NDArray[np.int32]:
    """Return the size of its region for each true pixel of ``mask`` (H, W), in row order."""
    regions = label_regions(mask, op=op)
    member = regions[mask]
    sizes: npt.NDArray[np.int32] = np.bincount(member)[member].astype(np.int32)
    return sizes


def _just_below(distinct: FloatArray, index: int) -> float:
    """Return a number of the dtype of ``distinct`` that parts ``index`` from ``index - 1``."""
    upper = distinct[index]
    if index == 0:
        return float(np.nextafter(upper, upper.dtype.type(-np.inf)))
    lower = distinct[index - 1]
    middle = lower / 2 + upper / 2  # the sum could overflow
    return float(middle if lower <= middle < upper else lower)
