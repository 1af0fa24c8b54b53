"""Losses over all pairs of two batches."""

from typing import Literal

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._checks import check_choice
from pyfeat._contrast import Pairs
from pyfeat.losses._arguments import (
    are_single,
    check_shape,
    check_symmetric,
    checked_features,
    count_positives,
    paired_ids,
    positive_number,
    target_columns,
)
from pyfeat.losses._reduction import REDUCTIONS, Reduction, reduced, softmax_loss, sums_over


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
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Cross-entropy of the similarities of every query to all keys.

    With ``S = queries @ keys.T / temperature`` and y the targets, ``loss_i = logsumexp_j S_ij - S_iy``.
    Queries without a positive key have loss 0 and do not count in the mean.

    Args:
        queries: (N, D) float32, float64, float16 or bfloat16, finite. N may be 0.
        keys: (M, D), dtype and device of ``queries``.
        temperature: > 0; a tensor () may have a gradient.
        targets: (N,) int64, of every query its positive key; None: the key of the same index.
        extra_keys: (E, D), such as a memory queue: further keys, with indices from M on.
        query_ids: (N,) int64, what a query shows, together with ``key_ids``.
        key_ids: (M + E,) int64.
        same_ids: What keys are that have the id of a query: "ignore" leaves them out, as false
            negatives, unless they are its target; "positive" makes all of them positives, whose
            similarities are averaged, in place of a target.
        key_log_probabilities: (M + E,), of a key to be drawn as a negative, in natural logarithms; they
            are subtracted from its similarities (the correction logQ). No gradient.
        symmetric: Mean of this and of the loss with queries and keys in each other's place; takes
            targets and extra keys of none, and M = N unless ids are positive.
        normalize: Divide all vectors by their length; zero vectors stay zero.
        reduction: "none" returns the loss of every query.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        () float32 (float64 for float64 features), or (N,) with reduction "none".

    Raises:
        TypeError: If features are not float, or ids not int64.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: products and gradients in float32, sums of the loss in float64; everything in float64
    for float64 features. Gradients may be differentiated once more.
    Memory: O((N + M) D); the (N, M) similarities are never stored.
    Source: van den Oord et al., Representation learning with contrastive predictive coding, 2018,
    arXiv:1807.03748; logQ: Yi et al., Sampling-bias-corrected neural modeling, RecSys 2019.

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
    num_rows, num_columns = a.shape[0], b.shape[0]
    ids = paired_ids(op, query_ids, key_ids, num_rows, num_columns, a)
    by_ids = ids is not None and same_ids == "positive"
    if same_ids == "positive" and ids is None:
        message = f"{op}: query_ids must be given with same_ids 'positive', got None"
        raise ValueError(message)
    if symmetric:
        check_symmetric(op, targets, extra_keys, num_rows, num_columns, by_ids=by_ids)
    if by_ids and targets is not None:
        message = f"{op}: targets must be None with same_ids 'positive', got a tensor"
        raise ValueError(message)
    bias = None
    if key_log_probabilities is not None:
        check_shape(op, "key_log_probabilities", key_log_probabilities, (num_columns,), a)
        bias = -key_log_probabilities.detach().float()
    if by_ids and ids is not None:
        row_counts, column_counts = count_positives(*ids)
        separate = are_single(row_counts, column_counts)
        pairs = Pairs(bias, ids[0], ids[1], separate_positives=separate)
    else:
        separate = True
        chosen = target_columns(op, targets, num_rows, num_columns, a)
        places = torch.arange(num_columns, dtype=torch.int32, device=a.device)
        groups = (None, None) if ids is None else ids
        pairs = Pairs(bias, chosen, places, groups[0], groups[1], True, True)
        row_counts = column_counts = torch.ones(num_rows, device=a.device)
    scale = 1.0 / positive_number(op, "temperature", temperature, a)
    sums = sums_over(op, a, b, scale, pairs, columns=symmetric, backend=backend)
    losses, counted = softmax_loss(sums.row_lse, sums.row_positives, row_counts, separate=separate)
    if not symmetric:
        return reduced(op, losses, counted, reduction, a)
    back, back_counted = softmax_loss(
        sums.column_lse, sums.column_positives, column_counts, separate=separate
    )
    if reduction == "none":
        if num_rows != num_columns:
            message = f"{op}: reduction must be 'mean' or 'sum' for N != M, got 'none'"
            raise ValueError(message)
        return reduced(op, 0.5 * (losses + back), counted, reduction, a)
    return 0.5 * (
        reduced(op, losses, counted, reduction, a) + reduced(op, back, back_counted, reduction, a)
    )


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
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
        backend: See above.

    Returns:
        () float32 (float64 for float64 features), or (N,) with reduction "none", the mean of both
        directions.

    Memory: O(N D); the (N, N) similarities are never stored.
    Source: Radford et al., Learning transferable visual models from natural language supervision,
    ICML 2021, arXiv:2103.00020; several captions: Zheng et al., DreamLIP, ECCV 2024, arXiv:2403.17007.

    Examples:
        >>> clip_loss(torch.eye(2), torch.eye(2), 1.0)
        tensor(0.3133)
    """
    op = "clip_loss"
    a, b = checked_features(op, ("image", image), ("text", text), normalize=normalize)
    ids = paired_ids(op, image_ids, text_ids, len(a), len(b), a, names=("image_ids", "text_ids"))
    if ids is None:
        check_symmetric(op, None, None, len(a), len(b), by_ids=False, names=("image", "text"))
        places = torch.arange(len(a), dtype=torch.int32, device=a.device)
        ids = (places, places)
        row_counts = column_counts = torch.ones(len(a), device=a.device)
    else:
        row_counts, column_counts = count_positives(*ids)
    separate = are_single(row_counts, column_counts)
    scale = positive_number(op, "logit_scale", logit_scale, a)
    sums = sums_over(
        op,
        a,
        b,
        scale,
        Pairs(None, ids[0], ids[1], separate_positives=separate),
        columns=True,
        backend=backend,
    )
    losses, counted = softmax_loss(sums.row_lse, sums.row_positives, row_counts, separate=separate)
    back, back_counted = softmax_loss(
        sums.column_lse, sums.column_positives, column_counts, separate=separate
    )
    if reduction == "none" and len(a) == len(b):
        return reduced(op, 0.5 * (losses + back), counted, reduction, a)
    check_choice(op, "reduction", reduction, ("mean", "sum") if len(a) != len(b) else REDUCTIONS)
    return 0.5 * (
        reduced(op, losses, counted, reduction, a) + reduced(op, back, back_counted, reduction, a)
    )
