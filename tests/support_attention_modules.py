"""The attention of ``MultiScaleDeformAttn``, point by point, and what its tests share."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfeat import reference
from pyfeat.attention import MultiScaleDeformAttn

# Sums of float64 in another order differ by a few units in the last place of numbers near 1.
SAME = 1e-12
PYRAMIDS: dict[int, list[tuple[int, ...]]] = {
    1: [(9,), (4,)],
    2: [(4, 6), (2, 3)],
    3: [(3, 4, 2), (1, 2, 2)],
}


def num_cells(shapes: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def randomized(module: nn.Module) -> nn.Module:
    """In float64, with no parameter at an initial value that hides a mistake."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def expected_attention(
    module: MultiScaleDeformAttn,
    query: Tensor,
    reference_points: Tensor,
    value: Tensor,
    shapes: Sequence[Sequence[int]],
    padding_mask: Tensor | None = None,
    valid_ratios: Tensor | None = None,
) -> Tensor:
    """The same, point by point."""
    n, heads, counts = module.ndim, module.num_heads, module.num_points
    batch, queries, _ = query.shape
    value = nn.functional.linear(value, module.value_proj.weight, module.value_proj.bias)
    if padding_mask is not None:
        value = value.where(~padding_mask[..., None], 0.0)
    offsets = module.sampling_offsets(query).view(batch, queries, heads, sum(counts), n)
    logits = module.attention_weights(query).view(batch, queries, heads, sum(counts))
    locations = torch.empty_like(offsets)
    ratios = torch.ones(batch, len(shapes), n) if valid_ratios is None else valid_ratios
    for b, q, h in itertools.product(range(batch), range(queries), range(heads)):
        point = 0
        for level, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
            origin = reference_points[b, q] if reference_points.ndim == 3 else None
            origin = reference_points[b, q, level] if origin is None else origin
            for _ in range(count):
                for axis in range(n):  # x first: the last of the shape
                    cells = shape[n - 1 - axis]
                    ratio = ratios[b, level, axis]
                    offset = offsets[b, q, h, point, axis]
                    step = value.new_tensor(1 / (cells - 1) if module.align_corners else 1 / cells)
                    if len(origin) > n:
                        step = origin[n + axis] * ratio / count * module.offset_scale
                    locations[b, q, h, point, axis] = origin[axis] * ratio + offset * step
                point += 1
    output = reference.deform_attn(
        value.view(batch, -1, heads, module.embed_dim // heads),
        shapes,
        locations,
        logits.softmax(-1),
        num_points=counts,
        padding=module.padding,
        align_corners=module.align_corners,
        sampling=module.sampling,
    )
    return nn.functional.linear(output, module.output_proj.weight, module.output_proj.bias)
