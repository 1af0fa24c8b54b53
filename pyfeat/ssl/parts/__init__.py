"""Parts that objectives are made of, and that stand alone."""

from pyfeat.ssl.parts.batch_norm import BatchNorm
from pyfeat.ssl.parts.captions import (
    caption_ids,
    caption_pool,
    distinct_captions,
    draw_captions,
    split_sentences,
)
from pyfeat.ssl.parts.clusters import (
    BalancedClusters,
    BankClusters,
    Clusters,
    spherical_kmeans,
)
from pyfeat.ssl.parts.corruption import Corruption, group_corruption
from pyfeat.ssl.parts.crops import Augmentation, Views, VolumeAugmentation
from pyfeat.ssl.parts.grouping import grouped_patches, grouping_weights
from pyfeat.ssl.parts.heads import MLP, Prototypes
from pyfeat.ssl.parts.masking import Masking, block_masking, random_masking
from pyfeat.ssl.parts.optimisers import LARS
from pyfeat.ssl.parts.schedules import Schedule
from pyfeat.ssl.parts.stochastic_depth import StochasticDepth
from pyfeat.ssl.parts.teacher import Teacher

__all__ = [
    "LARS",
    "MLP",
    "Augmentation",
    "BalancedClusters",
    "BankClusters",
    "BatchNorm",
    "Clusters",
    "Corruption",
    "Masking",
    "Prototypes",
    "Schedule",
    "StochasticDepth",
    "Teacher",
    "Views",
    "VolumeAugmentation",
    "block_masking",
    "caption_ids",
    "caption_pool",
    "distinct_captions",
    "draw_captions",
    "group_corruption",
    "grouped_patches",
    "grouping_weights",
    "random_masking",
    "spherical_kmeans",
    "split_sentences",
]
