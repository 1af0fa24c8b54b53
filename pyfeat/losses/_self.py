"""Losses over all pairs of one batch with itself."""

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._checks import check_choice
from pyfeat._contrast import Pairs
from pyfeat._ranks import Schedule
from pyfeat.losses._arguments import check_same_length, checked_features, positive_number
from pyfeat.losses._group import Reduce, meeting, outside_graphs
from pyfeat.losses._metrics import ContrastMetrics, contrast_metrics
from pyfeat.losses._positives import Positives, by_ids, check_ids, places_over, row_indices
from pyfeat.losses._reduction import Reduction, check_group, check_reduction, reduced_mean
from pyfeat.losses._softmax import checked_hardness, pair_losses


@overload
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    average: Literal["out", "in"] = "out",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: Literal[False] = False,
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, ContrastMetrics]: ...
@outside_graphs  # type: ignore[misc]  # options of the second stand for all keywords
def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    average: Literal["out", "in"] = "out",
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, ContrastMetrics]:
    """Supervised contrastive loss: all rows of the same label are positives of each other.

    With ``S = features @ features.T / temperature`` without its diagonal and P(i) the other rows with the
    label of i, ``loss_i = logsumexp_j S_ij - mean_{j in P(i)} S_ij``. Rows without positives have loss 0
    and do not count in the mean.

    Args:
        features: (N, D) float32, float64, float16 or bfloat16, finite, usually of unit length.
        labels: (N,) int64.
        temperature: > 0; a tensor () may have a gradient.
        average: Where positives are averaged: "out" of the logarithm, as above, or "in" it, ``loss_i =
            logsumexp_j S_ij - log mean_{j in P(i)} exp(S_ij)``, which lets positives that are far go.
        normalize: As in ``info_nce``; also all that follow, and what is raised.
        reduction: See above.
        return_metrics: As in ``info_nce``.
        group: See above.
        reduce: See above.
        schedule: See above.
        backend: See above.

    Returns:
        () float32 (float64 for float64 features), or (N,) with reduction "none".

    Memory: O(N D), and as much of the similarities as ``set_memory_budget`` lets the backward pass keep.
    Source: Khosla et al., Supervised contrastive learning, NeurIPS 2020, arXiv:2004.11362.

    Examples:
        >>> supcon_loss(torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 0, 1]), temperature=1.0)
        tensor(0.5514)
    """
    op = "supcon_loss"
    with meeting(op, group, schedule) as met:
        check_choice(op, "average", average, ("out", "in"))
        (a,) = checked_features(op, ("features", features), normalize=normalize)
        check_ids(op, "labels", labels, len(a), a)
        scale = 1.0 / positive_number(op, "temperature", temperature, a)
        check_reduction(op, reduction)
        check_group(op, group, reduce, backend, a)
        met.tell(
            a,
            a,
            scale,
            average=average,
            reduction=reduction,
            reduce=reduce,
            return_metrics=return_metrics,
        )
    ranks = met.ranks
    ids = places_over(labels, labels, ranks)
    positives = by_ids(*ids, groups=row_indices(a, ranks), ranks=ranks)
    losses, rows = pair_losses(
        op,
        a,
        a,
        scale,
        positives,
        inside=average == "in",
        measured=return_metrics,
        backend=backend,
        ranks=ranks,
    )
    loss = reduced_mean(op, losses, reduction, a, ranks, reduce)
    if rows is None:
        return loss
    return loss, contrast_metrics(a.detach(), a.detach(), positives, rows, ranks)


@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    hard_negative_beta: float = 0.0,
    positive_prior: float = 0.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: Literal[False] = False,
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, ContrastMetrics]: ...
@outside_graphs  # type: ignore[misc]  # options of the second stand for all keywords
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    hard_negative_beta: float = 0.0,
    positive_prior: float = 0.0,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, ContrastMetrics]:
    """Cross-entropy of every view to its partner among all other views of a batch.

    With z the 2 N rows of both and ``S = z @ z.T / temperature`` without its diagonal,
    ``loss_i = logsumexp_j S_ij - S_ip``, p being the other view of i.

    Args:
        z1: (N, D) float32, float64, float16 or bfloat16, finite, usually of unit length.
        z2: (N, D), the other views, dtype and device of ``z1``.
        temperature: > 0; a tensor () may have a gradient.
        hard_negative_beta: As in ``info_nce``; also ``positive_prior``.
        positive_prior: See above.
        normalize: As in ``info_nce``; also all that follow, and what is raised.
        reduction: See above.
        return_metrics: As in ``info_nce``.
        group: See above.
        reduce: See above.
        schedule: See above.
        backend: See above.

    Returns:
        () float32 (float64 for float64 features), or (2 N,) with reduction "none", those
        of ``z1`` first.

    Memory: O(N D), and as much of the similarities as ``set_memory_budget`` lets the backward pass keep.
    Source: Chen et al., A simple framework for contrastive learning of visual representations, ICML
    2020, arXiv:2002.05709; hard negatives and the prior: as in ``info_nce``.

    Examples:
        >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.5514)
    """
    op = "nt_xent"
    with meeting(op, group, schedule) as met:
        a, b = checked_features(op, ("z1", z1), ("z2", z2), normalize=normalize)
        check_same_length(op, ("z1", "z2"), a, b)
        z = torch.cat([a, b])
        scale = 1.0 / positive_number(op, "temperature", temperature, a)
        hardness = checked_hardness(op, hard_negative_beta, positive_prior)
        check_reduction(op, reduction)
        check_group(op, group, reduce, backend, a)
        met.tell(
            z,
            z,
            scale if hardness is None else (1.0 + hardness.beta) * scale,
            reduction=reduction,
            reduce=reduce,
            hard_negative_beta=hard_negative_beta,
            positive_prior=positive_prior,
            return_metrics=return_metrics,
        )
    ranks = met.ranks
    places = row_indices(z, ranks)
    ids = places[: len(a)].repeat(2)
    # Of every row, its partner is the only other one with its id.
    positives = Positives(Pairs(None, ids, ids, places, places, separate_positives=True))
    losses, rows = pair_losses(
        op,
        z,
        z,
        scale,
        positives,
        hardness=hardness,
        measured=return_metrics,
        backend=backend,
        ranks=ranks,
    )
    loss = reduced_mean(op, losses, reduction, z, ranks, reduce)
    if rows is None:
        return loss
    return loss, contrast_metrics(z.detach(), z.detach(), positives, rows, ranks)
