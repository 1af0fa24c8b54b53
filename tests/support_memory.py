"""Memory banks of the tests."""

import torch
from torch import Tensor

from pyfeat.memory import MemoryBank


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def places(num_images: int, height: int = 2, width: int = 3) -> Tensor:
    """(image, y, x) of every cell."""
    return torch.cartesian_prod(*map(torch.arange, (num_images, height, width)))


def assert_same(actual: MemoryBank, expected: MemoryBank) -> None:
    assert actual.features.dtype == expected.features.dtype
    assert torch.equal(actual.features, expected.features)
    assert torch.equal(actual.ids, expected.ids)
    assert actual.metric == expected.metric
    assert actual.radius == expected.radius
