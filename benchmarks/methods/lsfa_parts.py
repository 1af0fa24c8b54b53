"""What the proofs of LSFA share: features that are extracted once, and the distances that they shrink."""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat.anomaly import LSFA, Sample
from pyfeat.anomaly.adaptors import Adaptation
from pyfeat.anomaly.extractors import PatchExtractor, as_patches
from pyfeat.anomaly.patches import Patches


class Kept:
    """An extractor that describes every sample once; features are the same for all models."""

    def __init__(self, extractor: PatchExtractor) -> None:
        self.name, self._extractor = extractor.name, extractor
        self._known: dict[bytes, Patches] = {}

    def __call__(self, values: Tensor) -> Patches:
        found = []
        for value in values:
            key = hashlib.blake2b(value.numpy().tobytes(), digest_size=16).digest()
            if key not in self._known:
                self._known[key] = as_patches("Kept", self._extractor, value[None])
            found.append(self._known[key])
        return Patches(torch.cat([patches.features for patches in found]), found[0].grid)

    def fingerprint(self) -> str:
        return self._extractor.fingerprint()


def adaptation(*, align: bool, compact: bool, short: bool) -> Adaptation:
    """The defaults with a smaller head, and one or both of the losses."""
    return Adaptation(
        epochs=2 if short else Adaptation.epochs,
        projection=128,
        local_alignment=Adaptation.local_alignment if align else 0.0,
        global_alignment=Adaptation.global_alignment if align else 0.0,
        compactness=Adaptation.compactness if compact else 0.0,
    )


def nearest_distances(model: LSFA, samples: list[Sample]) -> dict[tuple[str, str], Tensor]:
    """Distances of patches to their banks, by modality and kind: of good samples all, else those hit."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for sample, features, valid in model.adapted(samples):
        mask = torch.zeros(sample.rgb.shape[1:]) if sample.mask is None else sample.mask.float()
        hit = functional.adaptive_max_pool2d(mask[None, None], model.grid).flatten() > 0
        for modality, rows in features.items():
            bank = model.banks[sample.category].banks[modality]
            distances = bank.search(rows[valid]).distances[:, 0]
            kept = distances[hit[valid]] if sample.defective else distances
            found.setdefault((modality, sample.kind), []).append(kept)
    return {key: torch.cat(parts) for key, parts in found.items()}
