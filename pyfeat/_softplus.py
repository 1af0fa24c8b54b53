"""The op behind the sigmoid loss: sums of softplus over all pairs.

The gradient of a pair needs no sum over others, so the forward pass makes the gradients of the sum of all
rows, and the backward pass of a mean or a sum multiplies them by one number.
"""

from typing import Any

import torch
from torch import Tensor

from pyfeat import _C, _contrast_cuda, _contrast_second, _softplus_blocks
from pyfeat._backends import Backend
from pyfeat._capture import is_capturing
from pyfeat._checks import as_matrix, with_contiguous_rows
from pyfeat._contrast_blocks import wide_dtype
from pyfeat._contrast_cpu import KeptPairs, scale_gradient
from pyfeat._derivatives import differentiable
from pyfeat._pairs import Pairs

_IDS_SCHEMA = (
    "Tensor? row_ids, Tensor? column_ids, Tensor? row_groups, Tensor? column_groups,"
    " bool keep_positives"
)
torch.library.define(
    "pyfeat::pair_softplus",
    f"(Tensor a, Tensor b, Tensor scale, Tensor bias, str backend, {_IDS_SCHEMA},"
    " bool gradient_a, bool gradient_b) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_softplus_backward",
    f"(Tensor a, Tensor b, Tensor scale, Tensor bias, str backend, {_IDS_SCHEMA},"
    " Tensor row_sigmoids, Tensor grad_softplus, Tensor unit_a, Tensor unit_b, bool need_a,"
    " bool need_b) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pyfeat::pair_softplus_second",
    f"(Tensor a, Tensor b, Tensor scale, Tensor bias, {_IDS_SCHEMA}, Tensor grad_softplus,"
    " Tensor by_grad_a, Tensor by_grad_b, Tensor by_grad_scale, Tensor by_grad_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def pair_softplus(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, *, backend: Backend = "cpu"
) -> Tensor:
    """Row sums (L,) float64 of ``softplus(S + bias)``, of ``softplus(-S - bias)`` for positive pairs.

    ``S = scale * a @ b.T``; differentiable twice.

    Args:
        a: (L, D) float32, float64, float16 or bfloat16, finite.
        b: (S, D), dtype and device of ``a``.
        scale: () float, positive.
        bias: () float.
        pairs: Constants; its column bias and how it treats log-sum-exps have no part.
        backend: Which was chosen for the features, not the reference.
    """
    wanted = torch.is_grad_enabled()
    need_scale = scale.requires_grad and not b.requires_grad
    need_a, need_b = wanted and (a.requires_grad or need_scale), wanted and b.requires_grad
    sums = _pair_softplus(a, b, scale, bias, backend, *pairs[1:6], need_a, need_b)
    softplus: Tensor = sums[0]
    return softplus


def _run_cpu(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    backend: str,
    ids: tuple[Any, ...],
    weights: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of softplus and of signed sigmoids, and both gradients in float32."""
    kept_pairs = KeptPairs(Pairs(None, *ids))
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    weights = weights.contiguous()
    softplus, sigmoids = (torch.empty(len(a), dtype=torch.float64) for _ in range(2))
    by_a = torch.empty((len(a) if needs[0] else 0, a.shape[1]), dtype=torch.float32)
    by_b = torch.empty((len(b) if needs[1] else 0, a.shape[1]), dtype=torch.float32)
    _C.softplus_cpu(
        as_matrix(a),
        as_matrix(b),
        float(scale),
        float(bias),
        kept_pairs.terms,
        weights.data_ptr(),
        (softplus.data_ptr(), sigmoids.data_ptr()),
        (
            as_matrix(a),
            as_matrix(b),
            by_a.data_ptr() if needs[0] else 0,
            by_b.data_ptr() if needs[1] else 0,
        ),
        torch.get_num_threads(),
    )
    return softplus, sigmoids, by_a, by_b


def _run(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    backend: str,
    ids: tuple[Any, ...],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if a.dtype == torch.float64:
        return _softplus_blocks.sums(a, b, scale, bias, Pairs(None, *ids), *arguments)
    run = _contrast_cuda.softplus if a.is_cuda else _run_cpu
    return run(a, b, scale, bias, backend, ids, *arguments)


def _run_forward(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, ...]:
    *ids, gradient_a, gradient_b = arguments
    ones = torch.ones(len(a), dtype=torch.float64, device=a.device)
    return _run(a, b, scale, bias, backend, tuple(ids), ones, (gradient_a, gradient_b))


def _run_backward(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *ids, sigmoids, grad_softplus, unit_a, unit_b, need_a, need_b = arguments
    need_a = need_a or not need_b
    weights = grad_softplus.double()
    made = len(unit_a) == len(a) or not need_a, len(unit_b) == len(b) or not need_b
    if all(made) and _all_equal(weights):
        factor = weights[:1].sum()  # 0 without rows
        by_a, by_b = (unit * factor.to(unit.dtype) for unit in (unit_a, unit_b))
    else:
        *_, by_a, by_b = _run(a, b, scale, bias, backend, tuple(ids), weights, (need_a, need_b))
    grad_scale = scale_gradient(*((a, by_a) if need_a else (b, by_b)), scale)
    grad_bias = (weights @ sigmoids).to(bias.dtype)
    return by_a.to(a.dtype), by_b.to(b.dtype), grad_scale, grad_bias


def _all_equal(weights: Tensor) -> bool:
    """Whether they are known to be; of a graph that is captured only if they are one number, expanded."""
    if len(weights) <= 1 or weights.stride(0) == 0:
        return True
    return not is_capturing(weights) and bool((weights == weights[:1]).all())


def _forward_fake(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *_, gradient_a, gradient_b = arguments
    sums = [a.new_empty(a.shape[0], dtype=torch.float64) for _ in range(2)]
    counts = a.shape[0] if gradient_a else 0, b.shape[0] if gradient_b else 0
    return (*sums, *(a.new_empty(n, a.shape[1], dtype=wide_dtype(a)) for n in counts))


def _backward_fake(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_a, need_b = arguments[-2:]
    num_rows = a.shape[0] if need_a or not need_b else 0
    return (
        a.new_empty(num_rows, a.shape[1]),
        b.new_empty(b.shape[0] if need_b else 0, a.shape[1]),
        scale.new_empty(()),
        bias.new_empty(()),
    )


def _second(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *ids, grad_softplus = arguments[:-4]
    return _softplus_blocks.second_gradients(
        a, b, scale, bias, Pairs(None, *ids), grad_softplus.double(), arguments[-4:]
    )


def _second_fake(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    of_softplus = a.new_empty(a.shape[0], dtype=torch.float64)
    return (*(x.new_empty(x.shape) for x in (a, b, scale, bias)), of_softplus)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, scale, bias, *ctx.rest, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, scale, bias, *output[1:])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, scale, bias, sigmoids, unit_a, unit_b = ctx.saved_tensors
    given = torch.zeros_like(sigmoids) if grads[0] is None else grads[0]
    need_a, need_b, need_scale, need_bias = ctx.needs_input_grad[:4]
    grad_a, grad_b, grad_scale, grad_bias = _pair_softplus_backward(
        a, b, scale, bias, *ctx.rest, sigmoids, given, unit_a, unit_b, need_a, need_b
    )
    return (
        grad_a if need_a else None,
        grad_b if need_b else None,
        grad_scale if need_scale else None,
        grad_bias if need_bias else None,
        *(None for _ in range(8)),
    )


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Sigmoids and unit gradients are made of the others.
    _contrast_second.keep(ctx, [*inputs[:4], *inputs[5:10], inputs[11]])


def _backward_twice(ctx: Any, *by: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _contrast_second.kept(ctx)
    of_features = (
        _contrast_second.as_features(gradient, features)
        for gradient, features in zip(by[:2], inputs[:2], strict=True)
    )
    *gradients, of_softplus = torch.ops.pyfeat.pair_softplus_second(*inputs, *of_features, *by[2:])
    ids: list[None] = [None] * 5
    return (*gradients, None, *ids, None, of_softplus, None, None, None, None)


torch.library.register_fake("pyfeat::pair_softplus", _forward_fake)
torch.library.register_fake("pyfeat::pair_softplus_backward", _backward_fake)
_pair_softplus = differentiable(
    "pair_softplus", {"cpu": _run_forward, "cuda": _run_forward}, _backward, _keep_for_backward
)
_pair_softplus_backward = differentiable(
    "pair_softplus_backward",
    {"cpu": _run_backward, "cuda": _run_backward},
    _backward_twice,
    _keep_for_second,
)
torch.library.impl("pyfeat::pair_softplus_second", "default", _second)
torch.library.register_fake("pyfeat::pair_softplus_second", _second_fake)
torch.library.register_autograd("pyfeat::pair_softplus_second", _contrast_second.refuse_third)
