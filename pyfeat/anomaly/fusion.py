"""One decision from the scores of several banks, fitted on normal samples alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyfeat._checks import check_choice
from pyfeat._extras import require

FusionKind = Literal["weighted", "mean", "one_class_svm"]
FUSIONS: tuple[FusionKind, ...] = get_args(FusionKind)
_MOST_PIXELS = 1_000_000  # that a one-class SVM is fitted on


@dataclass(frozen=True)
class Linear:
    """``sum of coefficients * scores + offset``."""

    coefficients: tuple[float, ...]  # (M,)
    offset: float = 0.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Fuse scores (..., M) to (...)."""
        return scores @ torch.tensor(self.coefficients, dtype=scores.dtype) + self.offset


class ScoreFusion:
    """Fuses the scores of M banks: those of images, and those of patches or pixels.

    All kinds are linear, so maps may be fused before or after they are smoothed.

    - "weighted": every score less its mean over normal samples, over its standard deviation there; then
      the weighted mean. Banks whose distances have another scale count alike.
    - "mean": the weighted mean of the scores as they are.
    - "one_class_svm": a linear one-class SVM, by stochastic gradients, on the weighted scores of normal
      samples, its product with them: large where scores are larger than they are on normal samples.

    Args:
        kind: See above.
        weights: (M,) >= 0, not all 0; None: all 1.
        seed: Of the one-class SVM.

    Raises:
        ValueError: If an argument is out of range.

    Source: the SVM: Wang et al., M3DM, CVPR 2023, arXiv:2303.00601.

    Examples:
        >>> fusion = ScoreFusion().fit(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> fusion.images(torch.tensor([[4.0, 20.0], [2.0, 40.0]]))
        tensor([0.7071, 0.7071])
    """

    def __init__(
        self,
        kind: FusionKind = "weighted",
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("ScoreFusion", "kind", kind, FUSIONS)
        if weights is not None and not (min(weights, default=0) >= 0 and 0 < sum(weights) < 1e30):
            message = f"ScoreFusion: weights must be at least 0 and not all 0, got {list(weights)}"
            raise ValueError(message)
        self.kind: FusionKind = kind
        self.weights = None if weights is None else tuple(map(float, weights))
        self.seed = seed
        self._images: Linear | None = None
        self._pixels: Linear | None = None

    def fit(self, images: Tensor, pixels: Tensor | None = None) -> "ScoreFusion":
        """Learn what scores of normal samples are like.

        Scores of samples in a bank are too low unless each was scored without its own rows. Of a single
        sample, or of none, no spread is known: scores are then fused as by "mean".

        Args:
            images: (n, M) float, finite: of normal samples.
            pixels: (p, M) float, finite: of their patches or pixels; None takes those of images.

        Raises:
            ValueError: If shapes disagree with the weights or each other, or a score is not finite.
            ImportError: If a one-class SVM is wanted and scikit-learn is not installed.
        """
        pixels = images if pixels is None else pixels
        for name, scores in (("images", images), ("pixels", pixels)):
            width = len(self.weights) if self.weights else images.shape[-1]
            if scores.ndim != 2 or scores.shape[1] != width:
                message = (
                    f"ScoreFusion.fit: {name} must have shape (n, {width}), got "
                    f"{tuple(scores.shape)}"
                )
                raise ValueError(message)
            if not scores.isfinite().all():
                message = f"ScoreFusion.fit: {name} must be finite, got NaN or infinity"
                raise ValueError(message)
        alone = len(images) < 2
        self._images, self._pixels = (self._fitted(s.double(), alone) for s in (images, pixels))
        return self

    def images(self, scores: Tensor) -> Tensor:
        """Fuse scores of images (..., M) to (...); higher is more anomalous.

        Raises:
            ValueError: If the fusion is not fitted.
        """
        return self._ready(self._images)(scores)

    def pixels(self, scores: Tensor) -> Tensor:
        """Fuse scores of patches or pixels; as ``images``."""
        return self._ready(self._pixels)(scores)

    def state(self) -> dict[str, Any]:
        """What ``from_state`` needs, for JSON."""
        parts = {"images": self._ready(self._images), "pixels": self._ready(self._pixels)}
        fitted = {name: [*part.coefficients, part.offset] for name, part in parts.items()}
        return {"kind": self.kind, "weights": self.weights, "seed": self.seed, **fitted}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ScoreFusion":
        """Make a fusion again; KeyError, TypeError or ValueError if the state is not whole."""
        fusion = cls(state["kind"], weights=state["weights"], seed=state["seed"])
        fusion._images, fusion._pixels = (
            Linear(tuple(map(float, state[name][:-1])), float(state[name][-1]))
            for name in ("images", "pixels")
        )
        return fusion

    def _ready(self, part: Linear | None) -> Linear:
        if part is None:
            message = "ScoreFusion: fusion must be fitted first, got none"
            raise ValueError(message)
        return part

    def _fitted(self, scores: Tensor, alone: bool) -> Linear:
        count = scores.shape[1]
        weights = torch.tensor(self.weights or [1.0] * count, dtype=torch.float64)
        shares = weights / weights.sum()
        if count == 1 or self.kind == "mean" or alone:
            return Linear(tuple(shares.tolist()))
        if self.kind == "one_class_svm":
            return Linear(tuple(self._svm(scores * weights).mul(weights).tolist()))
        spread = scores.std(dim=0)
        # Scores that are all equal tell nothing apart; their bank keeps its share as it is.
        spread = spread.where(spread > 0, 1.0)
        coefficients = shares / spread
        return Linear(tuple(coefficients.tolist()), -float(coefficients @ scores.mean(dim=0)))

    def _svm(self, scores: Tensor) -> Tensor:
        """(M,) coefficients; none is negative, as scores are not."""
        linear = require("sklearn.linear_model", extra="anomaly", op="ScoreFusion.fit")
        if len(scores) > _MOST_PIXELS:
            generator = torch.Generator().manual_seed(self.seed)
            scores = scores[torch.randperm(len(scores), generator=generator)[:_MOST_PIXELS]]
        machine = linear.SGDOneClassSVM(nu=0.5, random_state=self.seed, max_iter=1000)
        return torch.from_numpy(machine.fit(scores.numpy()).coef_).double()
