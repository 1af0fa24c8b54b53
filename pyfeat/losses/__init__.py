"""Losses over all pairs of two batches, in memory that grows with the batches and not with the pairs."""

from pyfeat.losses._nce import clip_loss, info_nce
from pyfeat.losses._self import nt_xent, supcon_loss

__all__ = ["clip_loss", "info_nce", "nt_xent", "supcon_loss"]
