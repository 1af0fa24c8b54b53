"""Deformable attention: a weighted gather at fractional cells.

Values and upstream gradients are normal, weights a softmax. Queries of an encoder are the cells of all
levels, and their points lie around them, two cells off in each coordinate on average; those of a decoder
lie anywhere. transformers is the path of its models without a kernel, `grid_sample` for every level; the
same formula is the peer in 1-D and 3-D, where nobody else has one. A rate counts what has to be moved:
inputs and outputs once, gradients included, whatever is read again.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from benchmarks.answers import GradientCheck
from benchmarks.harness import Harness
from benchmarks.memory import in_fresh_process, peak_memory_mb
from benchmarks.timing import Contender, Work
from pyfeat import deform_attn

PACKAGES = ("transformers",)

Shapes = tuple[tuple[int, ...], ...]
# Of value, shapes, locations and weights.
Attention = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]

PYRAMID: Shapes = ((100, 100), (50, 50), (25, 25), (13, 13))


class Case(NamedTuple):
    """One call: a batch of 1, 8 heads of 32 features, 4 points a level."""

    shapes: Shapes
    num_queries: int  # 0: an encoder's
    heads: int = 8
    dim: int = 32
    points: int = 4

    def __str__(self) -> str:
        levels = ", ".join("×".join(map(str, shape)) for shape in self.shapes)
        queries = self.num_queries or self.num_cells
        return f"{queries:,} queries, levels {levels}"

    @property
    def num_cells(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value (B, S, H, D), locations (B, Q, H, L, P, n), weights (B, Q, H, L, P)."""
        generator = torch.Generator().manual_seed(0)
        levels, ndim = len(self.shapes), len(self.shapes[0])
        queries = self.num_queries or self.num_cells
        size = (1, queries, self.heads, levels, self.points)
        value = torch.randn(1, self.num_cells, self.heads, self.dim, generator=generator)
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

    def num_bytes(self, *, backward: bool) -> float:
        value, locations, weights = self.inputs()
        inputs = 4.0 * (value.numel() + locations.numel() + weights.numel())
        output = 4.0 * locations.shape[1] * self.heads * self.dim
        return (2 if backward else 1) * (inputs + output)


ENCODER, DECODER = Case(PYRAMID, 0), Case(PYRAMID, 300)
VOLUME = Case(((32, 32, 32), (16, 16, 16), (8, 8, 8)), 4_096)
SEQUENCE = Case(((4_096,), (2_048,), (1_024,), (512,)), 0)
TINY = Case(((6, 5), (3, 2)), 0)
TINY_VOLUME, TINY_SEQUENCE = Case(((4, 3, 2),), 5), Case(((9,), (4,)), 0)


@pytest.mark.sizes("case", full=[ENCODER, DECODER], quick=[TINY])
def test_forward(harness: Harness, case: Case, quick: bool) -> None:
    """2-D, forward, float32.

    `deform_attn` without gradients.
    """
    _race(harness, case, {"transformers": transformers}, backward=False, compiles=not quick)


@pytest.mark.sizes("case", full=[ENCODER, DECODER], quick=[TINY])
def test_backward(harness: Harness, case: Case, quick: bool) -> None:
    """2-D, forward and backward, float32.

    Gradients by values, locations and weights.
    """
    _race(harness, case, {"transformers": transformers}, backward=True, compiles=not quick)


@pytest.mark.sizes("case", full=[VOLUME], quick=[TINY_VOLUME])
def test_volume(harness: Harness, case: Case, quick: bool) -> None:
    """3-D, forward and backward, float32.

    Eight cells around every point.
    """
    _race(harness, case, {"grid_sample": grid_sample}, backward=True, compiles=not quick)


@pytest.mark.sizes("case", full=[SEQUENCE], quick=[TINY_SEQUENCE])
def test_sequence(harness: Harness, case: Case, quick: bool) -> None:
    """1-D, forward and backward, float32.

    `grid_sample` takes a sequence as an image of one row.
    """
    _race(harness, case, {"grid_sample": grid_sample}, backward=True, compiles=not quick)


@pytest.mark.sizes("case", full=[ENCODER], quick=[TINY])
def test_extra_memory(harness: Harness, case: Case) -> None:
    """Extra memory, forward and backward.

    Growth of the peak resident memory beyond the inputs, the output and the gradients, in a process of
    its own.
    """
    names = ("pyfeat", "transformers")
    values = {name: in_fresh_process(extra_memory_mb, name, case) for name in names}
    harness.values(case, values, unit="MB")


def extra_memory_mb(name: str, case: Case) -> float:
    """Beyond what is returned; for a fresh process."""
    attention = {"pyfeat": ours, "transformers": transformers}[name]
    _step(attention, TINY, backward=True)()  # loads libraries and starts threads
    step = _step(attention, case, backward=True)
    kept: list[object] = []
    peak = peak_memory_mb(lambda: kept.append(step()))
    returned = sum(x.numel() * x.element_size() for x in kept[0])  # type: ignore[attr-defined]
    return peak - returned / 2**20


def ours(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    return deform_attn(value, shapes, locations, weights)


def transformers(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    starts = torch.zeros(len(shapes), dtype=torch.int64)
    output: Tensor = MultiScaleDeformableAttention()(
        value, torch.tensor(shapes), list(shapes), starts, locations, weights, 64
    )
    return output


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


def _centres(shapes: Shapes) -> Tensor:
    """(S, n), x first, in [0, 1]."""
    levels = []
    for shape in shapes:
        axes = [(torch.arange(size) + 0.5) / size for size in shape]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        levels.append(grid.flip(-1).reshape(-1, len(shape)))
    return torch.cat(levels)


def _step(
    attention: Attention, case: Case, *, backward: bool, dtype: torch.dtype = torch.float32
) -> Callable[[], Sequence[Tensor]]:
    """Output, and the gradients by all inputs of its product with normal numbers."""
    value, locations, weights = (x.to(dtype) for x in case.inputs())
    size = (1, locations.shape[1], case.heads * case.dim)
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run() -> Sequence[Tensor]:
        if not backward:
            with torch.no_grad():
                return (attention(value, case.shapes, locations, weights),)
        leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
        output = attention(leaves[0], case.shapes, *leaves[1:])
        return (output.detach(), *torch.autograd.grad(output, leaves, upstream))

    return run


def _race(
    harness: Harness,
    case: Case,
    peers: dict[str, Attention],
    *,
    backward: bool,
    compiles: bool,
) -> None:
    """Against a peer, which is compiled as well if so wanted."""
    attentions: dict[str, Attention] = {"pyfeat": ours, **peers}
    if compiles:
        attentions |= {f"{name}, compiled": torch.compile(peer) for name, peer in peers.items()}
    work = Work(case.num_bytes(backward=backward), "read")
    contenders = [
        Contender(name, _step(attention, case, backward=backward), name == "pyfeat", work)
        for name, attention in attentions.items()
    ]
    exact = _step(grid_sample, case, backward=backward, dtype=torch.float64)
    harness.race(case, contenders, check=GradientCheck(exact))
