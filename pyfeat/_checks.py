"""Argument checks. Every message reads ``op: argument must ..., got ...``."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyfeat import _C

# What features may be; the name of a dtype is the same in torch and in the compiled module.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_choice(op: str, name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        message = f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        raise ValueError(message)


def check_count(op: str, name: str, value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{op}: {name} must be an integer, got {value!r}"
        raise TypeError(message)
    if value < 1:
        message = f"{op}: {name} must be at least 1, got {value}"
        raise ValueError(message)


def check_features(
    op: str,
    name: str,
    features: Tensor,
    *,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless ``features`` is a (rows, D) tensor of floats, of the width and dtype given."""
    rows = {"queries": "Q", "memory": "N"}.get(name, "N")
    if not isinstance(features, Tensor):
        message = f"{op}: {name} must be a tensor or a numpy array, got {type(features).__name__}"
        raise TypeError(message)
    if features.dtype not in DTYPES or (dtype is not None and features.dtype != dtype):
        wanted = dtype_name(dtype) if dtype is not None else " or ".join(map(dtype_name, DTYPES))
        message = f"{op}: {name} must be {wanted}, got {dtype_name(features.dtype)}"
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
    """Raise if a (rows, D) tensor holds NaN or infinity, naming the first such row."""
    if features.device.type == "cpu":
        rows = with_contiguous_rows(features)
        _C.check_finite(as_matrix(rows), op, name, torch.get_num_threads())
        return
    bad = (~torch.isfinite(features).all(dim=1)).nonzero()
    if len(bad):
        message = f"{op}: {name} must be finite, got NaN or infinity in row {int(bad[0])}"
        raise ValueError(message)


def check_mask(op: str, mask: Tensor, num_queries: int, num_rows: int) -> None:
    """Raise unless ``mask`` is a bool (N,) or (Q, N) tensor."""
    if mask.dtype != torch.bool:
        message = f"{op}: mask must be bool, got {dtype_name(mask.dtype)}"
        raise TypeError(message)
    if tuple(mask.shape) not in {(num_rows,), (num_queries, num_rows)}:
        message = (
            f"{op}: mask must have shape ({num_rows},) or ({num_queries}, {num_rows}), "
            f"got {tuple(mask.shape)}"
        )
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


def as_matrix(features: Tensor) -> tuple[int, int, int, int, _C.Dtype]:
    """Address, rows, columns, row stride and dtype of a CPU tensor with a contiguous last axis."""
    dtype = getattr(_C.Dtype, dtype_name(features.dtype))
    return (
        features.data_ptr(),
        features.shape[0],
        features.shape[1],
        features.stride(0),
        dtype,
    )


def as_mask(mask: Tensor | None) -> tuple[int, int]:
    """Address and stride between queries of a mask with a contiguous last axis; 0 if there is none.

    The stride is 0 for one mask that holds for all queries.
    """
    if mask is None:
        return (0, 0)
    return (mask.data_ptr(), mask.stride(0) if mask.ndim == 2 else 0)


def with_contiguous_rows(features: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a copy."""
    if features.shape[-1] > 1 and features.stride(-1) != 1:
        return features.contiguous()
    return features


class _ReadOnlyView:
    """Lets torch look at a read-only array without a copy: torch warns because it could write."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.array = array


def distance_dtype_of(features: Tensor) -> torch.dtype:
    """Distances are float32, and float64 between float64 features."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("torch.")
