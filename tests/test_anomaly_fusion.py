"""Fusion of the scores of several banks: what each kind weighs, and what it learned from."""

import json
import math
from typing import Any

import pytest
import torch

from pyfeat.anomaly.fusion import FUSIONS, FusionKind, ScoreFusion


def normal_scores(count: int = 200) -> torch.Tensor:
    """(n, 2): the second bank has ten times the scale and another level."""
    return torch.rand(count, 2) * torch.tensor([1.0, 10.0]) + torch.tensor([2.0, 50.0])


def test_the_weighted_kind_measures_in_spreads_of_normal_scores() -> None:
    normal = normal_scores()
    fusion = ScoreFusion("weighted", weights=(3, 1)).fit(normal)
    scores = torch.tensor([[2.5, 80.0], [4.0, 55.0]])
    standard = (scores - normal.mean(dim=0)) / normal.std(dim=0)
    expected = standard @ torch.tensor([0.75, 0.25])
    assert torch.allclose(fusion.images(scores), expected, atol=1e-4)
    assert abs(float(fusion.images(normal).mean())) < 1e-4
    # Equal in spreads, the two banks count alike whatever their scale.
    even = ScoreFusion("weighted").fit(normal)
    one, other = even.images(normal.mean(dim=0) + normal.std(dim=0) * torch.eye(2))
    assert float(one) == pytest.approx(float(other), rel=1e-4)


def test_the_mean_takes_scores_as_they_are() -> None:
    fusion = ScoreFusion("mean", weights=(1, 3)).fit(normal_scores())
    assert fusion.images(torch.tensor([4.0, 8.0])).item() == 7.0


def test_the_svm_grows_with_every_score_and_is_its_product_with_them() -> None:
    from sklearn.linear_model import SGDOneClassSVM

    normal = normal_scores()
    weights = torch.tensor([1.0, 0.1])
    fusion = ScoreFusion("one_class_svm", weights=weights.tolist(), seed=3).fit(normal)
    machine = SGDOneClassSVM(nu=0.5, random_state=3, max_iter=1000)
    machine.fit((normal.double() * weights.double()).numpy())
    scores = torch.tensor([[2.5, 60.0], [2.6, 60.0], [2.5, 70.0]])
    expected = machine.score_samples((scores * weights).double().numpy())
    found = fusion.images(scores)
    assert torch.allclose(found.double(), torch.from_numpy(expected), rtol=1e-4)
    assert found[1] > found[0]
    assert found[2] > found[0]


@pytest.mark.parametrize("kind", FUSIONS)
def test_pixels_have_a_fusion_of_their_own(kind: FusionKind) -> None:
    images, pixels = normal_scores(), normal_scores(500) * 0.3
    fusion = ScoreFusion(kind).fit(images, pixels)
    other = ScoreFusion(kind).fit(pixels)
    maps = torch.rand(3, 4, 4, 2)
    assert fusion.pixels(maps).shape == (3, 4, 4)
    assert torch.allclose(fusion.pixels(maps), other.images(maps))


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_survives_json(kind: FusionKind) -> None:
    fusion = ScoreFusion(kind, weights=(1, 2), seed=5).fit(normal_scores(), normal_scores(50))
    again = ScoreFusion.from_state(json.loads(json.dumps(fusion.state())))
    scores = torch.rand(7, 2)
    assert torch.equal(again.images(scores), fusion.images(scores))
    assert torch.equal(again.pixels(scores), fusion.pixels(scores))
    assert again.state() == fusion.state()


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_single_bank_or_sample_leaves_scores_as_they_are(kind: FusionKind) -> None:
    scores = torch.rand(5, 1)
    assert torch.equal(ScoreFusion(kind).fit(torch.rand(9, 1)).images(scores), scores[:, 0])
    both = torch.rand(5, 2)
    alone = ScoreFusion(kind).fit(normal_scores(1), normal_scores(40))
    assert torch.allclose(alone.images(both), both.mean(dim=1))
    assert torch.allclose(alone.pixels(both), both.mean(dim=1))


def test_a_bank_whose_scores_are_all_equal_is_no_trouble() -> None:
    normal = normal_scores()
    normal[:, 0] = 0.0
    assert ScoreFusion().fit(normal).images(torch.tensor([1.0, 55.0])).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vote"}, "kind must be one of"),
        ({"weights": (-1.0, 2.0)}, "weights must be at least 0 and not all 0"),
        ({"weights": (math.nan, 2.0)}, "weights must be at least 0 and not all 0"),
        ({"weights": ()}, "weights must be at least 0 and not all 0"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ScoreFusion: {message}"):
        ScoreFusion(**options)


def test_scores_that_cannot_be_learned_from_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(n, 3\), got \(4, 2\)"):
        ScoreFusion(weights=(1, 1, 1)).fit(torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"pixels must have shape \(n, 2\), got \(4, 3\)"):
        ScoreFusion().fit(torch.rand(4, 2), torch.rand(4, 3))
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity"):
        ScoreFusion().fit(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match="ScoreFusion: fusion must be fitted first, got none"):
        ScoreFusion().images(torch.rand(4, 2))
