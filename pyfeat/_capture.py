"""While work for a GPU is captured as a CUDA graph, no number can be read from it.

What is checked is then checked where it lies: values that would be refused become NaN, and so does what
is made of them, in every replay.
"""

import math

import torch
from torch import Tensor


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is captured in a graph of CUDA."""
    return not torch.compiler.is_compiling() and _is_captured(tensor)


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def zero_if(fine: Tensor, values: Tensor) -> Tensor:
    """() of the dtype of the values: 0, NaN unless ``fine`` () bool."""
    return values.new_zeros(()).masked_fill(~fine, math.nan)
