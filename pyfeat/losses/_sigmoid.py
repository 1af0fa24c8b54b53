"""The sigmoid loss: every pair is told from the others on its own."""

import torch.distributed as dist
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import Backend
from pyfeat._distributed import distributed_pair_softplus
from pyfeat._pairs import Pairs
from pyfeat._ranks import Schedule
from pyfeat._softplus import pair_softplus
from pyfeat.losses._arguments import (
    check_same_length,
    checked_features,
    finite_number,
    positive_number,
)
from pyfeat.losses._group import Reduce, given, meeting, outside_graphs
from pyfeat.losses._positives import checked_ids, places_over, row_indices
from pyfeat.losses._reduction import (
    Losses,
    Reduction,
    check_group,
    check_reduction,
    chosen_backend,
    reduced_mean,
)


@outside_graphs
def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: "dist.ProcessGroup | None" = None,
    reduce: Reduce = "ddp_mean",
    schedule: Schedule | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Binary cross-entropy of all pairs of image and text features.

    With ``Z = logit_scale * image @ text.T + logit_bias`` and y 1 for a pair and -1 for all others,
    ``loss_i = sum_j log(1 + exp(-y_ij Z_ij))``.

    Args:
        image: (N, D) float32, float64, float16 or bfloat16, usually of unit length.
        text: (N, D), or (M, D) with ids; dtype and device of ``image``.
        logit_scale: > 0; a tensor () may have a gradient. Usually exp of a parameter that starts at ln 10.
        logit_bias: Finite; a tensor () may have a gradient. Usually starts at -10, about the logarithm
            of one positive among all pairs.
        image_ids: (N,) int64 with ``text_ids``: all texts with the id of an image are its pairs.
        text_ids: (M,) int64.
        normalize: As in ``info_nce``; also all that follow, and what is raised. The mean is over images.
        reduction: See above.
        group: See above.
        reduce: See above.
        schedule: See above.
        backend: See above.

    Returns:
        () float32, float64 for float64 features, or (N,) with reduction "none".

    Precision: products and gradients in float32 (as in ``info_nce`` for bfloat16 features), sums of the
    loss in float64; small terms, such as those of a large negative bias, keep their digits.
    Memory: O(N D); the (N, N) similarities are never stored. The gradients are made in the forward pass.
    Source: Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023, arXiv:2303.15343.

    Examples:
        >>> import torch
        >>> siglip_loss(torch.eye(2), torch.eye(2), 1.0, 0.0)
        tensor(1.0064)
    """
    op = "siglip_loss"
    with meeting(op, group, schedule) as met:
        a, b = checked_features(op, ("image", image), ("text", text), normalize=normalize)
        names = ("image_ids", "text_ids")
        ids = checked_ids(op, image_ids, text_ids, len(a), len(b), a, names=names)
        if ids is None:
            check_same_length(op, ("image", "text"), a, b)
        scale = positive_number(op, "logit_scale", logit_scale, a)
        bias = finite_number(op, "logit_bias", logit_bias, a)
        check_reduction(op, reduction)
        check_group(op, group, reduce, backend, a)
        chosen = chosen_backend(op, backend, a)
        met.tell(
            a,
            b,
            scale,
            logit_bias=bias,
            learnable_bias=bias.requires_grad,
            reduction=reduction,
            reduce=reduce,
            **given(image_ids=ids),
        )
    ranks = met.ranks
    if ids is None:
        places = row_indices(a, ranks)
        pairs = Pairs(None, places, places)
    else:
        pairs = Pairs(None, *places_over(*ids, ranks))
    if ranks is not None:
        each = distributed_pair_softplus(a, b, scale, bias, pairs, ranks=ranks, backend=chosen)
    elif chosen == "reference":
        each = reference.pair_softplus(a, b, scale, bias, *pairs[1:6])
    else:
        each = pair_softplus(a, b, scale, bias, pairs, backend=chosen)
    return reduced_mean(op, [Losses(each)], reduction, a, ranks, reduce)
