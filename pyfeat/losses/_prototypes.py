"""Losses of views that predict which prototypes other views are assigned to.

Cross-entropies are linear in the targets, so those of a view are added up before it meets them:
with T the sum of the n targets of a view z and ``S = scale * z @ prototypes.T``,

    loss_i = n logsumexp_k S_ik - <T_i, S_i>,    <T_i, S_i> = scale (T @ prototypes)_i . z_i,

one log-sum-exp for each view and one product for each target, in memory O((B + K) D) each.
"""

import operator
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import Backend
from pyfeat._contrast import Pairs
from pyfeat.losses._arguments import check_shape, checked_features, positive_number
from pyfeat.losses._group import Reduce, meeting, outside_graphs
from pyfeat.losses._reduction import (
    Losses,
    Reduction,
    check_group,
    check_reduction,
    is_reference,
    reduced_mean,
    sums_over,
)
from pyfeat.losses._sinkhorn import (
    assignment_scale,
    balanced_columns,
    check_iterations,
    check_prototypes,
    softmax_assignment,
)


@outside_graphs
def swav_loss(
    views: Sequence[Tensor],
    prototypes: Tensor,
    *,
    assigned: Sequence[int] = (0, 1),
    temperature: float | Tensor = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queues: Sequence[Tensor] | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of the prototypes of views with those assigned to other views (SwAV).

    ``loss_i = mean over a in assigned and v != a of -sum_k Q_a,ik ln softmax_k(views_v,i .
    prototypes_k / temperature)`` with Q_a as ``sinkhorn(views_a @ prototypes.T)``, through which no
    gradient flows.

    Args:
        views: V >= 2 views (B, D) of the same images, float32, float64, float16 or bfloat16,
            finite, usually of unit length. B may be 0.
        prototypes: (K, D), dtype and device of the views, K >= 1, usually of unit length.
        assigned: Indices of the views that are assigned, in SwAV the large crops.
        temperature: > 0; a tensor () may have a gradient.
        epsilon: > 0, the temperature of the assignments, with its limit in
            ``sinkhorn_assignment``.
        iterations: >= 1, of Sinkhorn-Knopp.
        queues: For each assigned view, (E, D) features of earlier batches that take part in the
            balance.
        normalize: Divide all vectors by their length, prototypes too; zero vectors stay zero.
        reduction: "none" returns the losses (B,).
        group: Processes whose batches, of any sizes, are assigned together, and whose rows the loss
            is over; None: this process alone.
        reduce: What makes gradients of processes those of the loss: their mean, "ddp_mean", as
            DistributedDataParallel takes it, or their "sum".
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        () float32, float64 for float64 features, or (B,) with reduction "none".

    Raises:
        TypeError: If features are not float, or iterations no integer.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite; on
            several processes also if arguments differ.
        RuntimeError: If another process has raised.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: products and gradients in float32, sums of the loss in float64. A gradient is the
    difference of two terms, each of which is rounded to bfloat16 for such features.
    Memory: O((V B + E + K) D), and as much of the scores as ``set_memory_budget`` lets the backward
    pass keep; the assignments are never stored.
    Source: Caron et al., Unsupervised learning of visual features by contrasting cluster
    assignments, NeurIPS 2020, arXiv:2006.09882.

    Examples:
        >>> view = torch.eye(2)
        >>> swav_loss([view, view], torch.eye(2), temperature=1.0)
        tensor(0.3133)
    """
    op = "swav_loss"
    with meeting(op, group) as met:
        num_views = len(views)
        indices = _checked_indices(op, assigned, num_views)
        extra = [] if queues is None else list(queues)
        if queues is not None and len(extra) != len(indices):
            message = (
                f"{op}: queues must be as many as assigned views, {len(indices)}, got {len(extra)}"
            )
            raise ValueError(message)
        check_iterations(op, iterations)
        check_reduction(op, reduction)
        named = [(f"views[{i}]", view) for i, view in enumerate(views)]
        named += [(f"queues[{i}]", queue) for i, queue in enumerate(extra)]
        checked, b = checked_batch(op, named, num_views, ("prototypes", prototypes), normalize)
        features, waiting = checked[:num_views], [x.detach() for x in checked[num_views:]]
        predicting = 1.0 / positive_number(op, "temperature", temperature, b)
        balanced = [features[i].detach() for i in indices]
        if waiting:
            balanced = [torch.cat([x, y]) for x, y in zip(balanced, waiting, strict=True)]
        w = b.detach()
        scale = assignment_scale(op, "epsilon", epsilon, torch.cat(balanced), w)
        check_group(op, group, reduce, backend, b)
        by_definition = is_reference(op, backend, b)
        met.tell(
            features[0],
            b,
            predicting,
            epsilon=1.0 / float(scale),
            iterations=iterations,
            num_prototypes=len(b),
            num_views=num_views,
            assigned=indices,
            reduction=reduction,
            reduce=reduce,
        )
    if by_definition:
        losses = reference.swav_losses(
            features, b, 1.0 / predicting, indices, balanced, 1.0 / float(scale), iterations
        )
    else:
        targets = []
        for x in balanced:
            columns = balanced_columns(op, x, w, scale, iterations, met.ranks, backend)
            assignment = softmax_assignment(op, x[: len(features[0])], w, scale, columns, backend)
            targets.append(assignment.mean(b))
        losses = prediction_losses(op, features, b, predicting, targets, indices, backend)
    return reduced_mean(op, [Losses(losses)], reduction, b, met.ranks, reduce)


def prediction_losses(
    op: str,
    views: Sequence[Tensor],
    prototypes: Tensor,
    scale: Tensor,
    targets: Sequence[Tensor],
    sources: Sequence[int | None],
    backend: Backend | None,
) -> Tensor:
    """Losses (B,) float64 of views (B, D), the mean over targets of which they are not the source.

    Targets (B, D) are means of prototypes, ``T @ prototypes``.
    """
    partners = [
        [target for target, source in zip(targets, sources, strict=True) if source != i]
        for i in range(len(views))
    ]
    predicting = [(view, others) for view, others in zip(views, partners, strict=True) if others]
    z = torch.cat([view for view, _ in predicting])
    lse = sums_over(op, z, prototypes, scale, Pairs(), columns=False, backend=backend).row_lse
    parts = lse.view(len(predicting), len(views[0]))
    losses = torch.zeros_like(parts[0])
    for part, (view, others) in zip(parts, predicting, strict=True):
        products = torch.sum(torch.stack(others).sum(dim=0) * view, dim=1, dtype=torch.float64)
        losses = losses + len(others) * part - scale * products
    return losses / sum(map(len, partners))


def checked_batch(
    op: str,
    named: Sequence[tuple[str, Tensor]],
    num_views: int,
    prototypes: tuple[str, Tensor],
    normalize: bool,
) -> tuple[list[Tensor], Tensor]:
    """Features and prototypes, checked; the first ``num_views`` features have as many rows."""
    *features, b = checked_features(op, *named, prototypes, normalize=normalize)
    for (name, _), view in zip(named[:num_views], features, strict=False):
        check_shape(op, name, view, tuple(features[0].shape), b)
    check_prototypes(op, prototypes[0], b)
    return features, b


def _checked_indices(op: str, assigned: Sequence[int], num_views: int) -> list[int]:
    if num_views < 2:
        message = f"{op}: views must be at least 2, got {num_views}"
        raise ValueError(message)
    indices = [operator.index(i) for i in assigned]
    if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(range(num_views)):
        message = f"{op}: assigned must be distinct indices in [0, {num_views}), got {assigned!r}"
        raise ValueError(message)
    return indices
