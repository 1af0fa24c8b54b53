"""Inputs of deformable attention, what is used in its place, and comparisons with the reference."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pyfeat
from pyfeat import reference

# Levels of 1, 2 and 3 dimensions; none square, one of a single cell along an axis.
SHAPES: dict[int, list[tuple[int, ...]]] = {
    1: [(7,), (4,), (1,)],
    2: [(4, 6), (1, 3)],
    3: [(3, 2, 4), (2, 1, 3)],
}

# How far from where a sample changes cells: no rounding may carry it across.
_CLEARANCE = 0.05


class Inputs(NamedTuple):
    """Of the op, the points of all levels in one axis."""

    value: Tensor  # (B, S, H, D)
    spatial_shapes: list[tuple[int, ...]]
    sampling_locations: Tensor  # (B, Q, H, T, n)
    attention_weights: Tensor  # (B, Q, H, T)
    num_points: list[int]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.sampling_locations, self.attention_weights

    def of(self, *tensors: Tensor) -> "Inputs":
        """The same with other tensors in the order of ``tensors()``."""
        value, locations, weights = tensors
        return Inputs(value, self.spatial_shapes, locations, weights, self.num_points)

    def to(self, dtype: torch.dtype, location_dtype: torch.dtype | None = None) -> "Inputs":
        return self.of(
            self.value.to(dtype),
            self.sampling_locations.to(location_dtype or dtype),
            self.attention_weights.to(dtype),
        )


def make_inputs(
    spatial_shapes: Sequence[tuple[int, ...]],
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    dim: int = 4,
    num_points: int | Sequence[int] = 3,
    align_corners: bool = False,
    sampling: str = "linear",
) -> Inputs:
    """Random inputs in float64 that are exact in float32.

    Locations reach a cell and a half out of range, and keep clear of where samples change cells: of
    integer u, and of where "discrete" rounds.
    """
    counts = [num_points] * len(spatial_shapes) if isinstance(num_points, int) else num_points
    locations = []
    for shape, count in zip(spatial_shapes, counts, strict=True):
        sizes = torch.tensor(shape[::-1], dtype=torch.float64)  # x, y, z
        cells = (torch.rand(batch, queries, heads, count, len(shape)) * (sizes + 3)).floor() - 2
        u = cells + _CLEARANCE + (1 - 2 * _CLEARANCE) * torch.rand_like(cells)
        if sampling == "discrete":
            locations.append((u - 0.5) / sizes)
        elif align_corners:
            locations.append(u / (sizes - 1).clamp_min(1))
        else:
            locations.append((u + 0.5) / sizes.clamp_min(1))
    total = sum(math.prod(shape) for shape in spatial_shapes)
    made = Inputs(
        torch.randn(batch, total, heads, dim),
        list(spatial_shapes),
        torch.cat(locations, dim=3),
        torch.randn(batch, queries, heads, sum(counts)),
        list(counts),
    )
    return made.to(torch.float32).to(torch.float64)


# Arguments of which an axis has no entry.
EMPTY: dict[str, Callable[[], Inputs]] = {
    "no batch": lambda: make_inputs(SHAPES[2], batch=0),
    "no query": lambda: make_inputs(SHAPES[2], queries=0),
    "no head": lambda: make_inputs(SHAPES[2], heads=0),
    "no feature": lambda: make_inputs(SHAPES[2], dim=0),
    "no point": lambda: make_inputs(SHAPES[2], num_points=0),
    "no cell": lambda: make_inputs([(0, 6), (1, 0)]),
}


def by_grid_sample(inputs: Inputs, padding: str, align_corners: bool) -> Tensor:
    """The op in plain PyTorch: a level in 1 dimension becomes an image of one row."""
    value, shapes, locations, weights, counts = inputs
    batch, queries, heads, _, ndim = locations.shape
    out = value.new_zeros(batch, heads, value.shape[3], queries)
    levels = torch.split(value, [math.prod(shape) for shape in shapes], dim=1)
    for cells, shape, p, a in zip(
        levels,
        shapes,
        torch.split(locations, counts, dim=3),
        torch.split(weights, counts, dim=3),
        strict=True,
    ):
        grid = (2 * p - 1).transpose(1, 2).flatten(0, 1)  # [B H, Q, P, n]
        if ndim == 1:
            grid, shape = torch.cat([grid, torch.zeros_like(grid)], dim=-1), (1, *shape)
        image = cells.permute(0, 2, 3, 1).reshape(batch * heads, -1, *shape)
        sampled = F.grid_sample(
            image,
            grid[:, None] if ndim == 3 else grid,
            padding_mode=padding,
            align_corners=align_corners,
        ).view(batch, heads, -1, queries, p.shape[3])
        out = out + (sampled * a.transpose(1, 2)[:, :, None]).sum(dim=-1)
    return out.permute(0, 3, 1, 2).flatten(2)


def by_nearest_cell(inputs: Inputs) -> Tensor:
    """The discrete sampling of RT-DETRv2, point by point: cell ``int(p N + 1/2)``, clipped."""
    value, shapes, locations, weights, counts = inputs
    batch, queries, heads, total, _ = locations.shape
    levels = torch.split(value, [math.prod(shape) for shape in shapes], dim=1)
    level_of = [level for level, count in enumerate(counts) for _ in range(count)]
    out = value.new_zeros(batch, queries, heads, value.shape[3])
    for b, q, h, t in itertools.product(*map(range, (batch, queries, heads, total))):
        shape = shapes[level_of[t]]
        row = 0
        for size, p in zip(shape, locations[b, q, h, t].flip(0).tolist(), strict=True):
            row = row * size + min(max(int(p * size + 0.5), 0), size - 1)
        out[b, q, h] += weights[b, q, h, t] * levels[level_of[t]][b, row, h]
    return out.flatten(2)


def gradients_of(out: Tensor, leaves: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """By every leaf, 0 for one that the result does not depend on."""
    return list(
        torch.autograd.grad(out, leaves, grad_output, allow_unused=True, materialize_grads=True)
    )


class Mode(NamedTuple):
    """How the op samples and weighs."""

    padding: Literal["zeros", "border"] = "zeros"
    align_corners: bool = False
    sampling: Literal["linear", "discrete"] = "linear"
    softmax: bool = False

    def __str__(self) -> str:
        corners = "corners" if self.align_corners else "edges"
        weights = "logits" if self.softmax else "weights"
        return f"{self.sampling}-{self.padding}-{corners}-{weights}"


MODES = [
    Mode(),
    Mode(padding="zeros", align_corners=True, softmax=True),
    Mode(padding="border", softmax=True),
    Mode(padding="border", align_corners=True),
    Mode(sampling="discrete"),
    Mode(sampling="discrete", softmax=True),
]


def attend(inputs: Inputs, mode: Mode) -> Tensor:
    """By the op."""
    return pyfeat.deform_attn(*inputs[:4], num_points=inputs.num_points, **mode._asdict())


def attend_exactly(inputs: Inputs, mode: Mode) -> Tensor:
    """By the reference, in the dtypes of the inputs."""
    return reference.deform_attn(*inputs[:4], num_points=inputs.num_points, **mode._asdict())


def with_gradients(
    attention: Callable[[Inputs, Mode], Tensor], inputs: Inputs, mode: Mode, grad_output: Tensor
) -> list[Tensor]:
    """The result and its gradients by value, locations and weights."""
    leaves = [x.detach().requires_grad_() for x in inputs.tensors()]
    out = attention(inputs.of(*leaves), mode)
    return [out.detach(), *gradients_of(out, leaves, grad_output.to(out.dtype))]


def assert_as_good_as_plain_torch(inputs: Inputs, mode: Mode, grad_output: Tensor) -> None:
    """Fail unless the op's result and gradients err at most twice as much as the reference.

    Errors are those against the reference in float64, of every element, and the bound is twice the
    largest that the reference makes in the dtypes of the inputs. One rounding of the largest element
    is granted where it makes none by chance, and sixteen in float64, which is what is compared with.
    """
    wide = inputs.to(torch.float64)
    for name, mine, plain, exact in zip(
        ("result", "value", "locations", "weights"),
        with_gradients(attend, inputs, mode, grad_output),
        with_gradients(attend_exactly, inputs, mode, grad_output),
        with_gradients(attend_exactly, wide, mode, grad_output.double()),
        strict=True,
    ):
        assert mine.dtype == plain.dtype
        assert mine.shape == plain.shape
        assert_close_enough(name, mine, plain, exact)


def assert_close_enough(name: str, mine: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Fail if an element of ``mine`` errs more than twice the most that one of ``plain`` does."""
    if exact.numel() == 0:
        return
    rounding = torch.finfo(mine.dtype).eps / 2 * float(exact.abs().max())
    if mine.dtype == torch.float64:
        rounding *= 16
    budget = 2 * float((plain.double() - exact).abs().max()) + rounding
    error = float((mine.double() - exact).abs().max())
    assert error <= budget, f"{name} off by {error:.2e}, granted {budget:.2e}"
