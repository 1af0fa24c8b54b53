"""Probabilities of prototypes for features, which two vectors give instead of a matrix."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat._contrast import Pairs
from pyfeat._contrast_blocks import blocks, product_dtype, without_autocast


class Assignment(NamedTuple):
    """Probabilities of K prototypes for each of B features, not stored; constants without a gradient.

    ``Q_ik = exp(scale * features_i . prototypes_k + columns_k - row_lse_i)``; rows sum to 1.
    """

    features: Tensor  # (B, D)
    prototypes: Tensor  # (K, D)
    scale: Tensor  # () float64
    columns: Tensor  # (K,) float32, float64 for float64 features
    row_lse: Tensor  # (B,) float64

    def mean(self, values: Tensor) -> Tensor:
        """``Q @ values``: of every row, the mean of what the prototypes stand for.

        Differentiable by ``values``, also twice. The cross-entropy of Q with the predictions
        ``softmax(z @ w.T)`` is ``logsumexp_k(z_i . w_k) - mean(w)_i . z_i``.

        Args:
            values: (K, C) float, dtype and device of the features.

        Returns:
            (B, C) float32, float64 for float64 features.

        Memory: O((B + K) (C + D)).
        """
        mean: Tensor = _Mean.apply(values, *self)  # type: ignore[no-untyped-call]
        return mean

    def probabilities(self) -> Tensor:
        """Q itself, (B, K) float32, float64 for float64 features."""
        identity = torch.eye(
            len(self.prototypes), dtype=self.features.dtype, device=self.features.device
        )
        return self.mean(identity)


class _Mean(torch.autograd.Function):
    """``Q @ values``, (B, C); linear in values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *assignment: Tensor) -> Tensor:
        *rest, row_lse = assignment
        # Scores of large vectors are rounded in one way where they are summed up and in another here. That
        # must not look like a row of more or less than 1: the sums of rows come with the product.
        wide = torch.nn.functional.pad(values, (0, 1), value=1.0)
        product, sums = _product(assignment, wide, transposed=False).tensor_split((-1,), dim=1)
        ctx.save_for_backward(*rest, row_lse + sums[:, 0].double().log())
        ctx.dtype = values.dtype
        return product / sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_values = _Sum.apply(grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return grad_values.to(ctx.dtype), None, None, None, None, None


class _Sum(torch.autograd.Function):
    """``Q.T @ values``, (K, C); linear in values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *assignment: Tensor) -> Tensor:
        ctx.save_for_backward(*assignment)
        return _product(assignment, values, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_values = _Mean.apply(grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return grad_values, None, None, None, None, None


def _product(assignment: Sequence[Tensor], values: Tensor, *, transposed: bool) -> Tensor:
    features, prototypes, scale, columns, row_lse = assignment
    dtype = product_dtype(features)
    a, b, values = features.to(dtype), prototypes.to(dtype), values.to(dtype)
    out = values.new_zeros(len(b if transposed else a), values.shape[1])
    with without_autocast(a):
        for block in blocks(a, b, scale, Pairs(columns)):
            q = block.softmax(row_lse, 1).to(dtype)  # [l, s]
            if transposed:
                out[block.columns] += q.T @ values[block.rows]
            else:
                out[block.rows] += q @ values[block.columns]
    return out
