"""The sigmoid loss: every pair is told from the others on its own."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyfeat import reference
from pyfeat._backends import BACKENDS, Backend, select_backend
from pyfeat._checks import check_choice
from pyfeat._pairs import Pairs
from pyfeat._softplus import SoftplusSums, pair_softplus
from pyfeat.losses._arguments import (
    check_same_length,
    checked_features,
    finite_number,
    positive_number,
)
from pyfeat.losses._positives import count_equal, paired_ids
from pyfeat.losses._reduction import Reduction, check_reduction, reduced


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
        normalize: As in ``info_nce``; also ``reduction`` and ``backend``, and what is raised. The mean is
            over images.
        reduction: See above.
        backend: See above.

    Returns:
        () float32, float64 for float64 features, or (N,) with reduction "none".

    Precision: products and gradients in float32, sums of the loss in float64; small terms, such as those
    of a large negative bias, keep their digits; with ids, those of positive pairs are taken from a
    difference and may be off by 1e-6 for each.
    Memory: O(N D); the (N, N) similarities are never stored. The gradients are made in the forward pass.
    Source: Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023, arXiv:2303.15343.

    Examples:
        >>> siglip_loss(torch.eye(2), torch.eye(2), 1.0, 0.0)
        tensor(1.0064)
    """
    op = "siglip_loss"
    a, b = checked_features(op, ("image", image), ("text", text), normalize=normalize)
    ids = paired_ids(op, image_ids, text_ids, len(a), len(b), a, names=("image_ids", "text_ids"))
    if ids is None:
        check_same_length(op, ("image", "text"), a, b)
    scale = positive_number(op, "logit_scale", logit_scale, a)
    bias = finite_number(op, "logit_bias", logit_bias, a)
    check_reduction(op, reduction)
    check_choice(op, "backend", backend, (None, *BACKENDS))
    if ids is None:
        # Left out of the sums, where little is left of its loss a positive pair keeps its digits.
        places = torch.arange(len(a), dtype=torch.int32, device=a.device)
        pairs = Pairs(None, places, places, places, places)
        wide = torch.promote_types(a.dtype, torch.float32)
        products = (a.to(wide) * b.to(wide)).sum(dim=1, dtype=torch.float64)
        positives = softplus(-(scale.double() * products + bias.double()))
    else:
        pairs = Pairs(None, ids[0], ids[1])
        positives = -bias.double() * count_equal(*ids)[0]
    if select_backend(op, backend, a) == "reference":
        sums = SoftplusSums(*reference.pair_softplus(a, b, scale, bias, *pairs[1:6]))
    else:
        sums = pair_softplus(a, b, scale, bias, pairs)
    # log(1 + exp(-z)) = log(1 + exp(z)) - z, for positive pairs among the sums.
    each = sums.row_softplus - sums.row_positives + positives
    return reduced(op, each, None, reduction, a)
