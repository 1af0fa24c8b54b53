"""Second derivatives of sums over pairs, for gradient penalties and products with the Hessian.

With G_ij the gradient of a loss by S_ij, the gradients are grad_a = s G b, grad_b = s G^T a and
grad_s = sum G (a.b). For gradients v_a, v_b, v_s by these, and with

    P_ij = exp(S_ij - row_lse_i),    R_ij = exp(S_ij - column_lse_j),
    A_ij = s (v_a,i . b_j + a_i . v_b,j) + v_s a_i.b_j,    f = sum G A,
    mean_i = sum_j P_ij A_ij,    mean_j = sum_i R_ij A_ij,
    H_ij = g_row_i P_ij (A_ij - mean_i) + g_column_j R_ij (A_ij - mean_j),

    df/da = s (H b + G v_b) + v_s G b         df/dg_row_i = mean_i
    df/db = s (H^T a + G^T v_a) + v_s G^T a   df/dg_row_positives_i = sum of A_ij over positives
    df/ds = sum H (a.b) + G (v_a.b + a.v_b)   and likewise of columns.

A first pass takes the means, three products of (L, S, D), and a second one the rest, seven.

That the log-sum-exps follow ``a``, ``b`` and ``scale`` is in the means. As a derivative of its own, by
``row_lse`` and on through the kernels, it would leave sum_j P_ij A_ij to be cancelled by a sum in which
similarities are rounded differently: an error of scale |mean_i| that grows without bound for features
with a direction in common. For the same reason log-sum-exps are taken again here.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat._contrast_blocks import Block, Sides, blocks, product_dtype, without_autocast
from pyfeat._pairs import Pairs


class _Changes:
    """A_ij: how much S_ij changes with what the gradients by ``a``, ``b`` and ``scale`` are for."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, by: tuple[Tensor, ...]) -> None:
        by_a, by_b, self._by_scale = by
        # Side by side, so that by_a.b + a.by_b is one product.
        self._left, self._right = torch.cat([by_a, a], dim=1), torch.cat([b, by_b], dim=1)
        self._scale = scale

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        """A and the part of it that is multiplied by the scale, both [l, s] float64."""
        slopes = (self._left[block.rows] @ self._right[block.columns].T).double()
        return self._scale * slopes + self._by_scale * block.products, slopes


def second_gradients(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    sides: Sides,
    by: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, ...]:
    """Gradients by ``a``, ``b``, ``scale`` and by the gradients that come from the sums.

    Those are of log-sum-exps of rows and of columns, then of positive sums of both; of columns (0,) if
    they are not wanted. ``by`` are the gradients by the gradients of ``a``, ``b`` and ``scale``.

    Raises:
        ValueError: If log-sum-exps are over more or other than these pairs.
    """
    dtypes = a.dtype, scale.dtype
    a, b, by_a, by_b = (x.to(product_dtype(x)) for x in (a, b, *by[:2]))
    s, by_scale = scale.double(), by[2].double()
    grad_a, grad_b, grad_s = a.new_zeros(a.shape), b.new_zeros(b.shape), torch.zeros_like(s)
    with without_autocast(a):
        changes = _Changes(a, b, s, (by_a, by_b, by_scale))
        means = _means(blocks(a, b, s, pairs), changes, sides)
        for block in blocks(a, b, s, pairs):
            at_pairs, slopes = changes.of(block)
            weights, curvatures = block.positive_weights(sides), torch.zeros_like(slopes)  # G, H
            for dim, mean in means.items():
                powers = block.softmax(mean.lse, dim)
                powers *= block.spread(sides[dim].grad_lse, dim)
                weights += powers
                powers *= at_pairs - block.spread(mean.changes, dim)
                curvatures += powers
            grad_s += (curvatures * block.products).sum() + (weights * slopes).sum()
            curvatures = (s * curvatures + by_scale * weights).to(a.dtype)
            weights = (s * weights).to(a.dtype)
            i, j = block.rows, block.columns
            grad_a[i] += curvatures @ b[j] + weights @ by_b[j]
            grad_b[j] += curvatures.T @ a[i] + weights.T @ by_a[i]
    none = _Means(*(grad_s.new_zeros(0) for _ in _Means._fields))
    rows, columns = means[1], means.get(0, none)
    return (
        grad_a.to(dtypes[0]),
        grad_b.to(dtypes[0]),
        grad_s.to(dtypes[1]),
        rows.changes,
        columns.changes,
        rows.positives,
        columns.positives,
    )


class _Means(NamedTuple):
    """Of the rows or the columns, float64."""

    lse: Tensor  # log-sum-exps of the similarities at hand, so that softmaxes sum to 1
    changes: Tensor  # means of A, weighted by the softmax
    positives: Tensor  # sums of A over what is positive


def _means(pairs: Iterator[Block], changes: _Changes, sides: Sides) -> dict[int, _Means]:
    means = {dim: _Means(*(torch.zeros_like(x) for x in side)) for dim, side in sides.items()}
    for block in pairs:
        at_pairs, _ = changes.of(block)
        at_positives = block.at_positives(at_pairs)
        for dim, side in sides.items():
            part, powers = block.part(dim), block.softmax(side.lse, dim)
            means[dim].lse[part] += powers.sum(dim)
            powers *= at_pairs
            means[dim].changes[part] += powers.sum(dim)
            means[dim].positives[part] += at_positives.sum(dim)
    for dim, side in sides.items():
        powers, weighted, positives = means[dim]
        powers = powers.where(side.lse > -math.inf, 1.0)
        # Roundings of similarities of up to 1,000 in float32 change powers by 2^-13.
        if not ((powers > 0.5) & (powers < 2.0)).all():
            name = "row_lse" if dim == 1 else "column_lse"
            message = (
                f"pair_sums_backward: {name} must be over these rows and columns for a second "
                "derivative, got others"
            )
            raise ValueError(message)
        means[dim] = _Means(side.lse + powers.log(), weighted / powers, positives)
    return means


def keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs of ``pyfeat::pair_sums_backward``; torch sees if one is changed in place."""
    # The last, similarities that were kept, are as large as a budget allows and are not used here.
    *inputs_, ctx.itself, _, _, _ = inputs
    ctx.are_tensors = [isinstance(x, Tensor) for x in inputs_]
    ctx.save_for_backward(*(x for x in inputs_ if isinstance(x, Tensor)))
    ctx.others = [x for x in inputs_ if not isinstance(x, Tensor)]


def second(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by all inputs of ``pyfeat::pair_sums_backward``, None for what has none."""
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    inputs = [next(tensors if is_tensor else others) for is_tensor in ctx.are_tensors]
    by_a, by_b, by_scale = by
    if ctx.itself:
        by_b = by_a
    # What was not asked for has no gradient.
    by_a, by_b = (
        v if v.shape == x.shape else torch.zeros_like(x)
        for v, x in zip((by_a, by_b), inputs, strict=False)
    )
    grad_a, grad_b, *gradients = torch.ops.pyfeat.pair_sums_second(*inputs, by_a, by_b, by_scale)
    if ctx.itself:
        grad_a, grad_b = grad_a + grad_b, None
    constants = [None] * (len(inputs) - 2 - len(gradients))
    return (grad_a, grad_b, gradients[0], *constants, *gradients[1:], None, None, None, None)


def refuse_third(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    message = (
        "pair_sums: derivatives must be of order 1 or 2, got a third; backend='reference' has all"
    )
    raise NotImplementedError(message)
