"""Feature matching that is exact, fast and installs everywhere.

An import goes down this picture, never up::

    pipelines   pyfeat.anomaly (fit, score, report)     pyfeat command line
    objects     MemoryBank    PatchCore    MultiScaleDeformAttn
    ops         knn    greedy_coreset    match    losses (info_nce, clip, siglip, ...)    deform_attn
    engines     similarity: tiles of A B^T, used and dropped       sampling: n-D multilinear gather
    backends    cpu (C++: scalar, AVX2, AVX-512, AMX, NEON)   cuda (C++)   triton   reference (plain PyTorch)
"""

from pyfeat import losses
from pyfeat._C import __version__
from pyfeat._info import info
from pyfeat.attention import MultiScaleDeformAttn, deform_attn
from pyfeat.bank_distance import bank_min_distance
from pyfeat.coreset import Coreset, greedy_coreset
from pyfeat.matching import Matches, match
from pyfeat.memory import MemoryBank
from pyfeat.search import Neighbours, RangeNeighbours, knn, range_search

__all__ = [
    "Coreset",
    "Matches",
    "MemoryBank",
    "MultiScaleDeformAttn",
    "Neighbours",
    "RangeNeighbours",
    "__version__",
    "bank_min_distance",
    "deform_attn",
    "greedy_coreset",
    "info",
    "knn",
    "losses",
    "match",
    "range_search",
]
