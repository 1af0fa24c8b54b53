"""Losses over all pairs of two batches."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._checks import check_choice
from pyfeat.losses._arguments import (
    check_same_length,
    check_shape,
    check_without,
    checked_features,
    positive_number,
)
from pyfeat.losses._metrics import ContrastMetrics, contrast_metrics
from pyfeat.losses._positives import Positives, by_ids, by_targets, paired_ids
from pyfeat.losses._reduction import Reduction, check_reduction, reduced_mean
from pyfeat.losses._soft import is_soft, soft_losses
from pyfeat.losses._softmax import checked_hardness, not_hard, pair_losses
from pyfeat.losses._traced import confirmed, opaque, zero


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
def info_nce(  # type: ignore[misc]  # options of the second stand for all keywords
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
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        () float32 (float64 for float64 features), or (N,) with reduction "none"; with metrics, also these.

    Raises:
        TypeError: If features are not float, or ids not int64.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: products and gradients in float32, sums of the loss in float64; everything in float64
    for float64 features. Gradients may be differentiated once more. With targets that are spread, or
    hard negatives, a gradient is the difference of two that are rounded each.
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
    check_choice(op, "same_ids", same_ids, ("ignore", "positive"))
    named = [("queries", queries), ("keys", keys)]
    named += [] if extra_keys is None else [("extra_keys", extra_keys)]
    a, b, *extra = checked_features(op, *named, normalize=normalize)
    b = torch.cat([b, *extra]) if extra else b
    scale = 1.0 / positive_number(op, "temperature", temperature, a)
    hardness = checked_hardness(op, hard_negative_beta, positive_prior)
    check_reduction(op, reduction, *((a, b) if symmetric else (a,)))
    bias = None
    if key_log_probabilities is not None:
        check_shape(op, "key_log_probabilities", key_log_probabilities, (len(b),), a)
        if hardness is not None:
            kind = "hard negatives or a prior of positives"
            check_without(op, kind, {"key_log_probabilities": key_log_probabilities})
        bias = -key_log_probabilities.detach().float()
        bias = confirmed(bias, _check_bias(bias, op))
    if symmetric:
        check_without(op, "a symmetric loss", {"extra_keys": extra_keys})
    if targets is not None and is_soft(targets):
        given = {"query_ids": query_ids, "key_ids": key_ids}
        check_without(op, "targets that are spread over keys", given)
        if hardness is not None:
            raise not_hard(op, hardness, "for targets that are spread over keys")
        if return_metrics:
            message = f"{op}: return_metrics must be False for targets that are spread over keys, got True"
            raise ValueError(message)
        losses = soft_losses(op, a, b, scale, targets, bias, columns=symmetric, backend=backend)
        return reduced_mean(op, losses, reduction, a)
    positives = _positives_of(
        op, a, b, targets, query_ids, key_ids, same_ids, bias, symmetric=symmetric
    )
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
    )
    loss = reduced_mean(op, losses, reduction, a)
    return (
        loss if rows is None else (loss, contrast_metrics(a.detach(), b.detach(), positives, rows))
    )


@opaque(zero)
def _check_bias(bias: Tensor, op: str) -> Tensor:
    worst = bias.abs().max() if len(bias) else bias.new_zeros(())
    if not worst < math.inf:
        message = f"{op}: key_log_probabilities must be finite, got {-bias[bias.abs().argmax()]}"
        raise ValueError(message)
    return zero(bias)


def _positives_of(
    op: str,
    a: Tensor,
    b: Tensor,
    targets: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_ids: Literal["ignore", "positive"],
    bias: Tensor | None,
    *,
    symmetric: bool,
) -> Positives:
    ids = paired_ids(op, query_ids, key_ids, len(a), len(b), a)
    if same_ids == "positive":
        if ids is None:
            message = f"{op}: query_ids must be given with same_ids 'positive', got None"
            raise ValueError(message)
        check_without(op, "same_ids 'positive'", {"targets": targets})
        return by_ids(*ids, bias)
    if symmetric:
        check_without(op, "a symmetric loss", {"targets": targets})
        check_same_length(op, ("queries", "keys"), a, b)
    return by_targets(op, targets, len(a), len(b), a, bias, ids)


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
def clip_loss(  # type: ignore[misc]  # options of the second stand for all keywords
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
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
        normalize: As in ``info_nce``; also ``reduction`` and ``backend``, and what is raised.
        reduction: See above.
        return_metrics: As in ``info_nce``, of images.
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
    a, b = checked_features(op, ("image", image), ("text", text), normalize=normalize)
    scale = positive_number(op, "logit_scale", logit_scale, a)
    check_reduction(op, reduction, a, b)
    ids = paired_ids(op, image_ids, text_ids, len(a), len(b), a, names=("image_ids", "text_ids"))
    if ids is None:
        check_same_length(op, ("image", "text"), a, b)
        positives = by_targets(op, None, len(a), len(b), a)
    else:
        positives = by_ids(*ids)
    losses, rows = pair_losses(
        op, a, b, scale, positives, columns=True, measured=return_metrics, backend=backend
    )
    loss = reduced_mean(op, losses, reduction, a)
    return (
        loss if rows is None else (loss, contrast_metrics(a.detach(), b.detach(), positives, rows))
    )
