"""What each op means, in plain PyTorch and float64. Slow on purpose: nothing here is clever."""

from pyfeat.reference._attention import deform_attn
from pyfeat.reference._losses import (
    Teacher,
    dino_losses,
    koleo,
    prediction_losses,
    sinkhorn,
    swav_losses,
)
from pyfeat.reference._neighbours import (
    greedy_coreset,
    knn,
    match,
    pairwise_distances,
    range_search,
)
from pyfeat.reference._pairs import log_sum_exp, pair_softplus, pair_sums

__all__ = [
    "Teacher",
    "deform_attn",
    "dino_losses",
    "greedy_coreset",
    "knn",
    "koleo",
    "log_sum_exp",
    "match",
    "pair_softplus",
    "pair_sums",
    "pairwise_distances",
    "prediction_losses",
    "range_search",
    "sinkhorn",
    "swav_losses",
]
