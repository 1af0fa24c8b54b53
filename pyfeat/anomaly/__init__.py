"""Anomaly scoring: learn from normal images, rank unseen ones, show where and why."""

from pyfeat.anomaly.metrics import (
    PixelMetrics,
    Threshold,
    average_precision,
    f1_optimal_threshold,
    image_auroc,
    normal_threshold,
)
from pyfeat.anomaly.patchcore import AnomalyScores, PatchCore, ScoredImage

__all__ = [
    "AnomalyScores",
    "PatchCore",
    "PixelMetrics",
    "ScoredImage",
    "Threshold",
    "average_precision",
    "f1_optimal_threshold",
    "image_auroc",
    "normal_threshold",
]
