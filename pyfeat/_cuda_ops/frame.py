"""How tensors cross into ``pyfeat._cuda``: addresses and strides, device and stream."""

import torch
from torch import Tensor

from pyfeat import _cuda
from pyfeat._checks import dtype_name

# Device index, address of the stream.
Queue = tuple[int, int]


def queue_of(tensor: Tensor) -> Queue:
    """The device of ``tensor``, and torch's current stream there."""
    index = tensor.get_device()
    return index, torch._C._cuda_getCurrentRawStream(index)


def address_of(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None. Every address that a kernel is given comes from here."""
    return 0 if tensor is None else tensor.data_ptr()


def as_matrix(tensor: Tensor) -> tuple[int, int, int, int, _cuda.Dtype]:
    """A matrix with contiguous rows, as the kernels take it."""
    rows, columns = tensor.shape
    dtype = getattr(_cuda.Dtype, dtype_name(tensor.dtype))
    return address_of(tensor), rows, columns, tensor.stride(0), dtype
