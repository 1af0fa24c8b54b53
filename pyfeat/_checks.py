"""Argument checks. Every message reads ``op: argument must ..., got ...``."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfeat import _C


def check_choice(op: str, name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        message = f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        raise ValueError(message)


def check_features(op: str, name: str, features: Tensor, *, dim: int | None = None) -> None:
    """Raise unless ``features`` is a float32 (rows, D) tensor, of width ``dim`` if that is given."""
    rows = {"queries": "Q", "memory": "N"}.get(name, "N")
    if not isinstance(features, Tensor):
        message = f"{op}: {name} must be a tensor or a numpy array, got {type(features).__name__}"
        raise TypeError(message)
    if features.dtype != torch.float32:
        message = f"{op}: {name} must be float32, got {_dtype_name(features.dtype)}"
        raise TypeError(message)
    if features.ndim != 2:
        message = f"{op}: {name} must have shape ({rows}, D), got {tuple(features.shape)}"
        raise ValueError(message)
    if dim is not None and features.shape[1] != dim:
        message = f"{op}: {name} must have shape ({rows}, {dim}), got {tuple(features.shape)}"
        raise ValueError(message)


def check_k(op: str, k: int, num_rows: int) -> None:
    """Raise unless 1 <= k <= num_rows."""
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt | np.integer):
        message = f"{op}: k must be an integer, got {k!r}"
        raise TypeError(message)
    if not 1 <= k <= num_rows:
        message = f"{op}: k must be in [1, N = {num_rows}], got {k}"
        raise ValueError(message)


def check_finite(op: str, name: str, features: Tensor) -> None:
    """Raise if a float32 (rows, D) tensor holds NaN or infinity, naming the first such row."""
    if features.device.type == "cpu":
        _C.check_finite(as_matrix(features), f"{op}: {name}", torch.get_num_threads())
        return
    bad = (~torch.isfinite(features).all(dim=1)).nonzero()
    if len(bad):
        message = f"{op}: {name} must be finite, got NaN or infinity in row {int(bad[0])}"
        raise ValueError(message)


def as_tensor(op: str, name: str, value: Any) -> Tensor:
    """A tensor over the same memory where that is possible; the result must only be read.

    Raises:
        TypeError: If ``value`` is neither a tensor nor a numpy array of numbers.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        kind = (
            f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        message = f"{op}: {name} must be a tensor or a numpy array of numbers, got {kind}"
        raise TypeError(message)
    if any(stride < 0 for stride in value.strides) or not value.dtype.isnative:
        value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    if not value.flags.writeable:
        value = np.asarray(_ReadOnlyView(value))
    return torch.from_numpy(value)


def as_matrix(features: Tensor) -> tuple[int, int, int, int]:
    """Address, rows, columns and row stride of a CPU tensor whose last axis is contiguous."""
    return (features.data_ptr(), features.shape[0], features.shape[1], features.stride(0))


def with_contiguous_rows(features: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous and rows do not run backwards, else a copy."""
    if features.shape[1] > 1 and features.stride(1) != 1:
        return features.contiguous()
    return features


class _ReadOnlyView:
    """Lets torch look at a read-only array without a copy: torch warns because it could write."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.array = array


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
