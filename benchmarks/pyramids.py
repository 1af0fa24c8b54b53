"""Cases of deformable attention, and the formula of everybody without a kernel."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]
# Of value, shapes, locations and weights.
Attention = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]

PYRAMID: Shapes = ((100, 100), (50, 50), (25, 25), (13, 13))


class Case(NamedTuple):
    """One call: 8 heads of 32 features, 4 points a level."""

    shapes: Shapes
    num_queries: int  # 0: an encoder's
    heads: int = 8
    dim: int = 32
    points: int = 4
    batch: int = 1

    def __str__(self) -> str:
        levels = ", ".join("×".join(map(str, shape)) for shape in self.shapes)
        queries = self.num_queries or self.num_cells
        several = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{queries:,} queries, levels {levels}{several}"

    @property
    def num_cells(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value (B, S, H, D), locations (B, Q, H, L, P, n), weights (B, Q, H, L, P)."""
        generator = torch.Generator().manual_seed(0)
        levels, ndim = len(self.shapes), len(self.shapes[0])
        queries = self.num_queries or self.num_cells
        size = (self.batch, queries, self.heads, levels, self.points)
        value = torch.randn(self.batch, self.num_cells, self.heads, self.dim, generator=generator)
        extents = torch.tensor(self.shapes).flip(-1).view(levels, 1, ndim)
        if self.num_queries:
            locations = torch.rand(*size, ndim, generator=generator)
        else:
            offsets = 2.5 * torch.randn(*size, ndim, generator=generator) / extents
            locations = _centres(self.shapes).view(1, queries, 1, 1, 1, ndim) + offsets
        # The derivative jumps where a point passes a cell, and float32 rounds to either side.
        cells = locations * extents - 0.5
        locations = (cells.floor() + cells.frac().abs().clamp(0.01, 0.99) + 0.5) / extents
        logits = torch.randn(*size, generator=generator)
        return value, locations, logits.flatten(3).softmax(dim=-1).view(size)

    def num_bytes(self, *, backward: bool, value_bytes: int = 4) -> float:
        """Of inputs and output once, and as much for gradients; locations are float32."""
        rows = self.batch * (self.num_queries or self.num_cells) * self.heads
        points = rows * len(self.shapes) * self.points
        values = self.batch * self.num_cells * self.heads * self.dim + rows * self.dim + points
        moved = float(value_bytes * values + 4 * points * len(self.shapes[0]))
        return (2 if backward else 1) * moved


def grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As transformers does it, for any number of dimensions."""
    batch, _, heads, dim = value.shape
    queries, ndim = locations.shape[1], locations.shape[-1]
    cells = torch.split(value, [math.prod(shape) for shape in shapes], dim=1)
    grids = 2 * locations - 1
    sampled = []
    for level, shape in enumerate(shapes):
        image = cells[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, *shape)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        if ndim == 1:
            image, grid = image.unsqueeze(2), torch.cat([grid, torch.zeros_like(grid)], dim=-1)
        elif ndim == 3:
            grid = grid.unsqueeze(2)
        values = F.grid_sample(image, grid, align_corners=False)
        sampled.append(values.view(batch * heads, dim, queries, -1))
    by_head = weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)
    output = (torch.cat(sampled, dim=-1) * by_head).sum(dim=-1)
    return output.view(batch, heads * dim, queries).transpose(1, 2).contiguous()


def step_of(
    attention: Attention,
    case: Case,
    *,
    backward: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Callable[[], Sequence[Tensor]]:
    """Output, and the gradients by all inputs of its product with normal numbers."""
    value, locations, weights = (x.to(device) for x in case.inputs())
    value, weights = value.to(dtype), weights.to(dtype)
    locations = locations.to(torch.promote_types(dtype, torch.float32))
    size = (len(value), locations.shape[1], case.heads * case.dim)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def run() -> Sequence[Tensor]:
        if not backward:
            with torch.no_grad():
                return (attention(value, case.shapes, locations, weights),)
        leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
        output = attention(leaves[0], case.shapes, *leaves[1:])
        return (output.detach(), *torch.autograd.grad(output, leaves, upstream))

    return run


def _centres(shapes: Shapes) -> Tensor:
    """(S, n), x first, in [0, 1]."""
    levels = []
    for shape in shapes:
        axes = [(torch.arange(size) + 0.5) / size for size in shape]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        levels.append(grid.flip(-1).reshape(-1, len(shape)))
    return torch.cat(levels)
