"""Arguments of the losses over all pairs, checked."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyfeat._capture import is_capturing, zero_if
from pyfeat._checks import check_features, check_finite, dtype_name
from pyfeat.losses._traced import confirmed, opaque, zero

_LEAST, _MOST = 1e-30, 1e30


def checked_features(op: str, *named: tuple[str, Tensor], normalize: bool) -> list[Tensor]:
    """Checked, and of unit length if so wanted."""
    first = named[0][1]
    checked = []
    for name, features in named:
        check_features(op, name, features)
        check_features(op, name, features, dim=first.shape[1], dtype=first.dtype)
        if features.device != first.device:
            message = (
                f"{op}: {name} must be on {first.device} like {named[0][0]}, got {features.device}"
            )
            raise ValueError(message)
        checked.append(confirmed(features, _check_all_finite(features.detach(), op, name)))
    # The CPU multiplies float16 in float32. As float32 from here on, what adds up to a gradient by the
    # features may be larger than the gradient and float16 can be.
    widened = first.dtype == torch.float16 and first.device.type == "cpu"
    checked = [features.float() if widened else features for features in checked]
    if not normalize:
        return checked
    return [_normalized(features).to(features.dtype) for features in checked]


@opaque(zero)
def _check_all_finite(features: Tensor, op: str, name: str) -> Tensor:
    if is_capturing(features):
        return zero_if(features.isfinite().all(), features)
    check_finite(op, name, features)
    return zero(features)


def _normalized(x: Tensor) -> Tensor:
    # In float32 at least; norms in float64, as squares may overflow and vanish.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)  # [N, 1]
    # Zero vectors stay zero and get no gradient.
    normalized: Tensor = x / norm.where(norm > 0, math.inf).to(x.dtype)
    return normalized


def positive_number(op: str, name: str, value: float | Tensor, features: Tensor) -> Tensor:
    """As a tensor (), with its gradient."""
    return _checked_number(op, name, value, features, positive=True)


def finite_number(op: str, name: str, value: float | Tensor, features: Tensor) -> Tensor:
    """As a tensor (), with its gradient; at most 1e30 in magnitude."""
    return _checked_number(op, name, value, features, positive=False)


def _checked_number(
    op: str, name: str, value: float | Tensor, features: Tensor, *, positive: bool
) -> Tensor:
    if not isinstance(value, Tensor):
        number = real_number(op, name, value)
        _check_range(op, name, number, positive)
        # Filled where it lies: a copy from here to a GPU would be waited for.
        return torch.full((), number, dtype=torch.float64, device=features.device)
    if value.numel() != 1 or not value.is_floating_point():
        message = (
            f"{op}: {name} must be a number, got {dtype_name(value.dtype)} of {tuple(value.shape)}"
        )
        raise ValueError(message)
    tensor = value.reshape(()).to(features.device)
    return confirmed(tensor, _check_scalar(tensor.detach(), op, name, positive))


@opaque(zero)
def _check_scalar(value: Tensor, op: str, name: str, positive: bool) -> Tensor:
    if is_capturing(value):
        least = _LEAST if positive else -_MOST
        return zero_if((value >= least) & (value <= _MOST), value)
    _check_range(op, name, float(value), positive)
    return zero(value)


def _check_range(op: str, name: str, number: float, positive: bool) -> None:
    if positive and not 0.0 < number < math.inf:
        message = f"{op}: {name} must be positive and finite, got {number}"
        raise ValueError(message)
    # Neither it nor its inverse overflows with the products of features, which are float32.
    if positive and not _LEAST <= number <= _MOST:
        message = f"{op}: {name} must be in [{_LEAST}, {_MOST}], got {number}"
        raise ValueError(message)
    if not abs(number) <= _MOST:
        message = f"{op}: {name} must be finite and in [-1e30, 1e30], got {number}"
        raise ValueError(message)


def real_number(op: str, name: str, value: object) -> float:
    """As a float of Python."""
    if not isinstance(value, numbers.Real):
        message = f"{op}: {name} must be a number, got {type(value).__name__}"
        raise TypeError(message)
    return float(value)


def checked_bias(
    op: str, name: str, log_probabilities: Tensor | None, features: Tensor
) -> Tensor | None:
    """Minus the logarithms, one for every row of the features, float32 without a gradient."""
    if log_probabilities is None:
        return None
    check_shape(op, name, log_probabilities, (len(features),), features)
    bias = -log_probabilities.detach().float()
    return confirmed(bias, _check_bias(bias, op, name))


@opaque(zero)
def _check_bias(bias: Tensor, op: str, name: str) -> Tensor:
    if is_capturing(bias):
        return zero_if(bias.isfinite().all(), bias)
    worst = bias.abs().max() if len(bias) else bias.new_zeros(())
    if not worst < math.inf:
        message = f"{op}: {name} must be finite, got {-bias[bias.abs().argmax()]}"
        raise ValueError(message)
    return zero(bias)


def check_shape(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor
) -> None:
    """Raise unless a tensor has this shape and is beside the features."""
    if tuple(tensor.shape) != shape:
        message = f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}"
        raise ValueError(message)
    if tensor.device != features.device:
        message = f"{op}: {name} must be on {features.device}, got {tensor.device}"
        raise ValueError(message)


def check_same_length(op: str, names: tuple[str, str], a: Tensor, b: Tensor) -> None:
    """Raise unless b has as many rows as a."""
    if len(a) != len(b):
        message = f"{op}: {names[1]} must have as many rows as {names[0]}, {len(a)}, got {len(b)}"
        raise ValueError(message)


def check_without(op: str, kind: str, values: Mapping[str, Any]) -> None:
    """Raise if one of the values, which do not go with such a loss, is given."""
    for name, value in values.items():
        if value is not None:
            message = f"{op}: {name} must be None for {kind}, got a {type(value).__name__.lower()}"
            raise ValueError(message)
