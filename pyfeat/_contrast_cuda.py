"""The ops over all pairs on a GPU, by kernels of a backend that is imported on first use."""

import importlib
from typing import Any, cast

import torch
from torch import Tensor

from pyfeat import _contrast_cpu
from pyfeat._capture import is_capturing
from pyfeat._contrast_blocks import scale_in_range
from pyfeat._gpu import contrast
from pyfeat._gpu.contrast_pairs import ContrastKernels
from pyfeat._pairs import Pairs, WeightedSide

_KERNELS = {"cuda": "pyfeat._cuda_ops.contrast", "triton": "pyfeat._triton.contrast"}


def forward(
    a: Tensor, b: Tensor, scale: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, ...]:
    """Sums over pairs; nothing is kept for the backward pass."""
    if a.dtype == torch.float64:
        return _contrast_cpu.forward(a, b, scale, backend, *arguments)  # plain torch
    *pairs, columns, largest, itself, _ = arguments
    scale = _scale_in_range("pair_sums", a, b, scale)
    sums = contrast.pair_sums(
        *(_kernels(backend), a, b, scale, Pairs(*pairs)),
        columns=columns,
        largest=largest,
        itself=itself,
    )
    return (*sums, a.new_empty(0, dtype=torch.float32))


def backward(
    a: Tensor, b: Tensor, scale: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from those by the sums."""
    if a.dtype == torch.float64:
        return _contrast_cpu.backward(a, b, scale, backend, *arguments)
    if is_capturing(a):  # else it has been looked at in the forward pass
        scale = _scale_in_range("pair_sums_backward", a, b, scale)
    *pairs, columns = arguments[:-11]
    itself, need_a, need_b, _, _ = arguments[-5:]
    sides = _weighted_sides(columns, arguments[-11:-5])
    wanted = contrast.Wanted(need_a or not need_b, need_b and not itself, itself)
    return contrast.pair_gradients(_kernels(backend), a, b, scale, Pairs(*pairs), *sides, wanted)


def weighted(
    a: Tensor, b: Tensor, scale: Tensor, backend: str, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Products with the weights of pairs."""
    if a.dtype == torch.float64 or backend == "reference":
        return _contrast_cpu.weighted(a, b, scale, "reference", *arguments)
    *pairs, columns = arguments[:-10]
    sides = _weighted_sides(columns, arguments[-10:-4])
    a_values, b_values, *needs = arguments[-4:]
    return contrast.weighted_features(
        *(_kernels(backend), a, b, scale, Pairs(*pairs), *sides),
        *(a_values, b_values, contrast.Wanted(*needs)),
    )


def softplus(
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
    scale = _scale_in_range("pair_softplus", a, b, scale)
    pairs = Pairs(None, *ids)
    return contrast.pair_softplus(
        _kernels(backend), a, b, scale, bias, pairs, weights, contrast.Wanted(*needs)
    )


def _kernels(backend: str) -> ContrastKernels:
    """Of the backend that was chosen, a module."""
    kernels: Any = importlib.import_module(_KERNELS[backend])
    return cast("ContrastKernels", kernels)


def _scale_in_range(op: str, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    # Products without their scale must not overflow either.
    return scale_in_range(op, a, b, scale, least=1.0)


def _weighted_sides(
    columns: bool, sides: tuple[Tensor, ...]
) -> tuple[WeightedSide, WeightedSide | None]:
    return WeightedSide(*sides[::2]), WeightedSide(*sides[1::2]) if columns else None
