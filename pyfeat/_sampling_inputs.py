"""The inputs of deformable attention as kernels of GPUs take them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingInputs:
    """Levels of one launch, with their cells and points."""

    value: Tensor  # [B, S, H, D], channels contiguous
    shapes: tuple[tuple[int, ...], ...]  # L times n sizes
    num_points: tuple[int, ...]  # of every level
    locations: Tensor  # [B, Q, H, T, n] contiguous
    weights: Tensor  # [B, Q, H, T] contiguous
    border: bool
    align_corners: bool
    discrete: bool
    softmax: bool

    @property
    def ndim(self) -> int:
        return self.locations.shape[4]

    @property
    def is_empty(self) -> bool:
        """Nothing is sampled: every result is 0."""
        return 0 in (self.value.numel(), self.locations.numel())

    @property
    def accumulator(self) -> torch.dtype:
        """In which sums are taken."""
        return torch.float64 if self.value.dtype == torch.float64 else torch.float32
