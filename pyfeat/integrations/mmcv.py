"""The function of mmcv, with its signature."""

import itertools
import math

from torch import Tensor

from pyfeat.attention import deform_attn

_OP = "multi_scale_deformable_attn"


def multi_scale_deformable_attn(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Stand in for ``mmcv.ops.MultiScaleDeformableAttnFunction.apply`` on any device.

    Args:
        value: (B, S, H, D).
        value_spatial_shapes: (L, 2) integers: height, width. On a GPU they are read once, which waits
            for it.
        value_level_start_index: (L,) integers: the first row of every level, as the shapes say.
        sampling_locations: (B, Q, H, L, P, 2), last axis x, y, in [0, 1]; of 16 bits too, though those
            are as coarse as half a cell.
        attention_weights: (B, Q, H, L, P).
        im2col_step: Without effect: batches of any size are computed at once.

    Returns:
        (B, Q, H * D), in the dtype of ``value``.

    Raises:
        ValueError: If the first rows are not those of the shapes; whatever else ``deform_attn`` says.

    Precision and memory: as ``deform_attn``.
    Source: Zhu et al., Deformable DETR: deformable transformers for end-to-end object detection, ICLR
    2021, arXiv:2010.04159.

    Examples:
        >>> import torch
        >>> shapes, starts = torch.tensor([[1, 2], [1, 1]]), torch.tensor([0, 2])
        >>> value = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
        >>> locations, weights = torch.full((1, 1, 1, 2, 1, 2), 0.5), torch.ones(1, 1, 1, 2, 1)
        >>> multi_scale_deformable_attn(value, shapes, starts, locations, weights)
        tensor([[[5.5000]]])
    """
    shapes = [tuple(shape) for shape in value_spatial_shapes.tolist()]
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)][:-1]
    given = value_level_start_index.tolist()
    if given != starts:
        message = (
            f"{_OP}: value_level_start_index must be {starts} for shapes {shapes}, got {given}"
        )
        raise ValueError(message)
    return deform_attn(value, shapes, sampling_locations, attention_weights)
