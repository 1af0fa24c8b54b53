"""Scores of normal images, each without its own patches in memory, and the thresholds they make."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyfeat.anomaly.image_kinds import ImageKinds
from pyfeat.anomaly.metrics import Threshold, normal_threshold
from pyfeat.anomaly.scoring import Scoring
from pyfeat.memory import MemoryBank


@dataclass
class NormalScores:
    """What normal images score that are not in memory.

    Attributes:
        images: Score of each image.
        peaks: Highest value of each one's heat map.
    """

    images: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def add(self, score: float, heat_map: Tensor) -> None:
        """Note one image."""
        self.images.append(score)
        self.peaks.append(float(heat_map.max()))

    def scale_by_kind(self, centres: Tensor, features: Tensor) -> ImageKinds:
        """Learn the scale of each kind from the scores, and bring them to it.

        Args:
            centres: (K, D) of the kinds.
            features: (n, D) of the images, in the order of the scores.
        """
        features = features[: len(self.images)]
        scores = torch.tensor(self.images)
        scales = ImageKinds.fitted(centres, scores, features)
        self.images = scales.relative(scores, features).tolist() if self.images else []
        return scales

    def copy(self) -> "NormalScores":
        """The same scores, to add others to."""
        return NormalScores(list(self.images), list(self.peaks))

    def thresholds(self, false_alarm_rate: float) -> tuple[Threshold | None, Threshold | None]:
        """Of images, and of pixels such that normal images have none above it; None without scores.

        Both bound the share of normal images that raise a false alarm: the peak of a map is above a
        threshold where any of its pixels is.
        """
        if not self.images:
            return None, None
        image, pixel = (
            normal_threshold(scores, false_alarm_rate=false_alarm_rate)
            for scores in (self.images, self.peaks)
        )
        return image, pixel


def leave_one_out(
    scoring: Scoring,
    bank: MemoryBank,
    patches: Tensor,
    images: Tensor,
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
    kinds: Tensor | None = None,
) -> tuple[NormalScores, ImageKinds | None]:
    """Score images that a bank was made of, each against the bank without its own rows.

    A single image has no other to compare it with, and no score.

    Args:
        scoring: Definition of the scores.
        bank: Its ids begin with the number of the image.
        patches: (B, P, D) of the images to score.
        images: (B,) their numbers.
        grid: Rows and columns of the patches.
        size: Of the maps, in pixels.
        kinds: (K, D) centres, to bring the scores to the scale of their kinds; None leaves them.

    Returns:
        The scores, and the scales of the kinds.
    """
    normal = NormalScores()
    features = patches.mean(dim=1)
    for image, own in zip(images, patches, strict=True):
        others = bank.ids[:, 0] != image
        if others.any():
            rest = MemoryBank(bank.features[others])
            scores, maps = scoring.judge(own[None], rest, grid, size)
            normal.add(float(scores), maps[0])
    return normal, None if kinds is None else normal.scale_by_kind(kinds, features)
