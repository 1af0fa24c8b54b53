"""Losses over all pairs of two batches."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._checks import check_choice
from pyfeat._ranks import Ranks, Schedule
from pyfeat.losses._arguments import (
    check_same_length,
    check_without,
    checked_bias,
    checked_features,
    positive_number,
)
from pyfeat.losses._group import Reduce, given, meeting, outside_graphs
from pyfeat.losses._metrics import ContrastMetrics, contrast_metrics
from pyfeat.losses._positives import (
    Positives,
    by_ids,
    by_targets,
    checked_ids,
    checked_targets,
    places_over,
)
from pyfeat.losses._reduction import Reduction, check_group, check_reduction, reduced_mean
from pyfeat.losses._soft import checked_weights, is_soft, soft_losses
from pyfeat.losses._softmax import Hardness, checked_hardness, not_hard, pair_losses


@overload
def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    targets: Tensor | None = None,
    extra_keys: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_ids: Literal["ignore", "positive"] = "ignore",
    key_log_probabilities: Tensor | None = None,
    symmetric: bool = False,
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
def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, ContrastMetrics]: ...
@outside_graphs  # type: ignore[misc]  # options of the second stand for all keywords
def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    targets: Tensor | None = None,
    extra_keys: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_ids: Literal["ignore", "positive"] = "ignore",
    key_log_probabilities: Tensor | None = None,
    symmetric: bool = False,
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
    """Cross-entropy of the similarities of every query to all keys.

    With ``S = queries @ keys.T / temperature`` and y the targets, ``loss_i = logsumexp_j S_ij - S_iy``.
    Queries without a positive key have loss 0 and do not count in the mean. Targets T that are spread
    over keys, with rows summing to t, give ``loss_i = t_i logsumexp_j S_ij - sum_j T_ij S_ij``.

    Args:
        queries: (N, D) float32, float64, float16 or bfloat16, finite. N may be 0.
        keys: (M, D), dtype and device of ``queries``.
        temperature: > 0; a tensor () may have a gradient.
        targets: (N,) int64, of every query its positive key; None: the key of the same index. Or
            (N, M + E) float32 or float64, dense or sparse (COO or CSR), finite and at least 0: weights
            of keys as positives. They take no ids. No gradient.
        extra_keys: (E, D), such as a memory queue: further keys, with indices from M on.
        query_ids: (N,) int64, what a query shows, together with ``key_ids``.
        key_ids: (M + E,) int64.
        same_ids: What keys are that have the id of a query: "ignore" leaves them out, as false
            negatives, unless they are its target; "positive" makes all of them positives, whose
            similarities are averaged, in place of a target.
        key_log_probabilities: (M + E,), of a key to be drawn as a negative, in natural logarithms; they
            are subtracted from its similarities (the correction logQ). No gradient.
        symmetric: Mean of this and of the loss with queries and keys in each other's place; takes no
            extra keys, no targets but those spread over keys, and M = N unless ids are positive or
            targets spread. The latter are transposed as they are: a column weighs what it sums to.
        hard_negative_beta: >= 0; negatives get weights ``exp(beta S_ij)``, of mean 1 over the negatives of
            a query. Not with several positives or log probabilities; nor is ``positive_prior``.
        positive_prior: In [0, 1), the share of negatives that are positives unknown: so much of
            ``exp(S_iy)`` is taken from the mean over negatives of ``exp(S_ij)``, the rest is divided by 1 -
            prior and is at least ``exp(-1 / temperature)``, as it is for vectors of unit length.
        normalize: Divide all vectors by their length; zero vectors stay zero.
        reduction: "none" returns the loss of every query.
        return_metrics: Return ``(loss, ContrastMetrics)``, of queries, of which most is at hand; one more
            product of matrices if a query has several positives. Not with targets that are spread.
        group: The loss, and metrics, are those of the batches of all its processes together, of any sizes,
            and every one gets their values; all take part, also in backward. Targets are own keys, ids are
            those of all processes. With reduction "none" a process gets the losses of its own queries.
            None: this process alone.
        reduce: What makes gradients of processes those of the loss, by parameters of encoders and of the
            loss alike: their mean, "ddp_mean", as DistributedDataParallel takes it, or their "sum". With
            reduction "none" they are those of what processes make of their losses, whatever it is.
        schedule: "ring" lets keys travel from process to process behind the products, and holds those of
            two; "gather" holds all at once. None: "gather" up to 32 MiB, where messages are few and small.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        () float32 (float64 for float64 features), or (N,) with reduction "none"; with metrics, also these.

    Raises:
        TypeError: If features are not float, or ids not int64.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite; or if
            arguments differ between processes that must not, or a group has no backend for such tensors.
        RuntimeError: If another process of the group has raised.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs; or if ids or
            targets that are indices are given while a CUDA graph is captured. No value is read then: what
            would be refused for a value makes the loss NaN, in every replay.

    Precision: products and gradients in float32, sums of the loss in float64; everything in float64
    for float64 features; for bfloat16 ones, where the processor multiplies these faster, gradients by
    similarities are rounded to bfloat16. Gradients may be differentiated once more, but for those of a
    group. With targets that are spread, or hard negatives, a gradient is the difference of two that are
    rounded each.
    Memory: O((N + M) D), and as much of the similarities as ``set_memory_budget`` lets the backward pass
    keep.
    Source: van den Oord et al., Representation learning with contrastive predictive coding, 2018,
    arXiv:1807.03748; logQ: Yi et al., Sampling-bias-corrected neural modeling, RecSys 2019; hard
    negatives: Robinson et al., Contrastive learning with hard negative samples, ICLR 2021,
    arXiv:2010.04592; prior: Chuang et al., Debiased contrastive learning, NeurIPS 2020, arXiv:2007.00224.

    Examples:
        >>> info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.3133)
    """
    op = "info_nce"
    named = [("queries", queries), ("keys", keys)]
    named += [] if extra_keys is None else [("extra_keys", extra_keys)]
    with meeting(op, group, schedule) as met:
        check_choice(op, "same_ids", same_ids, ("ignore", "positive"))
        a, b, *extra = checked_features(op, *named, normalize=normalize)
        b = torch.cat([b, *extra]) if extra else b
        scale = 1.0 / positive_number(op, "temperature", temperature, a)
        hardness = checked_hardness(op, hard_negative_beta, positive_prior)
        check_reduction(op, reduction, *((a, b) if symmetric else (a,)))
        check_group(op, group, reduce, backend, a)
        if hardness is not None:
            kind = "hard negatives or a prior of positives"
            check_without(op, kind, {"key_log_probabilities": key_log_probabilities})
        bias = checked_bias(op, "key_log_probabilities", key_log_probabilities, b)
        if symmetric:
            check_without(op, "a symmetric loss", {"extra_keys": extra_keys})
        ids = checked_ids(op, query_ids, key_ids, len(a), len(b), a)
        wanted = (
            _checked_weights(op, a, b, targets, ids, hardness, measured=return_metrics)
            if targets is not None and is_soft(targets)
            else _checked_positives(op, a, b, targets, ids, same_ids, bias, symmetric=symmetric)
        )
        met.tell(
            a,
            b,
            scale if hardness is None else (1.0 + hardness.beta) * scale,
            symmetric=symmetric,
            reduction=reduction,
            reduce=reduce,
            same_ids=same_ids,
            hard_negative_beta=hard_negative_beta,
            positive_prior=positive_prior,
            return_metrics=return_metrics,
            targets="spread" if isinstance(wanted, Tensor) else None,
            **given(query_ids=ids, key_log_probabilities=bias),
        )
    ranks = met.ranks
    if isinstance(wanted, Tensor):
        losses = soft_losses(
            op, a, b, scale, wanted, bias, columns=symmetric, backend=backend, ranks=ranks
        )
        return reduced_mean(op, losses, reduction, a, ranks, reduce)
    positives = wanted(ranks)
    losses, rows = pair_losses(
        op,
        a,
        b,
        scale,
        positives,
        hardness=hardness,
        columns=symmetric,
        measured=return_metrics,
        backend=backend,
        ranks=ranks,
    )
    loss = reduced_mean(op, losses, reduction, a, ranks, reduce)
    if rows is None:
        return loss
    return loss, contrast_metrics(a.detach(), b.detach(), positives, rows, ranks)


def _checked_weights(
    op: str,
    a: Tensor,
    b: Tensor,
    targets: Tensor,
    ids: tuple[Tensor, Tensor] | None,
    hardness: Hardness | None,
    *,
    measured: bool,
) -> Tensor:
    query_ids, key_ids = (None, None) if ids is None else ids
    kind = "targets that are spread over keys"
    check_without(op, kind, {"query_ids": query_ids, "key_ids": key_ids})
    if hardness is not None:
        raise not_hard(op, hardness, f"for {kind}")
    if measured:
        message = f"{op}: return_metrics must be False for {kind}, got True"
        raise ValueError(message)
    return checked_weights(op, targets, len(a), len(b), a)


def _checked_positives(
    op: str,
    a: Tensor,
    b: Tensor,
    targets: Tensor | None,
    ids: tuple[Tensor, Tensor] | None,
    same_ids: Literal["ignore", "positive"],
    bias: Tensor | None,
    *,
    symmetric: bool,
) -> Callable[[Ranks | None], Positives]:
    """What they are once ranks are known."""
    if same_ids == "positive":
        if ids is None:
            message = f"{op}: query_ids must be given with same_ids 'positive', got None"
            raise ValueError(message)
        check_without(op, "same_ids 'positive'", {"targets": targets})
        return lambda ranks: by_ids(*places_over(*ids, ranks), bias, ranks=ranks)
    if symmetric:
        check_without(op, "a symmetric loss", {"targets": targets})
        check_same_length(op, ("queries", "keys"), a, b)
    chosen = checked_targets(op, targets, len(a), len(b), a)

    def by_index(ranks: Ranks | None) -> Positives:
        groups = None if ids is None else places_over(*ids, ranks)
        return by_targets(chosen, len(b), bias, groups, ranks)

    return by_index


@overload
def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: Literal[False] = False,
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, ContrastMetrics]: ...
@outside_graphs  # type: ignore[misc]  # options of the second stand for all keywords
def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, ContrastMetrics]:
    """Symmetric cross-entropy of image and text features, pair by pair.

    With ``S = logit_scale * image @ text.T``, the mean of the cross-entropies of rows and columns, each
    with the diagonal as targets.

    Args:
        image: (N, D) float32, float64, float16 or bfloat16, usually of unit length.
        text: (N, D), or (M, D) with ids; dtype and device of ``image``.
        logit_scale: > 0, the inverse of a temperature; a tensor () may have a gradient.
        image_ids: (N,) int64 with ``text_ids``: all texts with the id of an image are its positives,
            their similarities averaged (several captions of an image).
        text_ids: (M,) int64.
        normalize: As in ``info_nce``; also all that follow, and what is raised.
        reduction: See above.
        return_metrics: As in ``info_nce``, of images.
        group: See above.
        reduce: See above.
        schedule: See above.
        backend: See above.

    Returns:
        () float32 (float64 for float64 features), or (N,) with reduction "none", the mean of both
        directions.

    Memory: O(N D), and as much of the similarities as ``set_memory_budget`` lets the backward pass keep.
    Source: Radford et al., Learning transferable visual models from natural language supervision,
    ICML 2021, arXiv:2103.00020; several captions: Zheng et al., DreamLIP, ECCV 2024, arXiv:2403.17007.

    Examples:
        >>> clip_loss(torch.eye(2), torch.eye(2), 1.0)
        tensor(0.3133)
    """
    op = "clip_loss"
    with meeting(op, group, schedule) as met:
        a, b = checked_features(op, ("image", image), ("text", text), normalize=normalize)
        scale = positive_number(op, "logit_scale", logit_scale, a)
        check_reduction(op, reduction, a, b)
        check_group(op, group, reduce, backend, a)
        names = ("image_ids", "text_ids")
        ids = checked_ids(op, image_ids, text_ids, len(a), len(b), a, names=names)
        if ids is None:
            check_same_length(op, ("image", "text"), a, b)
        met.tell(
            a,
            b,
            scale,
            reduction=reduction,
            reduce=reduce,
            return_metrics=return_metrics,
            **given(image_ids=ids),
        )
    ranks = met.ranks
    if ids is None:
        positives = by_targets(checked_targets(op, None, len(a), len(b), a), len(b), ranks=ranks)
    else:
        positives = by_ids(*places_over(*ids, ranks), ranks=ranks)
    losses, rows = pair_losses(
        op,
        a,
        b,
        scale,
        positives,
        columns=True,
        measured=return_metrics,
        backend=backend,
        ranks=ranks,
    )
    loss = reduced_mean(op, losses, reduction, a, ranks, reduce)
    if rows is None:
        return loss
    return loss, contrast_metrics(a.detach(), b.detach(), positives, rows, ranks)
