"""Patches of an image, pooled by what is said of it."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat._checks import check_choice


def grouping_weights(
    patches: Tensor,
    texts: Tensor,
    *,
    pooling: Literal["minmax", "softmax"] = "minmax",
    threshold: float | None = 0.1,
) -> Tensor:
    """Return how much each patch counts for each text of its image.

    The cosines of a text to the patches go to [0, 1], the least similar to 0 and the most similar to
    1, or through a softmax; weights below the threshold become 0, and the rest sum to 1. Where none
    is left, as with equal patches, all count the same.

    Args:
        patches: (B, P, D) float, of any length.
        texts: (B, K, D), of any length, in the space of the patches.
        pooling: Least and largest, or softmax.
        threshold: At least 0; None: 1 / P.

    Returns:
        (B, K, P) float32, float64 for float64 features; with gradients by patches and texts, also
        through the least and the largest cosine.

    Raises:
        ValueError: If shapes disagree, or the threshold is negative.

    Source: Zheng et al., DreamLIP, ECCV 2024, arXiv:2403.17007.

    Examples:
        >>> grouping_weights(torch.eye(3)[None], torch.tensor([[[3.0, 1.0, 0.0]]]))
        tensor([[[0.7500, 0.2500, 0.0000]]])
    """
    op = "grouping_weights"
    check_choice(op, "pooling", pooling, ("minmax", "softmax"))
    if patches.ndim != 3 or texts.ndim != 3 or (texts.shape[::2] != patches.shape[::2]):
        message = (
            f"{op}: patches and texts must have shapes (B, P, D) and (B, K, D), got "
            f"{tuple(patches.shape)} and {tuple(texts.shape)}"
        )
        raise ValueError(message)
    num_patches = patches.shape[1]
    least = 1.0 / num_patches if threshold is None else threshold
    if not least >= 0.0:
        message = f"{op}: threshold must be at least 0, got {threshold}"
        raise ValueError(message)
    dtype = torch.promote_types(patches.dtype, torch.float32)
    rows, columns = (functional.normalize(x.to(dtype), dim=2) for x in (texts, patches))
    cosines = rows @ columns.mT  # [B, K, P]
    if pooling == "softmax":
        weights = cosines.softmax(dim=2)
    else:
        low, high = cosines.amin(dim=2, keepdim=True), cosines.amax(dim=2, keepdim=True)
        weights = (cosines - low) / (high - low + 1e-10)
    weights = weights.where(weights >= least, 0.0)
    total = weights.sum(dim=2, keepdim=True)
    even = weights.new_tensor(1.0 / num_patches)
    return torch.where(total > 0, weights / total.where(total > 0, 1.0), even)


def grouped_patches(patches: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted means of patches, (B, K, D); nothing of (B, K, P, D) is stored.

    Args:
        patches: (B, P, D).
        weights: (B, K, P), as ``grouping_weights`` has them.
    """
    return weights @ patches.to(weights.dtype)
