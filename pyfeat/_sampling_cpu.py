"""Deformable attention on the CPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import dtype_name

# Features of points; fewer take less time than to wake a thread.
_LEAST_WORK = 1 << 17


class _Call(NamedTuple):
    """The inputs as the kernels take them, in the dtype of the sums but for the values."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    dtype: torch.dtype
    discrete: bool
    arguments: dict[str, Any]  # of the compiled functions


def _call(
    value: Tensor,
    shapes: list[int],
    num_points: list[int],
    locations: Tensor,
    weights: Tensor,
    *rest: Any,
) -> _Call:
    flags, _backend = rest[:4], rest[4]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    value = _with_contiguous_end(value, 1)
    locations = _with_contiguous_end(locations.to(dtype), 2)
    weights = _with_contiguous_end(weights.to(dtype), 1)
    value_dtype = getattr(_C.Dtype, dtype_name(value.dtype))
    arguments = {
        "value": (value.data_ptr(), value_dtype, *value.stride()[:3]),
        "sizes": (*value.shape, locations.shape[1]),
        "levels": (locations.shape[-1], shapes, num_points, *flags),
        "locations": (locations.data_ptr(), *locations.stride()[:3]),
        "weights": (weights.data_ptr(), *weights.stride()[:3]),
        "num_threads": 1
        if weights.numel() * value.shape[-1] < _LEAST_WORK
        else torch.get_num_threads(),
    }
    return _Call(value, locations, weights, dtype, flags[2], arguments)


def _with_contiguous_end(tensor: Tensor, num_axes: int) -> Tensor:
    """The tensor itself if its last axes lie one element after another, else a copy."""
    stride = 1
    for axis in range(-1, -1 - num_axes, -1):
        if tensor.shape[axis] > 1 and tensor.stride(axis) != stride:
            return tensor.contiguous()
        stride *= tensor.shape[axis]
    return tensor


def _addresses(tensors: list[Tensor]) -> tuple[int, int, int]:
    """Of three; 0 where there are no elements."""
    a, b, c = (x.data_ptr() if x.numel() else 0 for x in tensors)
    return a, b, c


def _clear_unwritten(call: _Call, gradients: list[Tensor]) -> None:
    """Set to 0 what no kernel writes: by discrete locations, and by points without features."""
    if call.discrete:
        gradients[1].zero_()
    if call.value.shape[3] == 0:
        for gradient in gradients:
            gradient.zero_()


def forward(value: Tensor, *inputs: Any) -> Tensor:
    call = _call(value, *inputs)
    batch, _, heads, dim = value.shape
    output = value.new_empty((batch, inputs[2].shape[1], heads * dim), dtype=call.dtype)
    _C.deform_attn_cpu(**call.arguments, output=output.data_ptr())
    return output.to(value.dtype)


def backward(value: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *points, grad_output, need_value, need_locations, need_weights = inputs
    call = _call(value, *points)
    grad_output = grad_output.to(call.dtype).contiguous()
    wanted = zip(
        (value, points[2], points[3]), (need_value, need_locations, need_weights), strict=True
    )
    gradients = [torch.empty(x.shape if needed else (0,), dtype=call.dtype) for x, needed in wanted]
    _clear_unwritten(call, gradients)
    _C.deform_attn_backward_cpu(
        **call.arguments,
        grad_output=grad_output.data_ptr(),
        gradients=_addresses(gradients),
    )
    return tuple(
        x.to(given.dtype) for x, given in zip(gradients, (value, *points[2:4]), strict=True)
    )


def second(value: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *points, grad_output, by_value, by_locations, by_weights = inputs
    call = _call(value, *points)
    by = [x.to(call.dtype).contiguous() for x in (by_value, by_locations, by_weights)]
    upstream = grad_output.to(call.dtype).contiguous()
    given = (value, points[2], points[3], grad_output)
    gradients = [torch.empty(x.shape, dtype=call.dtype) for x in given]
    _clear_unwritten(call, gradients)
    _C.deform_attn_second_cpu(
        **call.arguments,
        grad_output=upstream.data_ptr(),
        cotangents=_addresses(by),
        gradients=(_addresses(gradients[:3]), gradients[3].data_ptr()),
    )
    return tuple(x.to(like.dtype) for x, like in zip(gradients, given, strict=True))
