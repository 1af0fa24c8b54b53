"""Derivatives of gradients, and how near they come to those of torch."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


def with_second(loss: Loss, inputs: list[Tensor], along: list[Tensor] | None) -> list[Tensor]:
    """Derivatives of the gradient of the mean loss, in float64.

    Along ``along``: the product with the Hessian; None: of the squared length of the gradient.
    """
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(loss(*leaves).mean(), leaves, create_graph=True)
    total = torch.stack(
        [
            (x.double() * (x.double() if along is None else v.double())).sum()
            for x, v in zip(gradients, along or gradients, strict=True)
        ]
    ).sum()
    return [x.double() for x in torch.autograd.grad(total, leaves)]


def assert_second_as_good_as_torch(
    losses: tuple[Loss, Loss],
    inputs: list[Tensor],
    along: list[Tensor] | None,
    *,
    near_zero: bool = True,
) -> None:
    """Fail unless every error is at most twice the largest that torch makes in float32.

    Granted where torch, by chance, makes none: one rounding of each of the two sums that a second
    derivative consists of, and one of the largest similarity of unit vectors, which changes powers by
    as much. Those by scale and bias are one number; it may be ``near_zero``, a sum of parts as large as
    others.
    """
    ours, eager = losses
    exact = with_second(
        functools.partial(ours, backend="reference"),
        [x.double() for x in inputs],
        None if along is None else [x.double() for x in along],
    )
    scale = float(inputs[2])
    for mine, theirs, true in zip(
        with_second(ours, inputs, along), with_second(eager, inputs, along), exact, strict=True
    ):
        largest = float(true.abs().max())
        budget = 2 * float((theirs - true).abs().max())
        parts = exact if true.ndim == 0 and near_zero else [true]
        floor = 2.0**-24 * (2.0 + scale) * max(float(x.abs().max()) for x in parts)
        error = (mine - true).abs()
        assert (error <= budget + floor).all(), (
            f"off by {error.max():.2e} of {largest:.2e} {tuple(true.shape)}, torch {budget / 2:.2e}"
        )
