"""How much a feature is like those of a training set, by the features alone: larger is more alike.

Each score is a class that is fitted with ``fit`` and kept by its ``arrays``; ``FeatureOutlier`` is
what people use. Those that look at the logits of a classifier are in ``outlier_logits``.
"""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pyfeat._extras import require
from pyfeat.coreset import greedy_coreset
from pyfeat.search import knn

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Labels: TypeAlias = npt.NDArray[np.int64]


class Head(NamedTuple):
    """A linear classifier: logits are ``x @ weight.T + bias``."""

    weight: Array  # (C, D)
    bias: Array  # (C,)

    def logits(self, features: Array) -> Array:
        """Compute (M, C) float64 from features (M, D)."""
        logits: Array = features.astype(np.float64) @ self.weight.T + self.bias
        return logits


@dataclass(frozen=True)
class ScoreOptions:
    """What the scores can be told; each reads what concerns it.

    Attributes:
        k: Neighbours of "knn" and "nnguide"; None takes the root of the rows of a class.
        normalize: Whether "knn" compares directions instead of features.
        coreset_ratio: Share of the rows that "knn" keeps, chosen by ``greedy_coreset``, in (0, 1].
        shrinkage: Of the covariance of "mahalanobis" to a multiple of the identity, in [0, 1]; None
            takes the estimate of Ledoit and Wolf.
        temperature: T of ``T logsumexp(logits / T)``, above 0.
        principal: Directions of "vim" whose variance counts as normal, below D; None takes D // 2.
        head_l2: Strength of the penalty on the linear head's weights, above 0.
        seed: Of the first row of the coreset.
    """

    k: int | None = None
    normalize: bool = True
    coreset_ratio: float = 1.0
    shrinkage: float | None = None
    temperature: float = 1.0
    principal: int | None = None
    head_l2: float = 1e-3
    seed: int = 0

    def neighbours(self, num_rows: int, labels: Labels | None) -> int:
        """Return k for a memory of ``num_rows``, at least 1 and below it."""
        if self.k is not None:
            return min(int(self.k), num_rows)
        classes = 1 if labels is None else len(np.unique(labels))
        root = round(math.sqrt(num_rows / classes))
        return max(1, min(root, num_rows - 1))


def directions(features: Array) -> Array:
    """Return features (M, D) of length 1, whatever their scale; zero vectors stay."""
    largest = np.abs(features).max(axis=1, keepdims=True)
    scaled = features / np.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit: Array = scaled / np.where(length > 0, length, 1)
    return unit


class Scorer(abc.ABC):
    """A fitted score.

    Attributes:
        uses_head: Whether ``fit`` needs the head of a classifier.
        uses_labels: Whether ``fit`` reads labels, apart from the default of k.
        is_fitted_to_rows: Whether the score depends on the rows of ``fit`` beyond its head.
    """

    uses_head: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = False
    is_fitted_to_rows: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "Scorer":
        """Fit to rows x (N, D), their labels (N,) and a head, where they are used."""

    @abc.abstractmethod
    def score(self, x: Array) -> Array:
        """Score rows (M, D) as (M,); larger is more like the rows of ``fit``."""

    def left_out(self, x: Array) -> Array | None:
        """Score each row of ``fit`` as if it had been left out; None where only refitting can."""
        return None

    def arrays(self) -> dict[str, Any]:
        """Return what the constructor takes: arrays and numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class KthNeighbour(Scorer):
    """``-||z - z_(k)||``, z_(k) the k-th nearest of the rows: no labels, no head.

    Source: Sun et al., Out-of-distribution detection with deep nearest neighbors, ICML 2022,
    arXiv:2204.06507; for inputs that the pre-training knows: Miyai et al., arXiv:2310.00847.
    """

    memory: Array  # (N, D), directions where ``normalize``
    kept: npt.NDArray[np.int64]  # (N,) which row of ``fit`` each is
    k: int
    normalize: bool

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "KthNeighbour":
        """See the base class."""
        rows = directions(x) if options.normalize else x
        kept = np.arange(len(rows))
        if options.coreset_ratio < 1:
            size = max(2, round(options.coreset_ratio * len(rows)))
            if size < len(rows):
                kept = greedy_coreset(rows, size=size, seed=options.seed).indices.numpy()
        k = options.neighbours(len(kept), labels)
        return cls(np.ascontiguousarray(rows[kept]), kept, min(k, len(kept) - 1), options.normalize)

    def score(self, x: Array) -> Array:
        """See the base class."""
        rows = self._rows(x)
        return -knn(rows, self.memory, self.k).distances[:, -1]

    def left_out(self, x: Array) -> Array:
        """See the base class; the row itself does not count, copies of it elsewhere do.

        Of k + 1 neighbours the row itself, or a copy of it, is one at distance 0: without it, the
        k-th is the last. So no index is compared, and ties with copies cannot go wrong.
        """
        found = knn(self._rows(x), self.memory, self.k + 1).distances
        is_kept = np.zeros(len(x), bool)
        is_kept[self.kept] = True
        return -np.where(is_kept, found[:, -1], found[:, -2])

    def _rows(self, x: Array) -> Array:
        return (directions(x) if self.normalize else x).astype(self.memory.dtype, copy=False)


@dataclass(frozen=True, eq=False)
class Mahalanobis(Scorer):
    """``-min_c (x - mean_c)' S^-1 (x - mean_c)`` with one covariance; without labels, one class.

    Source: Lee et al., A simple unified framework for detecting out-of-distribution samples,
    NeurIPS 2018, arXiv:1807.03888; shrinkage: Ledoit and Wolf, 2004.
    """

    whitening: Array  # (D, D), its product with its transpose is S^-1
    means: Array  # (C, D), whitened

    uses_labels: ClassVar[bool] = True

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "Mahalanobis":
        """See the base class."""
        x = x.astype(np.float64)
        means, codes = class_means(x, labels)
        centred = x - means[codes]
        shrinkage = options.shrinkage
        if shrinkage is None:
            covariance = require("sklearn.covariance", extra="anomaly", op="FeatureOutlier")
            shrinkage = float(covariance.ledoit_wolf_shrinkage(centred, assume_centered=True))
        spread = centred.T @ centred / len(x)
        level = np.trace(spread) / x.shape[1]
        shrunk = (1 - shrinkage) * spread + shrinkage * level * np.eye(x.shape[1])
        values, vectors = np.linalg.eigh(shrunk)
        # Directions without variance count like the smallest that float64 can tell from none.
        floor = 1e-12 * values[-1] if values[-1] > 0 else 1.0
        whitening = vectors / np.sqrt(np.maximum(values, floor))
        return cls(whitening, means @ whitening)

    def score(self, x: Array) -> Array:
        """See the base class."""
        white = x.astype(np.float64) @ self.whitening
        return -knn(white, self.means, metric="sqeuclidean").distances[:, 0]


@dataclass(frozen=True, eq=False)
class ClassCosine(Scorer):
    """Largest cosine to the mean direction of a class; without labels, of all rows."""

    means: Array  # (C, D)

    uses_labels: ClassVar[bool] = True

    @classmethod
    def fit(
        cls, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> "ClassCosine":
        """See the base class."""
        return cls(class_means(directions(x).astype(np.float64), labels)[0])

    def score(self, x: Array) -> Array:
        """See the base class."""
        return (
            1 - knn(directions(x).astype(np.float64), self.means, metric="cosine").distances[:, 0]
        )


def class_means(x: Array, labels: Labels | None) -> tuple[Array, Labels]:
    """Return the means (C, D) of the classes, and which of them each row belongs to."""
    if labels is None:
        return x.mean(axis=0, keepdims=True), np.zeros(len(x), np.int64)
    classes, codes = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), x.shape[1]))
    np.add.at(sums, codes, x)
    return sums / np.bincount(codes)[:, None], codes


def folds_of(
    num_rows: int, labels: Labels | None, count: int, seed: int
) -> Iterator[tuple[Labels, Labels]]:
    """Yield the rows outside and inside of each fold, classes spread evenly over the folds.

    Args:
        num_rows: N >= 2.
        labels: (N,) classes; None for one.
        count: Folds, at least 2; no more than N are made.
        seed: Of the draw.
    """
    order = np.random.default_rng(seed).permutation(num_rows)
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(num_rows, np.int64)
    # Rows of one class are neighbours in this order, so no two of them share a fold needlessly.
    fold[order] = np.arange(num_rows) % count
    for i in range(min(count, num_rows)):
        yield np.flatnonzero(fold != i), np.flatnonzero(fold == i)
