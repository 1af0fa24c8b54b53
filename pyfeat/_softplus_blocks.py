"""Sums of softplus over pairs in plain torch: float64 features, and second derivatives.

With y_ij = -1 where ij is positive, else 1, and z_ij = y_ij (S_ij + bias), the gradient of a loss by S_ij
is G_ij = g_i y_ij sigmoid(z_ij); no log-sum-exp ties pairs to others. So with A and the rest as in
``_contrast_second``, and v the gradient by that of the bias, grad_bias = sum G,

    H_ij = g_i sigmoid(z_ij) sigmoid(-z_ij) (A_ij + v),    df/dbias = sum H,
    df/dg_i = sum_j y_ij sigmoid(z_ij) (A_ij + v).
"""

import torch
from torch import Tensor

from pyfeat._contrast_blocks import (
    Block,
    blocks,
    product_dtype,
    scale_in_range,
    without_autocast,
)
from pyfeat._contrast_second import SecondGradients
from pyfeat._pairs import Pairs


def sums(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    weights: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of ``softplus(z)`` and ``y sigmoid(z)`` (L,), float64, and ``s G b`` and ``s G.T a``.

    ``weights`` (L,) float64 are g. What is not needed of the last two has no rows.

    Raises:
        ValueError: If similarities could overflow.
    """
    scale = scale_in_range("pair_softplus", a, b, scale)
    a, b = (x.to(product_dtype(x)) for x in (a, b))
    softplus, sigmoids = (a.new_zeros(len(a), dtype=torch.float64) for _ in range(2))
    by_a, by_b = (
        x.new_zeros(len(x) if need else 0, x.shape[1])
        for x, need in zip((a, b), needs, strict=True)
    )
    with without_autocast(a):
        for block in blocks(a, b, scale, pairs):
            i, j = block.rows, block.columns
            logits = _signed(block, block.similarities + bias.double())
            powers = _signed(block, _counted(block, logits.sigmoid()))
            softplus[i] += _counted(block, logits.logaddexp(logits.new_zeros(()))).sum(1)
            sigmoids[i] += powers.sum(1)
            powers *= block.spread(weights, 1)
            made = powers.to(a.dtype)  # G
            if needs[0]:
                by_a[i] += made @ b[j]
            if needs[1]:
                by_b[j] += made.T @ a[i]
    return softplus, sigmoids, by_a * scale, by_b * scale


def second_gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    weights: Tensor,
    by: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients by ``a``, ``b``, ``scale``, ``bias`` and ``weights``.

    ``by`` are the gradients by the gradients of the first four.
    """
    gradients = SecondGradients(a, b, scale, by[:3])
    of_softplus = a.new_zeros(len(a), dtype=torch.float64)
    grad_bias, by_bias = a.new_zeros((), dtype=torch.float64), by[3].double()
    with without_autocast(a):
        for block, changes, slopes in gradients.blocks(pairs):
            logits = _signed(block, block.similarities + bias.double())
            powers, moved = _counted(block, logits.sigmoid()), changes + by_bias
            curvatures = powers * block.spread(weights, 1) * logits.neg_().sigmoid_() * moved
            grad_bias += curvatures.sum()
            powers = _signed(block, powers)
            of_softplus[block.rows] += (powers * moved).sum(1)
            powers *= block.spread(weights, 1)
            gradients.add(block, slopes, powers, curvatures)
    return (*gradients.total(), grad_bias.to(bias.dtype), of_softplus)


def _signed(block: Block, values: Tensor) -> Tensor:
    """``values``, negative where a pair is positive."""
    return values if block.positive is None else torch.where(block.positive, -values, values)


def _counted(block: Block, values: Tensor) -> Tensor:
    """``values`` in place, 0 where a pair is left out."""
    return values if block.left_out is None else values.masked_fill_(block.left_out, 0.0)
