"""Kinds of images that are learned together, each with scores of its own scale."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pyfeat.anomaly.image_kinds import ImageKinds, find_kinds
from pyfeat.anomaly.metrics import image_auroc, normal_threshold
from pyfeat.anomaly.patchcore import PatchCore
from tests.support_anomaly import Images, Means, model, plates, scratched


def clouds(counts: tuple[int, ...]) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.cat(
        [torch.randn(n, 4, generator=random) + 20 * kind for kind, n in enumerate(counts)]
    )


def test_kinds_are_the_means_of_the_clouds() -> None:
    features = clouds((30, 7, 12))
    order = torch.randperm(49, generator=torch.Generator().manual_seed(1))
    found = find_kinds(features[order], 3)
    expected = torch.stack(
        [part.mean(dim=0) for part in (features[:30], features[30:37], features[37:])]
    )
    assert torch.allclose(found[found[:, 0].argsort()], expected, atol=1e-5)
    assert torch.equal(find_kinds(features[order], 3), found)
    assert torch.allclose(find_kinds(features, 1), features.mean(dim=0, keepdim=True), atol=1e-5)


def test_every_centre_is_the_mean_of_the_images_nearest_to_it() -> None:
    features = torch.rand(200, 3, generator=torch.Generator().manual_seed(2))
    centres = find_kinds(features, 4)
    nearest = torch.cdist(features, centres).argmin(dim=1)
    means = torch.stack([features[nearest == kind].mean(dim=0) for kind in range(4)])
    assert torch.allclose(centres, means, atol=1e-5)


def test_no_more_kinds_are_found_than_there_are_images() -> None:
    assert len(find_kinds(clouds((2,)), 5)) == 2
    assert find_kinds(torch.ones(4, 3), 3).tolist() == [[1.0, 1.0, 1.0]]


def test_scores_are_standardised_among_their_own() -> None:
    centres = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    features = torch.tensor([[0.1, 0.0], [9.0, 8.0], [0.0, 0.3], [8.0, 9.0], [0.0, 0.0]])
    scores = torch.tensor([1.0, 50.0, math.e, 200.0, math.e**2])
    scales = ImageKinds.fitted(centres, scores, features)
    assert scales.means.tolist() == pytest.approx([1.0, math.log(100.0)])
    assert scales.spreads.tolist() == pytest.approx([1.0, math.log(4.0) / math.sqrt(2)], rel=1e-6)
    found = scales.relative(torch.tensor([math.e**3, 100.0, 0.0]), features[:3])
    assert found[:2].tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
    assert found[2].isfinite()
    again = ImageKinds.from_state(scales.state())
    assert torch.equal(again.relative(scores, features), scales.relative(scores, features))


def test_kinds_with_too_few_scores_take_the_spread_of_all() -> None:
    centres = torch.tensor([[0.0], [9.0], [99.0]])
    features = torch.tensor([[0.0], [0.0], [9.0]])
    scales = ImageKinds.fitted(centres, torch.tensor([1.0, math.e**2, math.e**4]), features)
    assert scales.means.tolist() == pytest.approx([1.0, 4.0, 2.0])
    assert scales.spreads.tolist() == pytest.approx([math.sqrt(2), 2.0, 2.0])
    nothing = ImageKinds.fitted(centres, torch.empty(0), torch.empty(0, 1))
    assert nothing.spreads.tolist() == [1.0, 1.0, 1.0]
    flat = ImageKinds.fitted(centres[:1], torch.ones(3), features)
    assert (flat.means.tolist(), flat.spreads.tolist()) == ([0.0], [1.0])


def coarse(count: int, seed: int) -> Images:
    """Bright plates with coarse grain of many colours."""
    random = np.random.default_rng(seed)
    grain = random.normal(0, 30, (count, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (170 + grain).clip(0, 255).astype(np.uint8)


def mixed(count: int, seed: int) -> Images:
    """Plates and coarse ones in turns."""
    images = np.stack([plates(count, seed), coarse(count, seed + 50)], axis=1)
    return images.reshape(-1, *images.shape[2:])


def fitted(kinds: int) -> PatchCore:
    return model(Means(), neighbourhood=1, scoring="official", kinds=kinds).fit(mixed(20, seed=1))


def test_a_coarse_kind_does_not_outrank_the_defects_of_a_fine_one() -> None:
    good = mixed(12, seed=2)
    bad = scratched(plates(10, seed=3), slice(16, 24), slice(16, 24))
    bad = (0.25 * bad + 0.75 * plates(10, seed=3)).astype(np.uint8)
    labels = [0] * len(good) + [1] * len(bad)
    one, two = (
        image_auroc(labels, fitted(kinds).score(np.concatenate([good, bad])).scores)
        for kinds in (1, 2)
    )
    assert one < 0.9
    assert two > one + 0.05


def test_scores_of_normal_images_have_one_scale_and_a_threshold_of_it(tmp_path: Path) -> None:
    model_ = fitted(2)
    assert model_.scales is not None
    assert len(model_.scales.centres) == 2
    normal = torch.tensor(model_.normal_scores.images).view(-1, 2)  # of both kinds
    assert normal.mean(dim=0).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert normal.std(dim=0).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    expected = normal_threshold(model_.normal_scores.images, false_alarm_rate=0.05)
    assert model_.threshold == expected
    model_.save(tmp_path / "model")
    loaded = PatchCore.load(tmp_path / "model", backbone=model_.backbone)
    test = mixed(3, seed=4)
    assert loaded.kinds == 2
    assert torch.equal(loaded.score(test).scores, model_.score(test).scores)
    before = model_.score(test[:1]).scores
    model_.partial_fit(test[:1])
    assert model_.normal_scores.images[-1] == float(before)


def test_one_kind_leaves_the_scores_as_published() -> None:
    model_ = fitted(1)
    assert model_.scales is None
    assert model_.score(mixed(2, seed=2)).scores.min() >= 0


def test_kinds_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="kinds must be at least 1, got 0"):
        model(Means(), kinds=0)
