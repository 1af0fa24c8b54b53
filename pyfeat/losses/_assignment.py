"""Probabilities of prototypes for features, which two vectors give instead of a matrix."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._contrast import Pairs, WeightedSide, weighted_features
from pyfeat._contrast_blocks import product_dtype


class Assignment(NamedTuple):
    """Probabilities of K prototypes for each of B features, not stored; without a gradient.

    ``Q_ik = exp(scale * features_i . prototypes_k + columns_k - row_lse_i)``; rows sum to 1.
    """

    features: Tensor  # (B, D)
    prototypes: Tensor  # (K, D)
    scale: Tensor  # () float64
    columns: Tensor  # (K,) float32, float64 for float64 features
    row_lse: Tensor  # (B,) float64
    backend: Backend = "cpu"  # which was chosen for the features

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
    def forward(ctx: Any, values: Tensor, *assignment: Any) -> Tensor:
        _keep(ctx, assignment)
        ctx.dtype = values.dtype
        return _product(Assignment(*assignment), values, transposed=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_values = _Sum.apply(grad, *_kept(ctx))  # type: ignore[no-untyped-call]
        return grad_values.to(ctx.dtype), *(None for _ in Assignment._fields)


class _Sum(torch.autograd.Function):
    """``Q.T @ values``, (K, C); linear in values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *assignment: Any) -> Tensor:
        _keep(ctx, assignment)
        return _product(Assignment(*assignment), values, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_values = _Mean.apply(grad, *_kept(ctx))  # type: ignore[no-untyped-call]
        return grad_values, *(None for _ in Assignment._fields)


def _keep(ctx: Any, assignment: tuple[Any, ...]) -> None:
    *tensors, ctx.backend = assignment
    ctx.save_for_backward(*tensors)


def _kept(ctx: Any) -> tuple[Any, ...]:
    return (*ctx.saved_tensors, ctx.backend)


def _product(assignment: Assignment, values: Tensor, *, transposed: bool) -> Tensor:
    """Q, or its transpose, times ``values``, of the dtype of products."""
    features, prototypes, scale, columns, row_lse, backend = assignment
    dtype = product_dtype(features)
    a, b, values = features.to(dtype), prototypes.to(dtype), values.to(dtype)
    ones, zeros = torch.ones_like(row_lse), torch.zeros_like(row_lse)
    none = values.new_empty(len(b if transposed else a), 0)
    products = weighted_features(
        a,
        b,
        scale,
        Pairs(columns),
        WeightedSide(row_lse, ones, zeros),
        None,
        values if transposed else none,
        none if transposed else values,
        need_a=not transposed,
        need_b=transposed,
        backend=backend,
    )
    return products[1] if transposed else products[0]
