"""Deformable attention: a weighted gather at learned, fractional positions of a pyramid."""

from pyfeat.attention._op import deform_attn

__all__ = ["deform_attn"]
