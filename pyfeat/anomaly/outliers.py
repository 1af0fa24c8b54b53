"""Is this feature from elsewhere? Scores on frozen features, as an estimator of scikit-learn.

This module imports scikit-learn; ``pyfeat.anomaly`` imports the module on first use.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pyfeat._checks import check_choice
from pyfeat._extras import require
from pyfeat._storage import PathLike, load_tensors, save_tensors
from pyfeat.anomaly._values import real_array
from pyfeat.anomaly.metrics import Threshold, normal_threshold
from pyfeat.anomaly.outlier_logits import (
    Energy,
    KLMatching,
    MaxLogit,
    MaxSoftmax,
    NNGuide,
    ViM,
    fit_head,
    head_of,
)
from pyfeat.anomaly.outlier_scores import (
    Array,
    ClassCosine,
    Head,
    KthNeighbour,
    Labels,
    Mahalanobis,
    ScoreOptions,
    Scorer,
    folds_of,
)

require("sklearn", extra="anomaly", op="FeatureOutlier")
from sklearn.base import BaseEstimator  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import (  # noqa: E402
    check_is_fitted,
    column_or_1d,
    validate_data,
)

FORMAT_VERSION = 1

ScoreName = Literal[
    "knn",
    "mahalanobis",
    "max_cosine",
    "max_softmax",
    "max_logit",
    "energy",
    "kl_matching",
    "nnguide",
    "vim",
]

SCORES: Mapping[ScoreName, type[Scorer]] = {
    "knn": KthNeighbour,
    "mahalanobis": Mahalanobis,
    "max_cosine": ClassCosine,
    "max_softmax": MaxSoftmax,
    "max_logit": MaxLogit,
    "energy": Energy,
    "kl_matching": KLMatching,
    "nnguide": NNGuide,
    "vim": ViM,
}

_OPTIONS = [field.name for field in dataclasses.fields(ScoreOptions)]


class FeatureOutlier(BaseEstimator):
    """Tell features of a known distribution from those of any other, without an example of these.

    Take "knn" unless there is a reason not to: where the backbone knows the foreign inputs from its
    own pre-training, a classifier on its features calls them by the names of known classes, with
    confidence, so that scores of its logits fail; distances in feature space do not.

    The threshold is set by ``fit`` so that a share ``false_alarm_rate`` of unseen rows like X falls
    below it. Every row of X is judged as if it had been left out: for "knn" exactly so, itself
    excluded and copies of it not; for scores that are fitted by folds, all of which but the row's
    own are fitted to; for scores of the logits of a given ``head`` as they are. ``calibrate`` with
    rows that neither ``fit`` nor the head has seen gives a guarantee instead.

    There is no ``fit_predict``: a row of X finds itself, so ``predict(X)`` flatters X;
    ``left_out_scores_`` holds the honest scores.

    Args:
        method: Of scoring: "knn", distance to the k-th neighbour; "mahalanobis", to the nearest class mean;
            "max_cosine", to the nearest mean direction; of the logits of a linear classifier
            "max_softmax", "max_logit", "energy" and "kl_matching"; with the features, "nnguide" and
            "vim". All are larger for rows that are more like X.
        k: Neighbours of "knn" and "nnguide", at least 1 and below the rows kept; None takes the
            square root of the rows of a class (of all rows where y is not given).
        normalize: Whether "knn" compares directions; much weaker without, for most backbones.
        coreset_ratio: Share of X that "knn" keeps as a k-centre greedy coreset, in (0, 1].
        shrinkage: Of the covariance of "mahalanobis" to a multiple of the identity, in [0, 1]; None
            is the estimate of Ledoit and Wolf.
        temperature: T of the energy ``T logsumexp(logits / T)``, above 0.
        principal: Dimension of the space outside which "vim" measures, in [0, D); None is D // 2.
        head: The classifier: an ``nn.Linear``, or weight (C, D) and bias (C,). None fits one to y:
            mean cross-entropy, and ``head_l2 / 2`` of the squared weights of scaled features.
        head_l2: See ``head``; above 0.
        folds: Of the scores that are fitted, for the threshold; at least 2.
        false_alarm_rate: Of the threshold, in (0, 1).
        seed: Of the folds and of the coreset; equal seeds give equal models.

    Attributes:
        n_features_in_: D.
        k_: Neighbours that count, None for scores without.
        left_out_scores_: (N,) float64, of the rows of X.
        threshold_: As ``pyfeat.anomaly.normal_threshold`` of the negative scores.
        offset_: Its negative: what ``decision_function`` subtracts from the scores.
        scorer_: The fitted score.

    Raises:
        ImportError: On import, if scikit-learn is not installed.

    Memory: X, and for "knn" no distances but the k nearest of each row.
    Source: Miyai et al., Can pre-trained networks detect familiar out-of-distribution data?, 2023,
    arXiv:2310.00847, which names "knn" as the remedy; its k, the default of k, and how the
    threshold is set are choices made here. For each score see its class.

    Examples:
        >>> known = np.random.default_rng(0).normal([5.0, 0.0], 1.0, (200, 2))
        >>> FeatureOutlier().fit(known).predict([[5.0, 0.5], [-5.0, 0.0]])
        array([ 1, -1])
    """

    def __init__(
        self,
        method: ScoreName = "knn",
        *,
        k: int | None = None,
        normalize: bool = True,
        coreset_ratio: float = 1.0,
        shrinkage: float | None = None,
        temperature: float = 1.0,
        principal: int | None = None,
        head: "nn.Linear | tuple[Any, Any] | None" = None,
        head_l2: float = 1e-3,
        folds: int = 5,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.method = method
        self.k = k
        self.normalize = normalize
        self.coreset_ratio = coreset_ratio
        self.shrinkage = shrinkage
        self.temperature = temperature
        self.principal = principal
        self.head = head
        self.head_l2 = head_l2
        self.folds = folds
        self.false_alarm_rate = false_alarm_rate
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> "FeatureOutlier":
        """Learn what is known.

        Args:
            X: (N, D) finite features, an array or a tensor; N >= 2.
            y: (N,) classes, at least two of two rows each, for scores that use them: those of
                logits need them where no head is given, "mahalanobis" and "max_cosine" take one
                mean without them, and the others take only their number, for the default of k.

        Returns:
            The estimator itself.

        Raises:
            ValueError: If a parameter or an argument is not as described.
        """
        x = validate_data(self, _as_array(X), dtype=[np.float64, np.float32], ensure_min_samples=2)
        self._check_parameters(len(x), x.shape[1])
        labels = self._labels(y, len(x))
        options = ScoreOptions(**{name: getattr(self, name) for name in _OPTIONS})
        head = head_of(self.head, x.shape[1])
        scorer = self._fitted(x, labels, head, options)
        left_out = scorer.left_out(x)
        if left_out is None:
            left_out = self._across_folds(scorer, x, labels, head, options)
        self.scorer_, self.k_ = scorer, getattr(scorer, "k", None)
        self.left_out_scores_ = left_out.astype(np.float64)
        self._set_threshold(self.left_out_scores_)
        return self

    def calibrate(self, X: Any) -> Threshold:
        """Set the threshold from known rows (M, D) that were not learned from.

        Returns:
            The threshold, with the rate that it guarantees for rows like these.

        Raises:
            ValueError: If X is not as described.
        """
        self._set_threshold(self.score_samples(X))
        return self.threshold_

    def score_samples(self, X: Any) -> npt.NDArray[np.float64]:
        """Score rows (M, D): (M,) float64, larger for those more like the known ones."""
        check_is_fitted(self)
        x = validate_data(self, _as_array(X), dtype=[np.float64, np.float32], reset=False)
        return self.scorer_.score(x).astype(np.float64)

    def decision_function(self, X: Any) -> npt.NDArray[np.float64]:
        """Scores less the threshold: negative for outliers, (M,) float64."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """Return 1 for rows (M, D) like the known ones and -1 for outliers, (M,) int64."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def save(self, path: PathLike) -> None:
        """Write the fitted estimator to one safetensors file, aside first and then renamed.

        Raises:
            FileNotFoundError: If the folder of ``path`` does not exist.
            ImportError: If safetensors is not installed.
        """
        check_is_fitted(self)
        state: dict[str, Array] = {"left_out_scores_": self.left_out_scores_}
        numbers = {}
        for name, value in self.scorer_.arrays().items():
            if isinstance(value, np.ndarray):
                state[f"scorer.{name}"] = value
            else:
                numbers[name] = _plain(value)
        head = head_of(self.head, self.n_features_in_)
        if head is not None:
            state["head.weight"], state["head.bias"] = head
        parameters = {k: v for k, v in self.get_params(deep=False).items() if k != "head"}
        header = {
            "parameters": {k: _plain(v) for k, v in parameters.items()},
            "scorer": numbers,
            "threshold": dataclasses.asdict(self.threshold_),
            "k": self.k_,
            "n_features_in": self.n_features_in_,
            "feature_names_in": list(getattr(self, "feature_names_in_", [])),
        }
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()}
        save_tensors(path, tensors, kind="FeatureOutlier", version=FORMAT_VERSION, header=header)

    @classmethod
    def load(cls, path: PathLike) -> "FeatureOutlier":
        """Read an estimator that ``save`` wrote; a head is read as weight and bias.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is cut off, damaged, no such estimator, or of a newer version.
            ImportError: If safetensors is not installed.
        """
        tensors, header = load_tensors(path, kind="FeatureOutlier", version=FORMAT_VERSION)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        try:
            has_head = "head.weight" in arrays
            head = (arrays["head.weight"], arrays["head.bias"]) if has_head else None
            model = cls(**header["parameters"], head=head)
            own = {
                name.removeprefix("scorer."): array
                for name, array in arrays.items()
                if name.startswith("scorer.")
            }
            model.scorer_ = SCORES[model.method](**own, **header["scorer"])
            model.k_, model.n_features_in_ = header["k"], int(header["n_features_in"])
            if header["feature_names_in"]:
                model.feature_names_in_ = np.array(header["feature_names_in"], dtype=object)
            model.left_out_scores_ = arrays["left_out_scores_"]
            model.threshold_ = Threshold(**header["threshold"])
            model.offset_ = -model.threshold_.value
        except (KeyError, TypeError) as error:
            message = f"FeatureOutlier.load: path must hold a whole estimator, got {Path(path)} ({error!r})"
            raise ValueError(message) from error
        return model

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.estimator_type = "outlier_detector"
        return tags

    def _check_parameters(self, num_rows: int, dim: int) -> None:
        op = "FeatureOutlier"
        check_choice(op, "method", self.method, SCORES)
        for name, holds, expected in (
            ("k", self.k is None or self.k >= 1, "be at least 1"),
            ("coreset_ratio", 0 < self.coreset_ratio <= 1, "be in (0, 1]"),
            ("shrinkage", self.shrinkage is None or 0 <= self.shrinkage <= 1, "be in [0, 1]"),
            ("temperature", self.temperature > 0, "be above 0"),
            ("principal", self.principal is None or 0 <= self.principal < dim, f"be in [0, {dim})"),
            ("head_l2", self.head_l2 > 0, "be above 0"),
            ("folds", self.folds >= 2, "be at least 2"),
            ("false_alarm_rate", 0 < self.false_alarm_rate < 1, "be in (0, 1)"),
        ):
            if not holds:
                message = f"{op}: {name} must {expected}, got {getattr(self, name)!r}"
                raise ValueError(message)
        # What is left of the rows where a fold, or the row itself, is left out.
        kept = max(2, round(self.coreset_ratio * num_rows)) if self.method == "knn" else num_rows
        left = kept - 1 if self.method == "knn" else num_rows - -(-num_rows // self.folds)
        if self.method in ("knn", "nnguide") and self.k is not None and self.k > left:
            message = f"{op}: k must be at most {left} for {num_rows} rows, got {self.k}"
            raise ValueError(message)

    def _labels(self, y: Any, num_rows: int) -> Labels | None:
        """Classes as numbers from 0, checked where the score depends on them."""
        scorer = SCORES[self.method]
        fits_head = scorer.uses_head and self.head is None
        if y is None:
            if fits_head:
                message = (
                    f"FeatureOutlier.fit: y must be given for method {self.method!r} without a head, "
                    f"got None"
                )
                raise ValueError(message)
            return None
        values = column_or_1d(_as_array(y))
        if len(values) != num_rows:
            message = f"FeatureOutlier.fit: y must have shape ({num_rows},), got {values.shape}"
            raise ValueError(message)
        if fits_head or scorer.uses_labels:
            check_classification_targets(values)
        codes: Labels = np.unique(values, return_inverse=True)[1]
        if fits_head and (len(counts := np.bincount(codes)) < 2 or counts.min() < 2):
            message = (
                f"FeatureOutlier.fit: y must hold at least 2 classes of 2 rows each, got "
                f"{len(counts)} {'class' if len(counts) == 1 else 'classes'} of "
                f"{counts.min()} rows or more"
            )
            raise ValueError(message)
        return codes

    def _fitted(
        self, x: Array, labels: Labels | None, head: Head | None, options: ScoreOptions
    ) -> Scorer:
        scorer = SCORES[self.method]
        if scorer.uses_head and head is None and labels is not None:
            head = fit_head(x, labels, l2=self.head_l2)
        return scorer.fit(x, labels, head, options)

    def _across_folds(
        self,
        scorer: Scorer,
        x: Array,
        labels: Labels | None,
        head: Head | None,
        options: ScoreOptions,
    ) -> Array:
        """Scores of the rows, each by a score that is fitted to the folds without it."""
        if head is not None and not scorer.is_fitted_to_rows:
            return scorer.score(x)
        scores = np.empty(len(x))
        for rest, fold in folds_of(len(x), labels, self.folds, self.seed):
            own = None if labels is None else labels[rest]
            scores[fold] = self._fitted(x[rest], own, head, options).score(x[fold])
        return scores

    def _set_threshold(self, scores: Array) -> None:
        self.threshold_ = normal_threshold(-scores, false_alarm_rate=self.false_alarm_rate)
        self.offset_ = -self.threshold_.value


def _as_array(values: Any) -> Any:
    """Tensors as arrays; scikit-learn reads everything else itself."""
    return (
        real_array(values, name="X", op="FeatureOutlier") if isinstance(values, Tensor) else values
    )


def _plain(value: Any) -> Any:
    """NumPy's scalars as those of Python, which JSON knows."""
    return value.item() if isinstance(value, np.generic) else value
