"""Banks of one class of parts, one for each modality, and the fusion of what they say."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfeat.anomaly.calibration import NormalScores
from pyfeat.anomaly.draw import Draw
from pyfeat.anomaly.fusion import ScoreFusion
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.patches import Moments
from pyfeat.anomaly.scoring import Scoring
from pyfeat.memory import MemoryBank

# Samples whose scores, each without its own rows in the banks, make fusion and threshold.
_CALIBRATION_SAMPLES = 100


class BankScores(NamedTuple):
    """What a bank says of the samples of a batch."""

    images: Tensor  # (B,) float32
    patches: Tensor  # (B, N) float32, 0 for patches without a point


@dataclass(frozen=True)
class BankOptions:
    """How banks are made; see ``LSFA``."""

    scoring: Scoring
    coreset_ratio: float
    candidates: int | None
    projection: int | None
    false_alarm_rate: float
    seed: int
    grid: tuple[int, int]  # rows and columns of the patches
    size: tuple[int, int]  # of maps, in pixels


@dataclass(eq=False)
class CategoryBanks:
    """What is known of a class.

    Attributes:
        spreads: Root mean square of adapted features less their mean, by modality: banks hold features
            over it, so that distances are in spreads.
        banks: By modality; ids are (sample, patch).
        fusion: Of the scores of the banks, in their order.
        threshold: From normal samples, each scored without its own rows; None for a single sample.
        map_threshold: Likewise, of pixels: normal samples have none above it, as it promises.
    """

    spreads: dict[str, float]
    banks: dict[str, MemoryBank]
    fusion: ScoreFusion
    threshold: Threshold | None = None
    map_threshold: Threshold | None = None

    @classmethod
    def learn(
        cls,
        read: "Callable[[], Iterator[tuple[Mapping[str, Tensor], Tensor]]]",
        fusion: ScoreFusion,
        options: BankOptions,
        *,
        progress: bool = False,
    ) -> "CategoryBanks":
        """Make banks of normal samples, and fit the fusion and the threshold.

        Args:
            read: Yields the adapted features (b, N, C) of batches of all samples by modality, and which
                patches (b, N) have a point; called twice.
            fusion: To fit.
            options: See ``BankOptions``.
            progress: Show progress bars of the coresets.
        """
        moments: dict[str, Moments] = {}
        for features, valid in read():
            for m, batch in features.items():
                moments.setdefault(m, Moments(batch.shape[2])).add(batch[valid])
        spreads = {m: found.spread() for m, found in moments.items()}
        draws = {m: Draw(options.candidates, options.seed) for m in spreads}
        kept = Draw(_CALIBRATION_SAMPLES, options.seed)
        samples = 0
        for features, valid in read():
            numbers = torch.arange(samples, samples + len(valid))
            places = torch.cartesian_prod(numbers, torch.arange(valid.shape[1]))
            for m, batch in features.items():
                scaled = batch / spreads[m]
                draws[m].add(scaled[valid], places[valid.flatten()])
            joined = torch.cat([*features.values(), valid[:, :, None].float()], dim=2)
            kept.add(joined, numbers)
            samples += len(valid)
        banks = {}
        for m, draw in draws.items():
            rows, ids = draw.result()
            banks[m] = MemoryBank(rows, ids=ids)
            banks[m].coreset(
                ratio=options.coreset_ratio,
                seed=options.seed,
                projection=options.projection,
                progress=progress,
            )
        made = cls(spreads, banks, fusion)
        made._calibrate(*kept.result(), options)
        return made

    def score(
        self, features: Mapping[str, Tensor], valid: Tensor, scoring: Scoring
    ) -> tuple[dict[str, BankScores], Tensor, Tensor]:
        """What every bank says by modality, and fused scores (B,) and patches (B, N).

        Args:
            features: (B, N, C) adapted, by modality.
            valid: (B, N) bool: which patches have a point; the others score 0 in every bank.
            scoring: Of every bank.
        """
        said = {
            m: _scores(bank, self.scaled(m, features[m]), valid, scoring)
            for m, bank in self.banks.items()
        }
        images = torch.stack([scores.images for scores in said.values()], dim=-1)
        patches = torch.stack([scores.patches for scores in said.values()], dim=-1)
        return said, self.fusion.images(images), self.fusion.pixels(patches)

    def state(self) -> dict[str, Any]:
        """All but the banks, for JSON."""
        return {
            "spreads": self.spreads,
            "fusion": self.fusion.state(),
            "threshold": vars(self.threshold) if self.threshold else None,
            "map_threshold": vars(self.map_threshold) if self.map_threshold else None,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], banks: dict[str, MemoryBank]) -> "CategoryBanks":
        """Make it again; KeyError, TypeError or ValueError if the state is not whole."""
        spreads = {m: float(state["spreads"][m]) for m in banks}
        thresholds = [
            Threshold(**state[name]) if state[name] else None
            for name in ("threshold", "map_threshold")
        ]
        return cls(spreads, banks, ScoreFusion.from_state(state["fusion"]), *thresholds)

    def scaled(self, modality: str, features: Tensor) -> Tensor:
        """Features (..., C) as the bank of a modality holds them."""
        return features / self.spreads[modality]

    def _calibrate(self, joined: Tensor, numbers: Tensor, options: BankOptions) -> None:
        """Fit fusion and thresholds on samples, each against banks without its own rows.

        Args:
            joined: (n, N, sum of C + 1): features of all modalities, and 1 where a patch has a point.
            numbers: (n,) of the samples, as in the ids of the banks.
            options: See ``BankOptions``.
        """
        widths = [bank.features.shape[1] for bank in self.banks.values()]
        images, pixels, patches = [], [], []
        for number, own in zip(numbers, joined, strict=True):
            valid = own[None, :, -1] > 0
            found = []
            for (m, bank), part in zip(
                self.banks.items(), own[:, :-1].split(widths, dim=1), strict=True
            ):
                others = bank.ids[:, 0] != number
                if others.any():
                    rest = MemoryBank(bank.features[others])
                    found.append(_scores(rest, self.scaled(m, part[None]), valid, options.scoring))
            if len(found) == len(self.banks):
                images.append(torch.cat([scores.images for scores in found]))
                patches.append(torch.cat([scores.patches for scores in found]).T)  # [N, M]
                pixels.append(patches[-1][valid[0]])
        nothing = torch.zeros(0, len(self.banks))
        alone = torch.stack(images) if images else nothing
        self.fusion.fit(alone, torch.cat(pixels) if pixels else nothing)
        normal = NormalScores()
        for image, of_patches in zip(images, patches, strict=True):
            fused = self.fusion.pixels(of_patches).view(1, *options.grid)
            heat_map = options.scoring.pixel_maps(fused, options.size)
            normal.add(float(self.fusion.images(image)), heat_map)
        self.threshold, self.map_threshold = normal.thresholds(options.false_alarm_rate)


def _scores(bank: MemoryBank, patches: Tensor, valid: Tensor, scoring: Scoring) -> BankScores:
    """Scores of patches (B, N, C); those without a point, and samples without any, score 0."""
    found = bank.search(patches[valid])
    distances = patches.new_zeros(valid.shape).masked_scatter(valid, found.distances[:, 0])
    indices = torch.zeros(valid.shape, dtype=torch.int64)
    indices = indices.masked_scatter(valid, found.indices[:, 0])
    images = scoring.image_scores(distances, indices, patches, bank)
    return BankScores(images * valid.any(dim=1), scoring.patch_scores(distances))
