"""Clusters: k-means against a loop, banks by index, and losses against their formulas."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pyfeat.losses import sinkhorn
from pyfeat.ssl.parts import BalancedClusters, BankClusters, spherical_kmeans


def unit(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape), dim=-1)


def by_loop(features: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, list[int]]:
    centroids = centroids.double()
    for _ in range(iterations):
        nearest = [int((x.double() @ centroids.T).argmax()) for x in features]
        for k in range(len(centroids)):
            members = [features[i].double() for i in range(len(features)) if nearest[i] == k]
            if members:
                centroids[k] = functional.normalize(torch.stack(members).mean(dim=0), dim=0)
    return centroids, [int((x.double() @ centroids.T).argmax()) for x in features]


@pytest.mark.parametrize(
    ("num", "clusters", "iterations"), [(1, 1, 3), (31, 5, 0), (60, 7, 1), (257, 9, 10)]
)
def test_k_means_is_that_of_a_loop(num: int, clusters: int, iterations: int) -> None:
    features = unit(num, 6)
    first = features[torch.randperm(num)[:clusters]]
    centroids, nearest = spherical_kmeans(features, first, iterations)
    expected, indices = by_loop(features, first, iterations)
    torch.testing.assert_close(centroids.double(), expected, atol=1e-6, rtol=0)
    assert nearest.tolist() == indices


def test_a_cluster_without_members_keeps_its_centroid() -> None:
    features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0]])
    first = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    centroids, nearest = spherical_kmeans(features, first, 5)
    assert torch.equal(centroids[1], first[1])
    assert nearest.tolist() == [0, 0, 0]
    opposite = torch.tensor([[0.0, 1.0], [0.0, -1.0]])  # the members cancel out
    assert torch.equal(spherical_kmeans(opposite, first[:1], 3)[0], first[:1])


def test_balanced_clusters_predict_the_assignment_of_the_other_view() -> None:
    clusters = BalancedClusters((7, 5), 4, temperature=0.2, epsilon=0.1, iterations=4)
    views = unit(2, 6, 4)
    loss = clusters(list(views), torch.arange(6))
    expected = []
    for head in clusters.prototypes:
        scores = [view @ head.weight.detach().T for view in views]
        codes = [sinkhorn(x, epsilon=0.1, iterations=4) for x in scores]
        torch.testing.assert_close(codes[0].sum(dim=1), torch.ones(6), atol=1e-5, rtol=0)
        share = torch.full((len(head.weight),), 6 / len(head.weight))
        torch.testing.assert_close(codes[0].sum(dim=0), share, atol=0.3, rtol=0)
        expected += [
            -(codes[i] * (scores[1 - i] / 0.2).log_softmax(dim=1)).sum(dim=1).mean() for i in (0, 1)
        ]
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["balanced", "bank"])
def test_clusters_are_frozen_at_first(form: str) -> None:
    options = {"frozen_steps": 2}
    clusters = (
        BalancedClusters((3,), 4, **options)
        if form == "balanced"
        else BankClusters(6, (3,), 4, **options)
    )
    views, index = unit(2, 6, 4), torch.arange(6)
    clusters(list(views), index)
    clusters.after_step()
    clusters.start_epoch(1)
    for step in range(3):
        clusters.zero_grad()
        clusters(list(unit(2, 6, 4)), index).backward()
        clusters.freeze(step)
        assert (clusters.prototypes[0].weight.grad is None) == (step < 2)
    with torch.no_grad():
        clusters.prototypes[0].weight.mul_(3.0)
    clusters.after_step()
    length = 1.0 if form == "balanced" else 3.0  # centroids are not touched
    norms = clusters.prototypes[0].weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), length))


def test_banks_are_kept_by_index_and_alternate_between_heads() -> None:
    clusters = BankClusters(9, (3, 3, 2), 4, temperature=0.3, iterations=5)
    first, second = unit(9, 4), unit(9, 4)
    for index in (torch.tensor([4, 0, 7, 2]), torch.tensor([1, 3, 8, 4])):  # 4 twice, 5 and 6 never
        views = [first[index], second[index]]
        loss = clusters(views, index)
        assert loss.item() == 0.0  # nothing is assigned in the first epoch
        assert not clusters.seen[index].all()
        clusters.after_step()
        assert torch.equal(clusters.banks[:, index], torch.stack(views))
    clusters.start_epoch(1)
    seen = torch.tensor([0, 1, 2, 3, 4, 7, 8])
    assert clusters.seen.nonzero()[:, 0].tolist() == seen.tolist()
    for t, head in enumerate(clusters.prototypes):
        bank = (first, second)[t % 2][seen]
        # The centroids are at rest, or on the way: one more round from them must do what k-means does.
        again, nearest = spherical_kmeans(bank, head.weight.detach(), 0)
        assert torch.equal(again, head.weight)
        assert clusters.assigned[t, seen].tolist() == nearest.tolist()
        assert clusters.assigned[t, [5, 6]].tolist() == [-1, -1]
    index = torch.tensor([5, 8, 0])  # the first has no cluster
    views = [unit(3, 4), unit(3, 4)]
    loss = clusters(views, index)
    expected = [
        functional.cross_entropy(view[1:] @ head.weight.T / 0.3, clusters.assigned[t, index[1:]])
        for t, head in enumerate(clusters.prototypes)
        for view in views
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_a_bank_remembers_only_what_is_trained_on() -> None:
    clusters = BankClusters(4, (2,), 3).eval()
    clusters([unit(2, 3), unit(2, 3)], torch.tensor([0, 1]))
    clusters.after_step()
    assert not clusters.seen.any()
    clusters.start_epoch(1)  # fewer samples than clusters
    assert (clusters.assigned == -1).all()
    with pytest.raises(ValueError, match=r"num_clusters must be at most the 4 samples, got \(5,\)"):
        BankClusters(4, (5,), 3)
    with pytest.raises(ValueError, match=r"len\(num_clusters\) must be at least 1, got 0"):
        BalancedClusters((), 3)
