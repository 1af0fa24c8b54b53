"""Whether a run is alive: probes of its embeddings, and signs of collapse."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat._extras import require
from pyfeat.search import knn
from pyfeat.ssl.config import Watch
from pyfeat.ssl.data.source import Source, SourceDataset, collate
from pyfeat.ssl.parts import distinct_captions
from pyfeat.ssl.zero_shot import retrieval_recall


def effective_rank(embeddings: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values, centred.

    Args:
        embeddings: (N, D) float, N >= 2.

    Returns:
        From 1, all on one line, to min(N - 1, D); 0 if all are equal.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Examples:
        >>> effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        1.0
    """
    x = embeddings.double()
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    # Of equal rows, rounding leaves values of their size times epsilon.
    if float(values.max()) <= 1e-6 * float(x.norm()):
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def uniformity(embeddings: Tensor) -> float:
    """Return log mean exp(-2 ||x - y||^2) over pairs of normalised embeddings.

    Args:
        embeddings: (N, D) float, N >= 2.

    Returns:
        0 if all point in one direction; about -4 for directions spread evenly.

    Memory: O(N²) for N rows.
    Source: Wang and Isola, ICML 2020, arXiv:2005.10242.

    Examples:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])), 3)
        -8.0
    """
    x = functional.normalize(embeddings.double(), dim=1)
    pairs = functional.pdist(x).square()
    return float(torch.logsumexp(-2 * pairs, dim=0)) - math.log(len(pairs))


def alignment(first: Tensor, second: Tensor) -> float:
    """Return the mean squared distance of two views of each sample, normalised, in [0, 4]."""
    a, b = (functional.normalize(x.double(), dim=1) for x in (first, second))
    return float((a - b).square().sum(dim=1).mean())


def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    k: int,
    *,
    num_classes: int,
    temperature: float | None = None,
) -> Tensor:
    """Return what the k nearest, by cosine, vote for.

    Args:
        train: (N, D) float.
        train_labels: (N,) int64 in [0, ``num_classes``).
        test: (Q, D) float.
        k: Neighbours; at most N of them vote.
        num_classes: C.
        temperature: > 0; a vote weighs ``exp(cosine / temperature)``, in proportion to that of the
            nearest. None: every vote 1.

    Returns:
        (Q, C) float64.

    Source: the weights, with 0.07, are those of Wu et al., Unsupervised feature learning via
    non-parametric instance discrimination, CVPR 2018, arXiv:1805.01978.

    Examples:
        >>> rows, labels = torch.eye(2), torch.tensor([0, 1])
        >>> knn_votes(rows, labels, rows[:1], 2, num_classes=2, temperature=0.5).round(decimals=4)
        tensor([[1.0000, 0.1353]], dtype=torch.float64)
    """
    found = knn(test.float(), train.float(), min(k, len(train)), metric="cosine")
    weights = torch.ones_like(found.distances, dtype=torch.float64)
    if temperature is not None:
        farther = found.distances[:, :1].double() - found.distances.double()
        weights = (farther / temperature).exp()
    votes = weights.new_zeros(len(test), num_classes)
    return votes.scatter_add_(1, train_labels[found.indices], weights)


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int,
    *,
    temperature: float | None = None,
) -> float:
    """Return how often the k nearest vote for the label; ties go to the lower label.

    Args:
        train: As ``knn_votes``.
        train_labels: As ``knn_votes``.
        test: As ``knn_votes``.
        test_labels: (Q,) int64, >= 0.
        k: As ``knn_votes``.
        temperature: As ``knn_votes``.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = knn_votes(train, train_labels, test, k, num_classes=classes, temperature=temperature)
    return float((votes.argmax(dim=1) == test_labels).double().mean())


def linear_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> float:
    """Return the accuracy of a logistic regression on standardised embeddings (scikit-learn)."""
    linear = require("sklearn.linear_model", extra="train", op="pyfeat train")
    mean, scale = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    fitted = linear.LogisticRegression(max_iter=2000).fit(
        ((train - mean) / scale).numpy(), train_labels.numpy()
    )
    return float(fitted.score(((test - mean) / scale).numpy(), test_labels.numpy()))


class Watcher:
    """Looks at an objective with the same samples every time.

    Args:
        source: Samples.
        settings: How many, and what for.
        seed: Of the samples, and of which are held out.
        batch_size: Samples looked at together.
    """

    def __init__(self, source: Source, settings: Watch, *, seed: int, batch_size: int) -> None:
        self._data = SourceDataset(source, seed)
        self._settings, self._batch_size = settings, batch_size
        self._seed = seed
        count = min(settings.samples, len(source))
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        chosen = order[:count]
        self._chosen = chosen.tolist()
        self._labels = source.labels[chosen] if source.labels is not None else None

    def look(self, objective: Any, *, last: bool = False) -> dict[str, float]:
        """Return figures by name; takes nothing from the global random generators.

        Args:
            objective: Whose ``embed`` and ``two_views`` are looked at.
            last: Fit the linear probe too, if the settings have it.
        """
        with looking(objective, self._seed):
            embeddings, alignments, pairs = self._embed(objective)
            retrieval = self._retrieval(objective, pairs) if pairs else {}
        figures = {
            "collapse/effective_rank": effective_rank(embeddings),
            "collapse/uniformity": uniformity(embeddings),
            **retrieval,
        }
        if alignments:
            figures["collapse/alignment"] = sum(alignments) / len(alignments)
        figures.update(self._probes(embeddings, last=last))
        return figures

    def alarms(self, figures: dict[str, float]) -> list[str]:
        """Return one sentence for each sign of collapse among figures."""
        settings = self._settings
        rank, spread = figures["collapse/effective_rank"], figures["collapse/uniformity"]
        found = []
        if rank < settings.min_rank:
            found.append(f"effective rank {rank:.2f} is below {settings.min_rank:g}")
        if spread > settings.max_uniformity:
            found.append(f"uniformity {spread:.3f} is above {settings.max_uniformity:g}")
        return [f"the embeddings have collapsed: {sign}" for sign in found]

    def _embed(
        self, objective: Any
    ) -> tuple[Tensor, list[float], list[tuple[Tensor, list[list[str]]]]]:
        rows, alignments, pairs = [], [], []
        for begin in range(0, len(self._chosen), self._batch_size):
            part = self._chosen[begin : begin + self._batch_size]
            batch = collate([self._data[0, index] for index in part])
            batch = {
                key: value.to(objective.device) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            rows.append(objective.embed(batch).float().cpu())
            if views := objective.two_views(batch):
                alignments.append(alignment(*(view.float().cpu() for view in views)))
            if (pair := objective.embed_pairs(batch)) is not None:
                pairs.append(pair)
        return torch.cat(rows), alignments, pairs

    def _retrieval(
        self, objective: Any, pairs: list[tuple[Tensor, list[list[str]]]]
    ) -> dict[str, float]:
        texts, belonging = distinct_captions([each for _, captions in pairs for each in captions])
        size = self._batch_size
        features = torch.cat(
            [objective.encode_texts(texts[i : i + size]) for i in range(0, len(texts), size)]
        )
        images = torch.cat([images for images, _ in pairs])
        recall = retrieval_recall(images.float(), features.float(), belonging)
        return {
            f"retrieval/{direction}@{k}": value
            for direction, values in recall._asdict().items()
            for k, value in values.items()
        }

    def _probes(self, embeddings: Tensor, *, last: bool) -> dict[str, float]:
        if self._labels is None:
            return {}
        kept = self._labels >= 0
        rows, labels = embeddings[kept], self._labels[kept]
        num_test = max(1, round(self._settings.held_out * len(rows)))
        if len(rows) - num_test < 2 or len(set(labels[num_test:].tolist())) < 2:
            return {}
        parts = rows[num_test:], labels[num_test:], rows[:num_test], labels[:num_test]
        settings = self._settings
        figures = {"probe/knn": knn_accuracy(*parts, settings.k, temperature=settings.temperature)}
        if last and settings.linear:
            figures["probe/linear"] = linear_accuracy(*parts)
        return figures


@contextmanager
def looking(objective: Any, seed: int) -> Iterator[None]:
    """Evaluation mode without gradients, and random numbers of its own; all as it was after that."""
    modes = [(module, module.training) for module in objective.modules()]
    devices = [objective.device] if objective.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            objective.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
