"""Deformable attention: a weighted gather at learned, fractional positions of a pyramid."""

from pyfeat.attention._dense import DeformableAttention1D
from pyfeat.attention._encoder import DeformableEncoderLayer, grid_points
from pyfeat.attention._multi_scale import MultiScaleDeformAttn
from pyfeat.attention._op import deform_attn

__all__ = [
    "DeformableAttention1D",
    "DeformableEncoderLayer",
    "MultiScaleDeformAttn",
    "deform_attn",
    "grid_points",
]
