"""The ops over all pairs on a GPU, by kernels of a backend that is imported on first use."""

from typing import Any

import torch
from torch import Tensor

from pyfeat import _contrast_cpu
from pyfeat._contrast_blocks import check_range
from pyfeat._gpu import contrast
from pyfeat._gpu.contrast_pairs import ContrastKernels
from pyfeat._pairs import Pairs, WeightedSide


def forward(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Sums over pairs; nothing is kept for the backward pass."""
    if a.dtype == torch.float64:
        return _contrast_cpu.forward(a, b, scale, *arguments)  # plain torch
    *pairs, columns, largest, itself, _ = arguments
    _check_range("pair_sums", a, b, scale)
    sums = contrast.pair_sums(
        _kernels(), a, b, scale, Pairs(*pairs), columns=columns, largest=largest, itself=itself
    )
    return (*sums, a.new_empty(0, dtype=torch.float32))


def backward(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from those by the sums."""
    if a.dtype == torch.float64:
        return _contrast_cpu.backward(a, b, scale, *arguments)
    *pairs, columns = arguments[:-11]
    itself, need_a, need_b, _, _ = arguments[-5:]
    sides = _weighted_sides(columns, arguments[-11:-5])
    wanted = contrast.Wanted(need_a or not need_b, need_b and not itself, itself)
    return contrast.pair_gradients(_kernels(), a, b, scale, Pairs(*pairs), *sides, wanted)


def weighted(a: Tensor, b: Tensor, scale: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Products with the weights of pairs."""
    if a.dtype == torch.float64:
        return _contrast_cpu.weighted(a, b, scale, *arguments)
    *pairs, columns = arguments[:-10]
    sides = _weighted_sides(columns, arguments[-10:-4])
    a_values, b_values, *needs = arguments[-4:]
    return contrast.weighted_features(
        _kernels(), a, b, scale, Pairs(*pairs), *sides, a_values, b_values, contrast.Wanted(*needs)
    )


def softplus(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: tuple[Any, ...],
    weights: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of softplus and of signed sigmoids, and both gradients in float32."""
    _check_range("pair_softplus", a, b, scale)
    pairs = Pairs(None, *ids)
    return contrast.pair_softplus(
        _kernels(), a, b, scale, bias, pairs, weights, contrast.Wanted(*needs)
    )


def _kernels() -> ContrastKernels:
    from pyfeat._triton import contrast

    return contrast


def _check_range(op: str, a: Tensor, b: Tensor, scale: Tensor) -> None:
    # Products without their scale must not overflow either.
    check_range(op, a, b, scale.abs().clamp_min(1.0))


def _weighted_sides(
    columns: bool, sides: tuple[Tensor, ...]
) -> tuple[WeightedSide, WeightedSide | None]:
    return WeightedSide(*sides[::2]), WeightedSide(*sides[1::2]) if columns else None
