"""Losses over all pairs of two batches, in memory that grows with the batches and not with the pairs."""

from pyfeat.losses._cached import cached_step
from pyfeat.losses._distillation import DINOCenter, dino_loss, ibot_loss
from pyfeat.losses._koleo import koleo
from pyfeat.losses._modules import CLIPLoss, InfoNCELoss, NTXentLoss, SupConLoss
from pyfeat.losses._nce import clip_loss, info_nce
from pyfeat.losses._prototypes import swav_loss
from pyfeat.losses._queue import FeatureQueue
from pyfeat.losses._self import nt_xent, supcon_loss
from pyfeat.losses._sinkhorn import sinkhorn, sinkhorn_assignment

__all__ = [
    "CLIPLoss",
    "DINOCenter",
    "FeatureQueue",
    "InfoNCELoss",
    "NTXentLoss",
    "SupConLoss",
    "cached_step",
    "clip_loss",
    "dino_loss",
    "ibot_loss",
    "info_nce",
    "koleo",
    "nt_xent",
    "sinkhorn",
    "sinkhorn_assignment",
    "supcon_loss",
    "swav_loss",
]
