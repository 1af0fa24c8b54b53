"""The coordinates in which rows are packed.

Distances do not change when a common mean is subtracted, and products lose less; the scale keeps
squares inside the range of float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLED_ROWS = 4096
_SAMPLE_BYTES = 20 << 20


@dataclass(frozen=True)
class Frame:
    """Rows are packed as ``(x - mean) scale``; for cosine, x is divided by its norm before."""

    metric: str
    mean: Tensor  # [D] float64, of evenly spaced rows
    scale: Tensor  # [] float64, a power of two
    shift: Tensor  # [] float64, the norm of the scaled mean for inner_product, else 0


def choose_frame(memory: Tensor, metric: str) -> Frame:
    """Centre and scale of at most 4,096 evenly spaced rows of ``memory`` (N, D).

    Rows that lie outside the sample may be larger than the rest by 2^53 before their bound is lost.
    Features that are not finite count as 0.
    """
    num_rows, dim = memory.shape
    count = min(num_rows, _SAMPLED_ROWS, max(1, _SAMPLE_BYTES // (8 * max(dim, 1))))
    rows = torch.arange(count, device=memory.device) * num_rows // count
    sample = memory[rows].double().nan_to_num(0.0, 0.0, 0.0)  # [count, D]
    if metric == "cosine":
        norms = sample.square().sum(1, keepdim=True).sqrt()  # [count, 1]
        sample = sample / norms.where(norms > 0, 1.0)
    mean = sample.mean(0)  # [D]
    deviation = (sample - mean).square().sum(1).amax().sqrt()
    # A sample without spread says nothing: let one unit of float32 at the mean be of size 1.
    size = torch.maximum(deviation, mean.square().sum().sqrt() * 2.0**-24)
    fraction = torch.frexp(size).mantissa
    scale = (2.0 * fraction / size.clamp(min=1e-300)).where(size > 0, 1.0)
    shift = (mean * scale).square().sum().sqrt()
    return Frame(metric, mean, scale, shift if metric == "inner_product" else shift * 0.0)
