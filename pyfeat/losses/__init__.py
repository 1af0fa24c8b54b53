"""Losses over all pairs of two batches, in memory that grows with the batches and not with the pairs.

Beside that, the forward pass keeps as much of the similarities for the backward pass as
``set_memory_budget`` lets it, 1 GiB to begin with.
"""

from pyfeat._contrast import memory_budget, set_memory_budget
from pyfeat.losses._assignment import Assignment
from pyfeat.losses._cached import cached_step
from pyfeat.losses._distillation import DINOCenter, dino_loss, ibot_loss
from pyfeat.losses._koleo import koleo
from pyfeat.losses._metrics import ContrastMetrics
from pyfeat.losses._modules import CLIPLoss, InfoNCELoss, NTXentLoss, SigLIPLoss, SupConLoss
from pyfeat.losses._nce import clip_loss, info_nce
from pyfeat.losses._prototypes import swav_loss
from pyfeat.losses._queue import FeatureQueue
from pyfeat.losses._self import nt_xent, supcon_loss
from pyfeat.losses._sigmoid import siglip_loss
from pyfeat.losses._sinkhorn import sinkhorn, sinkhorn_assignment

__all__ = [
    "Assignment",
    "CLIPLoss",
    "ContrastMetrics",
    "DINOCenter",
    "FeatureQueue",
    "InfoNCELoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "cached_step",
    "clip_loss",
    "dino_loss",
    "ibot_loss",
    "info_nce",
    "koleo",
    "memory_budget",
    "nt_xent",
    "set_memory_budget",
    "siglip_loss",
    "sinkhorn",
    "sinkhorn_assignment",
    "supcon_loss",
    "swav_loss",
]
