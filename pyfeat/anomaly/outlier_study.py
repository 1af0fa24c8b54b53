"""Which pre-training tells what from what: a table over encoders, tasks and scores, and a diagnosis."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pyfeat.anomaly._values import real_array
from pyfeat.anomaly.metrics import fpr_at_tpr, image_auroc
from pyfeat.anomaly.outlier_logits import fit_head, max_softmax
from pyfeat.anomaly.outlier_scores import Array, Labels, folds_of
from pyfeat.anomaly.outliers import FeatureOutlier, ScoreName
from pyfeat.search import knn


@dataclass(frozen=True, eq=False)
class OutlierTask:
    """What is known, and what has to be told from it; inputs are whatever the encoders take.

    Attributes:
        train: Known inputs to learn from.
        labels: (N,) their classes.
        test: Known inputs that were not learned from.
        test_labels: (M,) their classes.
        outliers: Sets of foreign inputs by name.
    """

    train: Any
    labels: npt.ArrayLike
    test: Any
    test_labels: npt.ArrayLike
    outliers: Mapping[str, Any]


@dataclass(frozen=True)
class OutlierResult:
    """One cell of the study.

    Attributes:
        encoder: Name of the pre-training.
        task: Name of what is known.
        outliers: Name of the foreign set.
        score: Of ``FeatureOutlier``.
        auroc: Of telling the foreign set from the known test inputs, in [0, 1].
        fpr95: Share of the foreign set accepted where 95 % of the known test inputs are.
        accepted: Share of the known test inputs above the threshold that ``fit`` set.
        accuracy: Of a linear classifier on the features, on the known test inputs; encoders are
            comparable where it is similar.
        shared: Foreign inputs whose features are exactly those of a known one, which is a copy
            more often than not; what they do to the figures is not undone.
    """

    encoder: str
    task: str
    outliers: str
    score: str
    auroc: float
    fpr95: float
    accepted: float
    accuracy: float
    shared: int


def compare_encoders(
    encoders: Mapping[str, Callable[[Any], Any]],
    tasks: Mapping[str, OutlierTask],
    *,
    scores: Sequence[ScoreName] = ("max_softmax", "energy", "mahalanobis", "knn"),
    **options: Any,
) -> list[OutlierResult]:
    """Measure how well each score on the features of each encoder finds each foreign set.

    Args:
        encoders: By name, each from the inputs of a task to finite features (n, D); it is called
            once for each set of inputs.
        tasks: By name.
        scores: As of ``FeatureOutlier``.
        options: Further parameters of ``FeatureOutlier``, for all scores.

    Returns:
        A result for each encoder, task, foreign set and score, in this order.

    Raises:
        ValueError: If features or labels are not as described.

    Source: Miyai et al., Can pre-trained networks detect familiar out-of-distribution data?, 2023,
    arXiv:2310.00847: several pre-trainings of one architecture, a linear probe on the known set.
    """
    op = "compare_encoders"
    results = []
    for encoder_name, encode in encoders.items():
        for task_name, task in tasks.items():
            train, test = (_features(encode(inputs), op) for inputs in (task.train, task.test))
            foreign = {name: _features(encode(each), op) for name, each in task.outliers.items()}
            classes, labels = np.unique(np.asarray(task.labels), return_inverse=True)
            head = fit_head(train, labels, l2=options.get("head_l2", 1e-3))
            guesses = classes[head.logits(test).argmax(axis=1)]
            accuracy = float((guesses == np.asarray(task.test_labels)).mean())
            models = {s: FeatureOutlier(s, **options).fit(train, labels) for s in scores}
            known = {score: model.score_samples(test) for score, model in models.items()}
            for name, rows in foreign.items():
                shared = _count_shared(rows, np.concatenate([train, test]))
                for score, model in models.items():
                    truth = np.arange(len(test) + len(rows)) >= len(test)
                    strangeness = -np.concatenate([known[score], model.score_samples(rows)])
                    results.append(
                        OutlierResult(
                            encoder_name,
                            task_name,
                            name,
                            score,
                            image_auroc(truth, strangeness),
                            fpr_at_tpr(truth, strangeness),
                            float((known[score] >= model.offset_).mean()),
                            accuracy,
                            shared,
                        )
                    )
    return results


def study_table(results: Iterable[OutlierResult]) -> str:
    """Return results as a table in Markdown, one line each."""
    head = (
        "encoder",
        "task",
        "outliers",
        "score",
        "AUROC",
        "FPR@95",
        "accepted",
        "accuracy",
        "shared",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for each in results:
        names = (each.encoder, each.task, each.outliers, each.score)
        shares = (each.auroc, each.fpr95, each.accepted, each.accuracy)
        cells = (*names, *(f"{share:.3f}" for share in shares), str(each.shared))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Why scores of logits fail for a foreign set, or why they do not.

    Attributes:
        separability: Balanced accuracy in [0, 1] of a linear classifier of known against foreign,
            on rows that it was not fitted to; 0.5 is chance. Low means that no linear boundary
            keeps the foreign set out: expect logits to fail.
        class_separability: Accuracy of a linear classifier of the foreign set's own classes, on
            rows that it was not fitted to; None without them.
        above_median: Share of foreign rows whose largest probability exceeds that of half of the
            known test rows; 0.5 if confidence tells nothing.
        landings: (C,) int64, how many foreign rows the classifier takes for each known class.
    """

    separability: float
    class_separability: float | None
    above_median: float
    landings: npt.NDArray[np.int64]


def diagnose(
    train: Any,
    labels: npt.ArrayLike,
    test: Any,
    outliers: Any,
    *,
    outlier_labels: npt.ArrayLike | None = None,
    head_l2: float = 1e-3,
    folds: int = 5,
    seed: int = 0,
) -> Diagnosis:
    """Measure what a linear classifier makes of a foreign set.

    Args:
        train: (N, D) features of known inputs.
        labels: (N,) their classes, at least two.
        test: (M, D) of known inputs that were not learned from, M >= 2.
        outliers: (F, D) of foreign inputs, F >= 2.
        outlier_labels: (F,) their own classes, such as those of the pre-training.
        head_l2: Of the classifiers, as of ``FeatureOutlier``.
        folds: By which classifiers are judged, at least 2.
        seed: Of the folds.

    Raises:
        ValueError: If an argument is not as described.
    """
    x, known, foreign = (_features(each, "diagnose") for each in (train, test, outliers))
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    head = fit_head(x, codes, l2=head_l2)
    logits = head.logits(foreign)
    median = np.median(max_softmax(head.logits(known)))
    both = np.concatenate([known, foreign])
    sides = (np.arange(len(both)) >= len(known)).astype(np.int64)
    own = None
    if outlier_labels is not None:
        kinds = np.unique(np.asarray(outlier_labels), return_inverse=True)[1]
        own = float((_guesses(foreign, kinds, head_l2, folds, seed) == kinds).mean())
    right = _guesses(both, sides, head_l2, folds, seed) == sides
    return Diagnosis(
        separability=float((right[sides == 0].mean() + right[sides == 1].mean()) / 2),
        class_separability=own,
        above_median=float((max_softmax(logits) > median).mean()),
        landings=np.bincount(logits.argmax(axis=1), minlength=len(classes)),
    )


def _guesses(x: Array, labels: Labels, l2: float, folds: int, seed: int) -> Labels:
    """Classes of the rows, each by a classifier that was not fitted to it."""
    guesses = np.empty(len(x), np.int64)
    for rest, fold in folds_of(len(x), labels, folds, seed):
        present, codes = np.unique(labels[rest], return_inverse=True)
        logits = fit_head(x[rest], codes, l2=l2).logits(x[fold])
        guesses[fold] = present[logits.argmax(axis=1)]
    return guesses


def _features(values: Any, op: str) -> Array:
    array = real_array(values, name="features", op=op)
    if array.ndim != 2 or len(array) < 2 or not np.isfinite(array).all():
        message = (
            f"{op}: features must be finite, of shape (n, D), n >= 2, "
            f"got {array.dtype} {array.shape}"
        )
        raise ValueError(message)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _count_shared(rows: Array, known: Array) -> int:
    nearest = knn(torch.from_numpy(rows), torch.from_numpy(known.astype(rows.dtype)))
    return int((nearest.distances == 0).sum())
