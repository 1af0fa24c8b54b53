"""Features whose packing loses as much as it can, always to the same side."""

import torch
from torch import Tensor

_MIDPOINT = 1 + 2.0**-8  # between two neighbouring bfloat16 numbers
_STEP = 2.0**-7


def rows_with_largest_errors() -> tuple[Tensor, Tensor]:
    """Row 1 is nearer, but all errors of row 0 favour it, and those of row 1 are against it."""
    up = torch.full((64,), _MIDPOINT + 2.0**-16)
    up[32:] += 2 * _STEP
    up[-1] -= _STEP
    down = torch.full((64,), _MIDPOINT + _STEP - 2.0**-16)
    return torch.ones(1, 64), torch.stack([up, down, -up, -down])


def query_with_largest_errors() -> tuple[Tensor, Tensor]:
    """Row 1 is nearer, but all errors of the query favour row 0."""
    query = torch.full((1, 64), _MIDPOINT - 2.0**-16)
    query[:, 32:] += 2 * 2.0**-16
    query[:, 0] += _STEP
    row = torch.ones(64)
    row[32:] = -1
    return query, torch.stack([-row, row])
