"""The study of pre-trainings and its diagnosis, on features of which the answer is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("sklearn")

from pyfeat.anomaly import FeatureOutlier
from pyfeat.anomaly.metrics import fpr_at_tpr, image_auroc
from pyfeat.anomaly.outlier_study import (
    OutlierTask,
    compare_encoders,
    diagnose,
    study_table,
)

Array = npt.NDArray[np.float64]


def inputs(count: int, seed: int, *, offset: float = 0.0) -> tuple[Array, npt.NDArray[Any]]:
    """Two classes along the first axis; foreign inputs lie ``offset`` along the second."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    rows = rng.normal(0, 0.5, (count, 4))
    rows[:, 0] += 4 * labels - 2
    rows[:, 1] += offset
    return rows + 3, labels


def blind(x: Array) -> torch.Tensor:
    """An encoder that drops the axis that tells foreign inputs."""
    return torch.from_numpy(x[:, [0, 2, 3]])


def whole(x: Array) -> Array:
    return x


def constant(features: Array) -> Callable[[Any], Array]:
    def encode(_: Any) -> Array:
        return features

    return encode


def task() -> OutlierTask:
    (train, labels), (test, test_labels) = inputs(80, 0), inputs(60, 1)
    far = inputs(50, 2, offset=5.0)[0]
    copies = np.concatenate([far[:20], train[:3], test[:2]])
    names = np.array(["a", "b"])
    return OutlierTask(
        train, names[labels], test, names[test_labels], {"far": far, "copies": copies}
    )


def test_the_study_has_a_row_for_every_encoder_set_and_score() -> None:
    scores: Any = ("max_softmax", "knn")
    results = compare_encoders({"whole": whole, "blind": blind}, {"t": task()}, scores=scores, k=3)
    assert [(r.encoder, r.outliers, r.score) for r in results] == [
        (encoder, outliers, score)
        for encoder in ("whole", "blind")
        for outliers in ("far", "copies")
        for score in scores
    ]
    found = {(r.encoder, r.outliers, r.score): r for r in results}
    assert found["whole", "far", "knn"].auroc == 1.0
    assert found["whole", "far", "knn"].fpr95 == 0.0
    assert abs(found["blind", "far", "knn"].auroc - 0.5) < 0.15
    assert abs(found["whole", "far", "max_softmax"].auroc - 0.5) < 0.3
    assert [r.shared for r in results] == [0, 0, 5, 5, 0, 0, 5, 5]
    assert all(r.accuracy == 1.0 and r.task == "t" for r in results)


def test_a_row_of_the_study_is_what_the_estimator_says() -> None:
    given = task()
    (row,) = [
        r
        for r in compare_encoders({"w": whole}, {"t": given}, scores=("energy",), head_l2=0.1)
        if r.outliers == "copies"
    ]
    model = FeatureOutlier("energy", head_l2=0.1).fit(given.train, given.labels)
    known, foreign = (model.score_samples(x) for x in (given.test, given.outliers["copies"]))
    truth = [0] * len(known) + [1] * len(foreign)
    assert row.auroc == image_auroc(truth, -np.concatenate([known, foreign]))
    assert row.fpr95 == fpr_at_tpr(truth, -np.concatenate([known, foreign]))
    assert row.accepted == (model.predict(given.test) == 1).mean()
    table = study_table([row]).splitlines()
    assert table[0].startswith("| encoder | task | outliers | score | AUROC | FPR@95 |")
    assert table[2].startswith(f"| w | t | copies | energy | {row.auroc:.3f} | {row.fpr95:.3f} |")
    assert table[2].count("|") == table[1].count("|") == table[0].count("|")


def test_features_that_are_none_are_refused() -> None:
    given: list[Array] = [np.zeros(4), np.full((3, 2), np.nan), np.zeros((1, 2))]
    for bad in given:
        with pytest.raises(ValueError, match=r"compare_encoders: features must be finite, of sh"):
            compare_encoders({"bad": constant(bad)}, {"t": task()})
        with pytest.raises(ValueError, match=r"diagnose: features must be finite, of shape"):
            diagnose(bad, [0, 1], bad, bad)


def test_the_diagnosis_tells_separable_sets_from_others() -> None:
    train, labels = inputs(80, 0)
    test = inputs(60, 1)[0]
    far, far_labels = inputs(40, 2, offset=5.0)
    near = inputs(40, 3)[0]
    apart = diagnose(train, labels, test, far, outlier_labels=far_labels)
    mixed = diagnose(train, labels, test, near, outlier_labels=np.arange(40) // 20)
    assert apart.separability > 0.97
    assert mixed.separability < 0.65
    assert apart.class_separability == 1.0
    assert mixed.class_separability is not None
    assert mixed.class_separability < 0.75
    assert apart.landings.tolist() == [20, 20]
    assert diagnose(train, labels, test, near).class_separability is None


def test_confidence_above_the_median_of_known_rows_is_counted() -> None:
    train, labels = inputs(80, 0)
    test = inputs(61, 1)[0]
    sure, unsure = train.copy(), train.copy()
    sure[:, 0], unsure[:, 0] = 20.0, 3.0
    assert diagnose(train, labels, test, sure).above_median == 1.0
    assert diagnose(train, labels, test, unsure).above_median == 0.0
    assert diagnose(train, labels, test, sure).landings.tolist() == [0, 80]
    assert abs(diagnose(train, labels, test, test).above_median - 0.5) < 0.02


def test_a_diagnosis_judges_rows_that_were_not_fitted_and_counts_every_class() -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(60, 3)) + 20 * np.eye(3)[np.arange(60) % 3]
    # Of one distribution, in more dimensions than rows, a classifier tells apart what it has seen.
    known, foreign = rng.normal(size=(2, 30, 100))
    wide = np.concatenate([train, np.zeros((60, 97))], axis=1)
    found = diagnose(wide, np.arange(60) % 3, known, foreign)
    assert 0.2 < found.separability < 0.8
    nearby = np.full((4, 3), [20.0, 0.0, 0.0]) + rng.normal(size=(4, 3))
    landings = diagnose(train, np.arange(60) % 3, train[:6], nearby).landings
    assert landings.tolist() == [4, 0, 0]
