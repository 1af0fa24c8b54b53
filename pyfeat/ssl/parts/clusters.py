"""Clusters that two views of a sample agree on: balanced in a batch, or found in a bank of features."""

import abc
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyfeat._checks import check_count
from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses import info_nce, swav_loss
from pyfeat.search import knn
from pyfeat.ssl.parts.heads import Prototypes
from pyfeat.ssl.parts.processes import rows_of_all_processes


@torch.no_grad()
def spherical_kmeans(features: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster directions: assign to the largest product, then average and normalise, in turn.

    A cluster without members, or whose members cancel out, keeps its centroid.

    Args:
        features: (N, D) float of length 1, N >= 1.
        centroids: (K, D) to begin with, of length 1 and of the dtype of ``features``.
        iterations: >= 0, of averages.

    Returns:
        Centroids (K, D) and the nearest of each feature, (N,) int64, ties to the lower index.

    Memory: O(N + K D).
    Source: as in Caron et al., SwAV, 2020, arXiv:2006.09882, appendix on DeepCluster-v2.

    Examples:
        >>> rows = nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]))
        >>> spherical_kmeans(rows, rows[1:], 1)
        (tensor([[1., 0.],
                [0., 1.]]), tensor([0, 0, 1]))
    """
    nearest = _nearest(features, centroids)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids, dtype=torch.float64)
        sums.index_add_(0, nearest, features.double())
        lengths = sums.norm(dim=1, keepdim=True)
        # Rounding leaves 1e-16 a member of those that cancel out.
        means = (sums / lengths).to(centroids.dtype)
        centroids = torch.where(lengths > 1e-9 * len(features), means, centroids)
        nearest = _nearest(features, centroids)
    return centroids, nearest


def _nearest(features: Tensor, centroids: Tensor) -> Tensor:
    return knn(features, centroids, 1, metric="inner_product").indices[:, 0]


class Clusters(nn.Module, abc.ABC):
    """One or more heads of clusters, each a table of directions; a loss is the mean over heads.

    Args:
        num_clusters: K of each head.
        dim: D.
        temperature: Of predictions, > 0.
        frozen_steps: As in ``Prototypes``, of every head.

    Attributes:
        heads: The directions (K, D) of each head.

    Raises:
        ValueError: If there are no heads, or a number is out of range.
    """

    def __init__(
        self,
        num_clusters: Sequence[int],
        dim: int,
        *,
        temperature: float = 0.1,
        frozen_steps: int = 0,
    ) -> None:
        super().__init__()
        check_count(type(self).__name__, "len(num_clusters)", len(num_clusters))
        self.temperature = temperature
        self.heads = nn.ModuleList(
            Prototypes(count, dim, frozen_steps=frozen_steps) for count in num_clusters
        )

    @property
    def prototypes(self) -> list[Prototypes]:
        """The heads, by their type."""
        return [cast("Prototypes", head) for head in self.heads]

    @abc.abstractmethod
    def forward(
        self, views: Sequence[Tensor], index: Tensor, group: "dist.ProcessGroup | None" = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            views: Two views (B, D) of the same samples, of length 1.
            index: (B,) int64, which samples they are.
            group: Processes whose batches, of equal sizes, the loss is over; its gradients become
                those of the loss by their mean over processes.
        """

    def freeze(self, step: int) -> None:
        """Drop gradients through the frozen steps; call it before the optimiser's step."""
        for head in self.prototypes:
            head.freeze(step)

    @abc.abstractmethod
    def start_epoch(self, epoch: int) -> None:
        """Do what is due before an epoch, counted from 0."""

    @abc.abstractmethod
    def after_step(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Do what is due after the optimiser's step; with a group, on all its processes."""


class BalancedClusters(Clusters):
    """From each view, the cluster is predicted that Sinkhorn-Knopp gives to the other (SwAV).

    Assignments are balanced over the batch, and carry no gradient. Directions are learned, and
    brought to length 1 after every step.

    Args:
        num_clusters: As in ``Clusters``.
        dim: As in ``Clusters``.
        temperature: As in ``Clusters``.
        frozen_steps: As in ``Clusters``.
        epsilon: Temperature of assignments, > 0.
        iterations: Of Sinkhorn-Knopp, >= 1.

    Source: Caron et al., Unsupervised learning of visual features by contrasting cluster
    assignments, NeurIPS 2020, arXiv:2006.09882.
    """

    def __init__(
        self,
        num_clusters: Sequence[int],
        dim: int,
        *,
        temperature: float = 0.1,
        frozen_steps: int = 0,
        epsilon: float = 0.05,
        iterations: int = 3,
    ) -> None:
        super().__init__(num_clusters, dim, temperature=temperature, frozen_steps=frozen_steps)
        self.epsilon, self.iterations = epsilon, iterations

    def forward(
        self, views: Sequence[Tensor], index: Tensor, group: "dist.ProcessGroup | None" = None
    ) -> Tensor:
        """Compute the loss, which does not depend on which samples they are."""
        with without_autocast(views[0]):
            losses = [
                swav_loss(
                    [view.float() for view in views],
                    head.weight,
                    temperature=self.temperature,
                    epsilon=self.epsilon,
                    iterations=self.iterations,
                    group=group,
                )
                for head in self.prototypes
            ]
        return torch.stack(losses).mean()

    def start_epoch(self, epoch: int) -> None:
        """Nothing is due."""

    def after_step(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Bring directions to length 1."""
        for head in self.prototypes:
            head.normalize()


class BankClusters(Clusters):
    """Both views predict the cluster that their sample had among the features of the last epoch.

    A bank for each view keeps the latest features of all samples. Before an epoch, head t is
    clustered anew by spherical k-means on bank t mod 2, from rows of it drawn at random, and its
    directions become the centroids (DeepCluster-v2). A sample that was not seen yet has no cluster
    and does not count: in the first epoch the banks fill and the loss is 0. A head waits until its
    bank has as many samples as the head has clusters.

    Args:
        num_samples: N.
        num_clusters: As in ``Clusters``; each at most N.
        dim: As in ``Clusters``.
        temperature: As in ``Clusters``.
        frozen_steps: As in ``Clusters``.
        iterations: Of k-means, >= 0.

    Attributes:
        banks: (2, N, D) features of both views.
        seen: (N,) bool.
        assigned: (T, N) int64, the cluster of each sample in each of T heads; -1 for none.

    Raises:
        ValueError: If a head has more clusters than there are samples.

    Memory: O(N D + N T), the same on all processes.
    Source: Caron et al., SwAV, NeurIPS 2020, arXiv:2006.09882, appendix on DeepCluster-v2; banks of
    volumes: Nguyen et al., Joint self-supervised image-volume representation learning, AAAI 2023,
    arXiv:2212.01893.
    """

    banks: Tensor
    seen: Tensor
    assigned: Tensor

    def __init__(
        self,
        num_samples: int,
        num_clusters: Sequence[int],
        dim: int,
        *,
        temperature: float = 0.1,
        frozen_steps: int = 0,
        iterations: int = 10,
    ) -> None:
        super().__init__(num_clusters, dim, temperature=temperature, frozen_steps=frozen_steps)
        if max(num_clusters) > num_samples:
            message = (
                f"BankClusters: num_clusters must be at most the {num_samples} samples, "
                f"got {tuple(num_clusters)}"
            )
            raise ValueError(message)
        self.iterations = iterations
        self.register_buffer("banks", torch.zeros(2, num_samples, dim))
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool))
        shape = (len(num_clusters), num_samples)
        self.register_buffer("assigned", torch.full(shape, -1, dtype=torch.int64))
        self._waiting: tuple[Tensor, Tensor] | None = None  # index and features of the step

    def forward(
        self, views: Sequence[Tensor], index: Tensor, group: "dist.ProcessGroup | None" = None
    ) -> Tensor:
        """Compute the loss; ``after_step`` puts the features into the banks."""
        with without_autocast(views[0]):
            features = [view.float() for view in views]
            losses, counts = [], []
            for head, assigned in zip(self.prototypes, self.assigned, strict=True):
                targets = assigned[index]
                known = targets >= 0
                losses.append(
                    info_nce(
                        torch.cat([view[known] for view in features]),
                        head.weight,
                        temperature=self.temperature,
                        targets=targets[known].repeat(2),
                        reduction="none",
                    ).sum()
                )
                counts.append(2.0 * known.sum())
        if self.training:
            self._waiting = index, torch.stack([view.detach() for view in features])
        share = torch.stack(counts)
        if group is not None:
            dist.all_reduce(share, group=group)
            share = share / dist.get_world_size(group)
        return (torch.stack(losses) / share.clamp_min(1e-9)).mean()

    @torch.no_grad()
    def start_epoch(self, epoch: int) -> None:
        """Cluster every head anew."""
        known = self.seen.nonzero()[:, 0]
        for t, head in enumerate(self.prototypes):
            rows = self.banks[t % 2, known]
            count = len(head.weight)
            if len(rows) < count:
                continue
            # The same draw on all processes, and after a resumption.
            generator = torch.Generator().manual_seed(1009 * epoch + t)
            first = torch.randperm(len(rows), generator=generator)[:count].to(rows.device)
            centroids, nearest = spherical_kmeans(rows, rows[first], self.iterations)
            head.weight.copy_(centroids)
            self.assigned[t] = -1
            self.assigned[t, known] = nearest

    @torch.no_grad()
    def after_step(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Put the features of the step into the banks."""
        if self._waiting is None:
            return
        index, features = self._waiting
        self._waiting = None
        if group is not None:
            index = rows_of_all_processes(index)
            features = rows_of_all_processes(features.transpose(0, 1)).transpose(0, 1)
        self.banks[:, index] = features
        self.seen[index] = True
