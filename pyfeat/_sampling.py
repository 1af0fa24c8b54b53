"""The op behind deformable attention: a weighted gather at fractional cells, and its gradients.

Points are in flat form: T of them for every query and head, those of the first level first.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat import _sampling_cpu
from pyfeat._derivatives import differentiable


class Levels(NamedTuple):
    """What the points of a call lie on, and how values are read there."""

    shapes: list[int]  # L n sizes, level by level, in the order of the axes in memory
    num_points: list[int]  # of each level
    border: bool  # beyond it a level goes on as its last cell; else as zeros
    align_corners: bool
    discrete: bool
    softmax: bool  # the weights are logits
    backend: str  # which was chosen for the inputs


_INPUTS = (
    "Tensor value, SymInt[] shapes, SymInt[] num_points, Tensor locations, Tensor weights,"
    " bool border, bool align_corners, bool discrete, bool softmax, str backend"
)
torch.library.define("pyfeat::deform_attn", f"({_INPUTS}) -> Tensor")
torch.library.define(
    "pyfeat::deform_attn_backward",
    f"({_INPUTS}, Tensor grad_output, bool need_value, bool need_locations, bool need_weights)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::deform_attn_second",
    f"({_INPUTS}, Tensor grad_output, Tensor by_value, Tensor by_locations, Tensor by_weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


def attend(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """(B, Q, H D) of value (B, S, H, D), locations (B, Q, H, T, n) and weights (B, Q, H, T)."""
    shapes, num_points, *flags = levels
    output: Tensor = _attend(value, shapes, num_points, locations, weights, *flags)
    return output


def _implementation(value: Tensor) -> Any:
    if value.device.type == "cpu":
        return _sampling_cpu
    return importlib.import_module("pyfeat._sampling_cuda")


def _forward(value: Tensor, *arguments: Any) -> Tensor:
    output: Tensor = _implementation(value).forward(value, *arguments)
    return output


def _gradients(value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _implementation(value).backward(value, *arguments)
    return gradients


def _second_gradients(value: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = _implementation(value).second(
        value, *arguments
    )
    return gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    value, ctx.shapes, ctx.num_points, locations, weights, *ctx.rest = inputs
    given = [x for x in ctx.rest if isinstance(x, Tensor)]
    ctx.save_for_backward(value, locations, weights, *given)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    *flags, softmax, backend = ctx.rest
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    # What is derived once more must be made of parts that have derivatives.
    apart = softmax and torch.is_grad_enabled()
    logits = weights
    if apart:  # in the dtype of the sums: the gradient is that without this
        weights = weights.softmax(dim=-1, dtype=torch.promote_types(value.dtype, torch.float32))
    grad_value, grad_locations, grad_weights = _attend_backward(
        value,
        ctx.shapes,
        ctx.num_points,
        locations,
        weights,
        *flags,
        softmax and not apart,
        backend,
        grad_output,
        *needs,
    )
    if apart and needs[2]:
        mean = (weights * grad_weights).sum(dim=-1, keepdim=True)
        grad_weights = (weights * (grad_weights - mean)).to(logits.dtype)
    return (
        grad_value if needs[0] else None,
        None,
        None,
        grad_locations if needs[1] else None,
        grad_weights if needs[2] else None,
        *(None for _ in ctx.rest),
    )


def _second(ctx: Any, *by: Tensor | None) -> tuple[Tensor | None, ...]:
    value, locations, weights, grad_output = ctx.saved_tensors
    *flags, softmax, backend = ctx.rest[:5]
    if softmax:
        message = (
            "deform_attn: a gradient must be asked for with create_graph=True before it is derived "
            "once more, got one without it"
        )
        raise NotImplementedError(message)
    # A gradient that was not asked for has no elements.
    of_inputs = [
        torch.zeros_like(x) if given is None or given.shape != x.shape else given
        for x, given in zip((value, locations, weights), by, strict=True)
    ]
    grad_value, grad_locations, grad_weights, grad_grad_output = (
        torch.ops.pyfeat.deform_attn_second(
            value,
            ctx.shapes,
            ctx.num_points,
            locations,
            weights,
            *flags,
            softmax,
            backend,
            grad_output,
            *of_inputs,
        )
    )
    flags, needs = (None,) * 5, (None,) * 3
    return (
        *(grad_value, None, None, grad_locations, grad_weights, *flags),
        *(grad_grad_output, *needs),
    )


def _refuse_third(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    message = (
        "deform_attn: derivatives must be of order 1 or 2, got a third; backend='reference' has all"
    )
    raise NotImplementedError(message)


def _forward_fake(
    value: Tensor, shapes: list[int], num_points: list[int], locations: Tensor, *rest: Any
) -> Tensor:
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, locations.shape[1], heads * dim)


def _backward_fake(
    value: Tensor,
    shapes: list[int],
    num_points: list[int],
    locations: Tensor,
    weights: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    needs = zip((value, locations, weights), arguments[-3:], strict=True)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in needs)


def _second_fake(
    value: Tensor,
    shapes: list[int],
    num_points: list[int],
    locations: Tensor,
    weights: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    grad_output = arguments[5]
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights, grad_output))


torch.library.register_fake("pyfeat::deform_attn", _forward_fake)
torch.library.register_fake("pyfeat::deform_attn_backward", _backward_fake)
torch.library.register_fake("pyfeat::deform_attn_second", _second_fake)
_attend = differentiable("deform_attn", {"cpu": _forward, "cuda": _forward}, _backward, _keep)
_attend_backward = differentiable(
    "deform_attn_backward", {"cpu": _gradients, "cuda": _gradients}, _second, _keep
)
torch.library.impl("pyfeat::deform_attn_second", "default", _second_gradients)
torch.library.register_autograd("pyfeat::deform_attn_second", _refuse_third)
