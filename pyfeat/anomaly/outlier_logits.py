"""How much a feature is like those of a training set, by the logits of a classifier: larger is more alike."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from pyfeat._extras import require
from pyfeat.anomaly._values import real_array
from pyfeat.anomaly.outlier_scores import (
    Array,
    Head,
    Labels,
    ScoreOptions,
    Scorer,
    class_means,
    directions,
)
from pyfeat.search import knn


def max_softmax(logits: Array) -> Array:
    """Return the largest probability of logits (M, C), (M,) in [1 / C, 1].

    Source: Hendrycks and Gimpel, A baseline for detecting misclassified and out-of-distribution
    examples, ICLR 2017, arXiv:1610.02136.
    """
    largest: Array = softmax(logits).max(axis=1)
    return largest


def max_logit(logits: Array) -> Array:
    """Return the largest of logits (M, C).

    Source: Hendrycks et al., Scaling out-of-distribution detection, ICML 2022, arXiv:1911.11132.
    """
    largest: Array = logits.max(axis=1)
    return largest


def energy(logits: Array, temperature: float = 1.0) -> Array:
    """Return ``T logsumexp(logits / T)`` of logits (M, C), the negative energy of its source.

    Source: Liu et al., Energy-based out-of-distribution detection, NeurIPS 2020, arXiv:2010.03759.
    """
    scaled = logits / temperature
    top = scaled.max(axis=1, keepdims=True)
    total: Array = temperature * (top[:, 0] + np.log(np.exp(scaled - top).sum(axis=1)))
    return total


def softmax(logits: Array) -> Array:
    """Return the probabilities of logits (M, C)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = powers / powers.sum(axis=1, keepdims=True)
    return shares


def fit_head(features: Array, labels: Labels, *, l2: float = 1e-3) -> Head:
    """Fit a linear classifier: the least mean cross-entropy, plus ``l2 / 2`` of its squared weights.

    The weights that are penalised are those for features scaled to unit variance.

    Args:
        features: (N, D) finite.
        labels: (N,) at least two classes; row c of the head belongs to the c-th in their order.
        l2: Strength of the penalty, above 0; it does not depend on N.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    linear = require("sklearn.linear_model", extra="anomaly", op="FeatureOutlier")
    x = features.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-12 * max(1.0, float(np.abs(x).max()))] = 1.0  # constant columns
    model = linear.LogisticRegression(C=1 / (l2 * len(x)), max_iter=2000).fit(
        (x - mean) / scale, labels
    )
    weight, bias = model.coef_ / scale, model.intercept_ - (model.coef_ / scale) @ mean
    if len(weight) == 1:  # two classes: half of the one logit's difference for each
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Head(weight, bias)


@dataclass(frozen=True, eq=False)
class MaxSoftmax(Scorer):
    """See ``max_softmax``."""

    weight: Array  # (C, D)
    bias: Array  # (C,)

    uses_head: ClassVar[bool] = True
    is_fitted_to_rows: ClassVar[bool] = False

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "MaxSoftmax":
        """See the base class."""
        return cls(*_given(head))

    def score(self, x: Array) -> Array:
        """See the base class."""
        return max_softmax(Head(self.weight, self.bias).logits(x))


class MaxLogit(MaxSoftmax):
    """See ``max_logit``."""

    def score(self, x: Array) -> Array:
        """See the base class."""
        return max_logit(Head(self.weight, self.bias).logits(x))


@dataclass(frozen=True, eq=False)
class Energy(Scorer):
    """See ``energy``."""

    weight: Array  # (C, D)
    bias: Array  # (C,)
    temperature: float

    uses_head: ClassVar[bool] = True
    is_fitted_to_rows: ClassVar[bool] = False

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "Energy":
        """See the base class."""
        return cls(*_given(head), options.temperature)

    def score(self, x: Array) -> Array:
        """See the base class."""
        return energy(Head(self.weight, self.bias).logits(x), self.temperature)


@dataclass(frozen=True, eq=False)
class KLMatching(Scorer):
    """``-min_c KL(p || p_c)``, p_c the mean probabilities of the rows that class c is predicted for.

    Source: Hendrycks et al., Scaling out-of-distribution detection, ICML 2022, arXiv:1911.11132.
    """

    weight: Array  # (C, D)
    bias: Array  # (C,)
    typical: Array  # (c, C), c <= C: of the classes that are predicted for a row

    uses_head: ClassVar[bool] = True

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "KLMatching":
        """See the base class."""
        head = _given(head)
        probabilities = softmax(head.logits(x))
        return cls(*head, class_means(probabilities, probabilities.argmax(axis=1))[0])

    def score(self, x: Array) -> Array:
        """See the base class."""
        p = softmax(Head(self.weight, self.bias).logits(x))
        tiny = np.finfo(np.float64).tiny
        entropy = (p * np.log(np.maximum(p, tiny))).sum(axis=1)
        cross = p @ np.log(np.maximum(self.typical, tiny)).T  # [M, c]
        least: Array = (entropy[:, None] - cross).min(axis=1)
        return -least


@dataclass(frozen=True, eq=False)
class NNGuide(Scorer):
    """Energy times the mean of the k largest products of cosine and energy with the rows.

    Source: Park et al., Nearest neighbor guidance for out-of-distribution detection, ICCV 2023,
    arXiv:2309.14888.
    """

    weight: Array  # (C, D)
    bias: Array  # (C,)
    memory: Array  # (N, D) directions of the rows times their energies
    temperature: float
    k: int

    uses_head: ClassVar[bool] = True

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "NNGuide":
        """See the base class."""
        head, x = _given(head), x.astype(np.float64)
        sure = energy(head.logits(x), options.temperature)
        k = options.neighbours(len(x), labels)
        return cls(*head, directions(x) * sure[:, None], options.temperature, k)

    def score(self, x: Array) -> Array:
        """See the base class."""
        x = x.astype(np.float64)
        sure = energy(Head(self.weight, self.bias).logits(x), self.temperature)
        found = knn(directions(x), self.memory, self.k, metric="inner_product")
        guided: Array = sure * found.distances.mean(axis=1)
        return guided


@dataclass(frozen=True, eq=False)
class ViM(Scorer):
    """Energy less the length of what lies outside the principal directions, scaled to logits.

    Source: Wang et al., ViM: out-of-distribution with virtual-logit matching, CVPR 2022,
    arXiv:2203.10807.
    """

    weight: Array  # (C, D)
    bias: Array  # (C,)
    origin: Array  # (D,) where all logits are as near 0 as they get
    rest: Array  # (D, r) the directions that are not principal
    scale: float

    uses_head: ClassVar[bool] = True

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "ViM":
        """See the base class."""
        head, x = _given(head), x.astype(np.float64)
        origin = -np.linalg.pinv(head.weight) @ head.bias
        moments = (x - origin).T @ (x - origin) / len(x)
        dim = x.shape[1]
        principal = dim // 2 if options.principal is None else options.principal
        rest = np.linalg.eigh(moments)[1][:, : dim - principal]  # ascending variance
        lengths = np.linalg.norm((x - origin) @ rest, axis=1).mean()
        # Rows without a rest leave the energy alone.
        scale = max_logit(head.logits(x)).mean() / lengths if lengths > 0 else 0.0
        return cls(*head, origin, np.ascontiguousarray(rest), float(scale))

    def score(self, x: Array) -> Array:
        """See the base class."""
        x = x.astype(np.float64)
        lengths = np.linalg.norm((x - self.origin) @ self.rest, axis=1)
        matched: Array = energy(Head(self.weight, self.bias).logits(x)) - self.scale * lengths
        return matched


def _given(head: Head | None) -> Head:
    if head is None:
        message = "FeatureOutlier: head must be given for a score on logits, got None"
        raise ValueError(message)
    return head


def head_of(head: Any, dim: int) -> Head | None:
    """Check a classifier on D features, an ``nn.Linear`` or (weight, bias); None stays None."""
    if head is None:
        return None
    op = "FeatureOutlier"
    weight, bias = (head.weight, head.bias) if isinstance(head, nn.Linear) else head
    w = real_array(weight, name="head", op=op).astype(np.float64)
    b = (
        np.zeros(len(w))
        if bias is None
        else real_array(bias, name="head", op=op).astype(np.float64)
    )
    if w.ndim != 2 or w.shape[1] != dim or b.shape != w.shape[:1] or len(w) < 2:
        message = (
            f"{op}: head must have shapes (C, {dim}) and (C,), C >= 2, got {w.shape}, {b.shape}"
        )
        raise ValueError(message)
    return Head(w, b)
