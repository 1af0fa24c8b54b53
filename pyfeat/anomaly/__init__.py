"""Anomaly scoring: learn from normal images, rank unseen ones, show where and why."""

from typing import TYPE_CHECKING, Any

from pyfeat.anomaly.ear import EAR
from pyfeat.anomaly.lsfa import LSFA
from pyfeat.anomaly.metrics import (
    PixelMetrics,
    Threshold,
    average_precision,
    f1_optimal_threshold,
    fpr_at_tpr,
    image_auroc,
    normal_threshold,
)
from pyfeat.anomaly.models import load_model
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.anomaly.readers import read_dataset, write_dataset
from pyfeat.anomaly.regions import Region
from pyfeat.anomaly.results import AnomalyScores, NearestPatch, ScoredImage
from pyfeat.anomaly.samples import Dataset, Record, Sample
from pyfeat.anomaly.synthesis import synthesise
from pyfeat.anomaly.tables import Evaluation, evaluate

if TYPE_CHECKING:
    from pyfeat.anomaly.outliers import FeatureOutlier

__all__ = [
    "EAR",
    "LSFA",
    "AnomalyScores",
    "Dataset",
    "Evaluation",
    "FeatureOutlier",
    "NearestPatch",
    "PatchCore",
    "PixelMetrics",
    "Record",
    "Region",
    "Sample",
    "ScoredImage",
    "Threshold",
    "average_precision",
    "evaluate",
    "f1_optimal_threshold",
    "fpr_at_tpr",
    "image_auroc",
    "load_model",
    "normal_threshold",
    "read_dataset",
    "synthesise",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    """Import what derives from classes of scikit-learn on first use."""
    if name == "FeatureOutlier":
        from pyfeat.anomaly.outliers import FeatureOutlier

        return FeatureOutlier
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
