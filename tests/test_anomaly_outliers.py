"""Scores of features from elsewhere: against their formulas, left out by hand, and as an estimator."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyfeat.anomaly import FeatureOutlier
from pyfeat.anomaly.metrics import fpr_at_tpr, image_auroc, normal_threshold
from pyfeat.anomaly.outlier_logits import energy, fit_head, max_softmax, softmax
from pyfeat.anomaly.outlier_scores import KthNeighbour, directions, folds_of
from pyfeat.anomaly.outliers import SCORES

Array = npt.NDArray[np.float64]
LABELLED = ["max_softmax", "max_logit", "energy", "kl_matching", "nnguide", "vim"]


def blobs(
    count: int, seed: int, *, dim: int = 6, classes: int = 3
) -> tuple[Array, npt.NDArray[Any]]:
    """Rows around one centre a class, far from the origin."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(0, 4, (classes, dim)) + 3
    labels = np.arange(count) % classes
    return centres[labels] + rng.normal(0, 1, (count, dim)), labels


def foreign(count: int, seed: int, dim: int = 6) -> Array:
    return np.random.default_rng(seed).normal(0, 2, (count, dim)) - 6


def kth(rows: Array, memory: Array, k: int) -> Array:
    gaps = np.linalg.norm(rows[:, None] - memory[None], axis=2)
    nearest: Array = np.sort(gaps, axis=1)[:, k - 1]
    return nearest


def unit(x: Array) -> Array:
    rows: Array = x / np.linalg.norm(x, axis=1, keepdims=True)
    return rows


@parametrize_with_checks(  # type: ignore[untyped-decorator]
    [
        FeatureOutlier(),
        FeatureOutlier("knn", normalize=False, coreset_ratio=0.5),
        FeatureOutlier("mahalanobis"),
        FeatureOutlier("max_cosine"),
    ]
)
def test_it_is_an_estimator_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_score_is_the_distance_to_the_kth_neighbour(normalize: bool) -> None:
    (x, _), rows = blobs(60, seed=1), foreign(9, seed=2)
    model = FeatureOutlier(k=5, normalize=normalize).fit(x)
    a, b = (unit(rows), unit(x)) if normalize else (rows, x)
    np.testing.assert_allclose(model.score_samples(rows), -kth(a, b, 5), rtol=1e-12)


@pytest.mark.parametrize("copies", [1, 2, 9], ids="{} copies".format)
@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_a_row_is_left_out_itself_and_its_copies_are_not(copies: int, ratio: float) -> None:
    x = np.concatenate([blobs(40, seed=1)[0], np.repeat(foreign(1, seed=2), copies, axis=0)])
    model = FeatureOutlier(k=3, normalize=False, coreset_ratio=ratio).fit(x)
    assert isinstance(model.scorer_, KthNeighbour)
    kept = set(model.scorer_.kept.tolist())
    assert len(kept) == max(2, round(ratio * len(x)))
    for i, row in enumerate(x):
        others = x[sorted(kept - {i})]
        expected = -kth(row[None], others, 3)
        np.testing.assert_allclose(model.left_out_scores_[i], expected[0], rtol=1e-12, atol=1e-12)


def test_k_is_the_root_of_the_rows_of_a_class() -> None:
    x, y = blobs(75, seed=1)
    assert FeatureOutlier().fit(x).k_ == 9
    assert FeatureOutlier().fit(x, y).k_ == 5
    assert FeatureOutlier().fit(x[:2]).k_ == 1


@pytest.mark.parametrize("score", ["mahalanobis", "max_cosine", *LABELLED])
def test_fitted_scores_are_left_out_by_folds(score: Any) -> None:
    x, y = blobs(60, seed=1)
    model = FeatureOutlier(score, folds=3, seed=4).fit(x, y)
    for rest, fold in folds_of(60, y, 3, 4):
        assert len(fold) == 20
        assert np.bincount(y[fold]).tolist() in ([7, 7, 6], [7, 6, 7], [6, 7, 7])
        refitted = FeatureOutlier(score).fit(x[rest], y[rest])
        expected = refitted.score_samples(x[fold])
        np.testing.assert_allclose(model.left_out_scores_[fold], expected, rtol=1e-9)


@pytest.mark.parametrize("with_labels", [True, False])
def test_mahalanobis_is_its_formula(with_labels: bool) -> None:
    x, y = blobs(90, seed=1)
    model = FeatureOutlier("mahalanobis", shrinkage=0.3).fit(x, y if with_labels else None)
    groups = [x[y == c] for c in range(3)] if with_labels else [x]
    spread = sum((g - g.mean(0)).T @ (g - g.mean(0)) for g in groups) / len(x)
    shrunk = 0.7 * spread + 0.3 * np.trace(spread) / 6 * np.eye(6)
    rows = foreign(7, seed=3)
    gaps = [rows - g.mean(0) for g in groups]
    expected = np.min([np.einsum("md,de,me->m", d, np.linalg.inv(shrunk), d) for d in gaps], axis=0)
    np.testing.assert_allclose(model.score_samples(rows), -expected, rtol=1e-9)


def test_scores_of_logits_are_their_formulas() -> None:
    x, _ = blobs(90, seed=1)
    rng = np.random.default_rng(5)
    weight, bias = rng.normal(0, 1, (3, 6)), rng.normal(0, 1, 3)
    rows = foreign(8, seed=3) / 4
    logits = rows @ weight.T + bias
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    known = x @ weight.T + bias
    q = softmax(known)
    typical = np.stack([q[known.argmax(1) == c].mean(0) for c in np.unique(known.argmax(1))])
    sure = np.log(np.exp(known).sum(1))
    guides = np.sort((unit(rows) @ unit(x).T) * sure, axis=1)[:, -4:].mean(1)
    origin = -np.linalg.pinv(weight) @ bias
    rest = np.linalg.svd(x - origin)[2][2:].T
    scale = known.max(1).mean() / np.linalg.norm((x - origin) @ rest, axis=1).mean()
    lse = np.log(np.exp(logits).sum(1))
    expected: dict[Any, Array] = {
        "max_softmax": p.max(1),
        "max_logit": logits.max(1),
        "energy": 2 * np.log(np.exp(logits / 2).sum(1)),
        "kl_matching": -(p[:, None] * np.log(p[:, None] / typical)).sum(2).min(1),
        "nnguide": lse * guides,
        "vim": lse - scale * np.linalg.norm((rows - origin) @ rest, axis=1),
    }
    assert set(expected) == set(LABELLED)
    linear = nn.Linear(6, 3).double()
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        linear.bias.copy_(torch.from_numpy(bias))
    for score, values in expected.items():
        temperature = 2.0 if score == "energy" else 1.0
        options: Any = {"k": 4, "principal": 2, "temperature": temperature}
        for head in (linear, (weight, bias)):
            model = FeatureOutlier(score, head=head, **options).fit(x)
            np.testing.assert_allclose(model.score_samples(rows), values, rtol=1e-9, atol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, -1e4]])
    np.testing.assert_allclose(energy(logits), [1e4, -1e4 + np.log(2)])
    np.testing.assert_allclose(max_softmax(logits), [1.0, 0.5])


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_is_a_logistic_regression_on_scaled_features(classes: int) -> None:
    x, y = blobs(90, seed=1, classes=classes)
    x = np.concatenate([x * 100, np.full((90, 1), 7.0)], axis=1)  # a constant column too
    head = fit_head(x, y, l2=0.01)
    assert head.weight.shape == (classes, 7)
    scaled = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    model = LogisticRegression(C=1 / 0.9, max_iter=2000).fit(scaled, y)
    expected = model.predict_proba(scaled)
    np.testing.assert_allclose(softmax(head.logits(x)), expected, atol=1e-3)
    np.testing.assert_allclose(head.logits(x).sum(1), 0, atol=0.05)


def test_directions_do_not_depend_on_the_scale() -> None:
    x = np.array([[3.0, 4.0], [3e200, 4e200], [3e-200, 4e-200], [0.0, 0.0]])
    np.testing.assert_allclose(directions(x), [[0.6, 0.8]] * 3 + [[0.0, 0.0]], rtol=1e-15)


@pytest.mark.parametrize("score", SCORES)
def test_unseen_known_rows_are_accepted_as_often_as_asked(score: Any) -> None:
    accepted, found = [], []
    for seed in range(4):
        x, y = blobs(300, seed=seed)
        model = FeatureOutlier(score, false_alarm_rate=0.1).fit(x, y)
        accepted.append((model.predict(blobs(600, seed=seed + 50)[0]) == 1).mean())
        found.append((model.predict(foreign(100, seed)) == -1).mean())
        expected = normal_threshold(-model.left_out_scores_, false_alarm_rate=0.1)
        assert model.threshold_ == expected
        assert model.offset_ == -expected.value
    assert abs(np.mean(accepted) - 0.9) < 0.035
    if score in ("knn", "mahalanobis", "max_cosine"):
        assert np.mean(found) > 0.95


def test_calibration_on_held_out_rows_sets_the_threshold() -> None:
    model = FeatureOutlier().fit(blobs(50, seed=1)[0])
    held_out = blobs(80, seed=2)[0]
    threshold = model.calibrate(held_out)
    assert threshold == normal_threshold(-model.score_samples(held_out), false_alarm_rate=0.05)
    assert model.threshold_ == threshold
    assert model.offset_ == -threshold.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_count_like_arrays(dtype: torch.dtype) -> None:
    x = torch.from_numpy(blobs(40, seed=1)[0]).to(dtype)
    model = FeatureOutlier().fit(x.requires_grad_())
    same = FeatureOutlier().fit(
        x.detach().double().numpy() if dtype == torch.float64 else x.detach().float().numpy()
    )
    np.testing.assert_array_equal(model.score_samples(x), same.score_samples(x))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("own_head", [True, False])
def test_a_saved_estimator_is_the_same(score: Any, own_head: bool, tmp_path: Path) -> None:
    x, y = blobs(60, seed=1)
    head = nn.Linear(6, 4, bias=False) if own_head else None
    options: dict[str, Any] = {"k": np.int64(4), "coreset_ratio": np.float64(0.5)}
    model = FeatureOutlier(score, head=head, **options).fit(x, y)
    model.save(tmp_path / "model.safetensors")
    loaded = FeatureOutlier.load(tmp_path / "model.safetensors")
    rows = foreign(20, seed=3)
    np.testing.assert_array_equal(loaded.score_samples(rows), model.score_samples(rows))
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    np.testing.assert_array_equal(loaded.left_out_scores_, model.left_out_scores_)
    assert (loaded.threshold_, loaded.k_) == (model.threshold_, model.k_)
    ours, theirs = (each.get_params() for each in (loaded, model))
    assert {**ours, "head": None} == {**theirs, "head": None}
    again = clone(loaded).fit(x, y)
    np.testing.assert_allclose(again.score_samples(rows), model.score_samples(rows), rtol=1e-6)


def test_names_of_columns_are_saved(tmp_path: Path) -> None:
    model = FeatureOutlier().fit(blobs(20, seed=1)[0])
    model.feature_names_in_ = np.array(list("abcdef"), dtype=object)
    model.save(tmp_path / "model")
    assert FeatureOutlier.load(tmp_path / "model").feature_names_in_.tolist() == list("abcdef")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from pyfeat.memory import MemoryBank

    MemoryBank(torch.eye(3)).save(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"FeatureOutlier\.load: path must hold a FeatureOutlier"):
        FeatureOutlier.load(tmp_path / "bank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method must be one of 'knn'"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 30}, "k must be at most 29 for 30 rows, got 30"),
        ({"k": 15, "coreset_ratio": 0.5}, "k must be at most 14 for 30 rows, got 15"),
        ({"method": "nnguide", "k": 25}, "k must be at most 24 for 30 rows, got 25"),
        ({"coreset_ratio": 0.0}, r"coreset_ratio must be in \(0, 1\], got 0.0"),
        ({"shrinkage": 1.5}, r"shrinkage must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"principal": 6}, r"principal must be in \[0, 6\), got 6"),
        ({"head_l2": 0.0}, "head_l2 must be above 0"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"false_alarm_rate": 1.0}, r"false_alarm_rate must be in \(0, 1\)"),
        ({"head": (np.ones((2, 5)), np.ones(2))}, r"head must have shapes \(C, 6\)"),
        ({"head": (np.ones((1, 6)), np.ones(1))}, "head must have .* C >= 2"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    x, y = blobs(30, seed=1)
    with pytest.raises(ValueError, match=f"FeatureOutlier: {message}"):
        FeatureOutlier(**options).fit(x, y)


def test_labels_that_do_not_suit_are_refused() -> None:
    x, y = blobs(30, seed=1)
    model = FeatureOutlier("energy")
    for labels, message in (
        (None, "y must be given for method 'energy' without a head"),
        (y[:-1], r"y must have shape \(30,\), got \(29,\)"),
        (np.zeros(30), "y must hold at least 2 classes of 2 rows each, got 1 class"),
        (np.arange(30) == 3, "got 2 classes of 1 rows or more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(x, labels)
    with pytest.raises(ValueError, match="Unknown label type"):
        model.fit(x, np.linspace(0, 1, 30))


def test_features_without_spread_do_not_crash() -> None:
    x = np.ones((12, 3))
    for score in ("knn", "mahalanobis", "max_cosine"):
        model = FeatureOutlier(score).fit(x)
        assert np.isfinite(model.score_samples(np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]]))).all()
        assert model.predict([[1.0, 1.0, 1.0]]) == [1]
        assert model.predict([[0.0, 2.0, 0.0]]) == [-1]


def test_fpr_at_tpr_is_the_share_of_outliers_that_pass_with_the_known() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.4
    scores = np.round(rng.normal(labels * 1.0, 1.0), 1)  # with ties
    for tpr in (0.05, 0.5, 0.95, 1.0):
        # The lowest threshold that accepts enough of the known, searched for.
        thresholds = np.unique(scores)
        lowest = next(t for t in thresholds if (scores[~labels] <= t).mean() >= tpr - 1e-12)
        assert fpr_at_tpr(labels, scores, tpr=tpr) == (scores[labels] <= lowest).mean()
    assert fpr_at_tpr([0, 0, 1], [0.0, 1.0, 2.0]) == 0.0
    assert image_auroc([0, 0, 1], [0.0, 1.0, 2.0]) == 1.0
    # 0.28 of 25 is 7, though 0.28 * 25 > 7 in floats.
    assert fpr_at_tpr([0] * 25 + [1], [*range(25), 6.5], tpr=0.28) == 0.0
    with pytest.raises(ValueError, match=r"fpr_at_tpr: tpr must lie in \(0, 1\], got 0"):
        fpr_at_tpr([0, 1], [0.0, 1.0], tpr=0)
