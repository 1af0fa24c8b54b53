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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat._contrast_blocks import Block, Sides, blocks, product_dtype, without_autocast
from pyfeat._pairs import Pairs


class SecondGradients:
    """Second gradients by ``a``, ``b`` and ``scale``, added up block by block.

    ``by`` are the gradients by the gradients of the three.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, by: tuple[Tensor, ...]) -> None:
        self._dtypes = a.dtype, scale.dtype
        self._a, self._b, self._by_a, self._by_b = (
            x.to(product_dtype(x)) for x in (a, b, by[0], by[1])
        )
        self._scale, self._by_scale = scale.double(), by[2].double()
        # Side by side, so that by_a.b + a.by_b is one product.
        self._left = torch.cat([self._by_a, self._a], dim=1)  # [L, 2 D]
        self._right = torch.cat([self._b, self._by_b], dim=1)  # [S, 2 D]
        self._grad_a, self._grad_b = self._a.new_zeros(a.shape), self._b.new_zeros(b.shape)
        self._grad_scale = torch.zeros_like(self._scale)

    def blocks(self, pairs: Pairs) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """All pairs with A and with the part of A that is multiplied by the scale, [l, s] float64."""
        for block in blocks(self._a, self._b, self._scale, pairs):
            slopes = (self._left[block.rows] @ self._right[block.columns].T).double()
            yield block, self._scale * slopes + self._by_scale * block.products, slopes

    def add(self, block: Block, slopes: Tensor, weights: Tensor, curvatures: Tensor) -> None:
        """``weights`` are G and ``curvatures`` H, both [l, s] float64."""
        i, j = block.rows, block.columns
        self._grad_scale += (curvatures * block.products).sum() + (weights * slopes).sum()
        by_features = self._scale * curvatures + self._by_scale * weights
        by_features, weights = (x.to(self._a.dtype) for x in (by_features, self._scale * weights))
        self._grad_a[i] += by_features @ self._b[j] + weights @ self._by_b[j]
        self._grad_b[j] += by_features.T @ self._a[i] + weights.T @ self._by_a[i]

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        features, scale = self._dtypes
        return self._grad_a.to(features), self._grad_b.to(features), self._grad_scale.to(scale)


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
    gradients = SecondGradients(a, b, scale, by)
    with without_autocast(a):
        means = _means(gradients.blocks(pairs), sides)
        for block, changes, slopes in gradients.blocks(pairs):
            weights, curvatures = block.positive_weights(sides), torch.zeros_like(slopes)
            for dim, mean in means.items():
                powers = block.softmax(mean.lse, dim)
                powers *= block.spread(sides[dim].weights, dim)
                weights += powers
                powers *= changes - block.spread(mean.changes, dim)
                curvatures += powers
            gradients.add(block, slopes, weights, curvatures)
    rows, columns = means[1], means.get(0)
    if columns is None:
        columns = _Means(*(rows.lse.new_zeros(0) for _ in _Means._fields))
    by_sums = rows.changes, columns.changes, rows.positives, columns.positives
    return (*gradients.total(), *by_sums)


class _Means(NamedTuple):
    """Of the rows or the columns, float64."""

    lse: Tensor  # log-sum-exps of the similarities at hand, so that softmaxes sum to 1
    changes: Tensor  # means of A, weighted by the softmax
    positives: Tensor  # sums of A over what is positive


def _means(pairs: Iterator[tuple[Block, Tensor, Tensor]], sides: Sides) -> dict[int, _Means]:
    means = {dim: _Means(*(torch.zeros_like(x) for x in side)) for dim, side in sides.items()}
    for block, changes, _ in pairs:
        at_positives = block.at_positives(changes)
        for dim, side in sides.items():
            part, powers = block.part(dim), block.softmax(side.lse, dim)
            means[dim].lse[part] += powers.sum(dim)
            powers *= changes
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
    """Keep the inputs of ``pyfeat::pair_sums_backward``."""
    # The last, similarities that were kept, are as large as a budget allows and are not used here.
    a, b, scale, _, *constants, ctx.itself, _, _, _, _ = inputs
    keep(ctx, [a, b, scale, *constants])


def second(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by all inputs of ``pyfeat::pair_sums_backward``, None for what has none."""
    inputs, (by_a, by_b, by_scale) = kept(ctx), by
    if ctx.itself:
        by_b = by_a
    of_features = as_features(by_a, inputs[0]), as_features(by_b, inputs[1])
    grad_a, grad_b, *gradients = torch.ops.pyfeat.pair_sums_second(*inputs, *of_features, by_scale)
    if ctx.itself:
        grad_a, grad_b = grad_a + grad_b, None
    constants = [None] * (len(inputs) - 2 - len(gradients))
    return (grad_a, grad_b, gradients[0], None, *constants, *gradients[1:], *[None] * 5)


def keep(ctx: Any, inputs: Sequence[Tensor | bool | None]) -> None:
    """Keep tensors and flags; torch sees if a tensor is changed in place before ``kept``."""
    ctx.flags = [x if isinstance(x, bool) else None for x in inputs]
    ctx.save_for_backward(*(None if isinstance(x, bool) else x for x in inputs))


def kept(ctx: Any) -> list[Any]:
    tensors = ctx.saved_tensors
    return [x if flag is None else flag for x, flag in zip(tensors, ctx.flags, strict=True)]


def as_features(gradient: Tensor, features: Tensor) -> Tensor:
    """Zeros for a gradient that was not asked for, which has no rows."""
    return gradient if gradient.shape == features.shape else torch.zeros_like(features)


def refuse_third(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    message = (
        "sums over pairs: derivatives must be of order 1 or 2, got a third; "
        "backend='reference' has all"
    )
    raise NotImplementedError(message)
