"""Labels, scores and maps of any kind, checked and brought to NumPy."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Values: TypeAlias = torch.Tensor | npt.ArrayLike
BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]


def labelled_scores(labels: Values, scores: Values, *, op: str) -> tuple[BoolArray, FloatArray]:
    """Check one label and one score per image; returns them as (B,) arrays."""
    truth = bool_array(labels, name="labels", op=op)
    check(truth.ndim == 1, f"{op}: labels must have shape (B,), got {truth.shape}")
    values = image_scores(scores, op=op)
    same = f"{op}: scores must have shape {truth.shape}, got {values.shape}"
    check(values.shape == truth.shape, same)
    held = sorted(set(truth.astype(int).tolist()))
    check(len(held) == 2, f"{op}: labels must hold both 0 and 1, got {held}")
    return truth, values


def image_scores(scores: Values, *, op: str) -> FloatArray:
    """Check one score per image; returns (B,) float64, or float32 if they were no wider."""
    array = real_array(scores, name="scores", op=op)
    check(array.ndim == 1, f"{op}: scores must have shape (B,), got {array.shape}")
    narrow = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    return float_array(array, np.float32 if narrow else np.float64, name="scores", op=op)


def float_array(values: Values, dtype: type[np.floating[Any]], *, name: str, op: str) -> FloatArray:
    """Check finite numbers of any shape; returns them as ``dtype``."""
    array = real_array(values, name=name, op=op)
    with np.errstate(over="ignore"):  # an overflow to inf is refused below
        array = array.astype(dtype, copy=False)
    others = array[~np.isfinite(array)]
    check(others.size == 0, f"{op}: {name} must be finite in {array.dtype}, got {others[:3]}")
    return array


def bool_array(values: Values, *, name: str, op: str) -> BoolArray:
    """Check truth values, bool or 0 and 1, of any shape."""
    array = real_array(values, name=name, op=op)
    if array.dtype == np.bool_:
        return array
    truth: BoolArray = array == 1
    others = array[~truth & (array != 0)]
    check(others.size == 0, f"{op}: {name} must hold only 0 and 1, got {others[:3]}")
    return truth


def real_array(values: Values, *, name: str, op: str) -> npt.NDArray[Any]:
    """Bring ``values`` to NumPy, whatever the device; half-precision tensors as float32."""
    if isinstance(values, torch.Tensor):
        tensor = values.detach()
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        array: npt.NDArray[Any] = tensor.cpu().numpy()
    else:
        array = np.asarray(values)
    check(array.dtype.kind in "biuf", f"{op}: {name} must hold real numbers, got {array.dtype}")
    return array


def check(holds: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless the condition holds."""
    if not holds:
        raise ValueError(message)
