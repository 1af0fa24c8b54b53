"""LSFA on generated plates in colour and height, of which the defects are known."""

from collections.abc import Iterator

import torch

from benchmarks.methods.lsfa_parts import Kept, adaptation, nearest_distances
from benchmarks.methods.proofs import Figure
from pyfeat.anomaly import LSFA, AnomalyScores, PixelMetrics, Sample, image_auroc, synthesise
from pyfeat.anomaly.extractors import BackbonePatches, NormalPatches
from pyfeat.anomaly.scoring import SCORINGS

TITLE = "LSFA: colours and points, plates"
ABOUT = """
Rendered plates of 128 x 128 pixels (`synthesise`, severity 0.8): 60 good ones are learned from, 240 good and
240 defective ones (dents, which only points show; stains, which only colours show; scratches) ranked.
Features of an ImageNet network (stride 8 and 16), of colours and of surface normals drawn as colours, the
same for all models, with the same banks, scores and fusion. Banks keep all patches: the draw of a coreset
decides more than the losses do. "Frozen" is PatchCore on both modalities; alignment and compactness are the
two losses of LSFA, at their defaults but for heads of 128 features; what is our choice in these was
settled on other seeds (100 to 102). "At least" allows 0.99999 of the baseline. Distances are to the nearest
patch of the bank in spreads of the features, over those of the frozen features.
"""

_AT_LEAST = 0.99999
_SHOWN = {"rgb": ("stain", "scratch"), "xyz": ("dent", "scratch")}
_WAYS = {
    "alignment alone": (True, False),
    "compactness alone": (False, True),
    "both losses": (True, True),
}


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    counts = (4, 3, 3) if short else (60, 240, 240)
    size = 64 if short else 128
    plates = synthesise(
        train=counts[0], good=counts[1], defective=counts[2], seed=seed, size=size, severity=0.8
    )
    train = [record.load() for record in plates.select(split="train")]
    test = [record.load() for record in plates.select(split="test")]
    extractors = (
        Kept(BackbonePatches(dtype=torch.float32)),
        Kept(NormalPatches(dtype=torch.float32)),
    )

    def fitted(align: bool, compact: bool) -> LSFA:
        options = adaptation(align=align, compact=compact, short=short)
        chosen = options if align or compact else None
        model = LSFA(*extractors, adaptation=chosen, image_size=size, coreset_ratio=1.0, seed=seed)
        return model.fit(train)

    frozen = fitted(False, False)
    models = {name: fitted(*way) for name, way in _WAYS.items()}
    scores = {name: model.score(test) for name, model in {"frozen": frozen, **models}.items()}
    auroc = {name: _image_auroc(found.scores, test) for name, found in scores.items()}
    both = "both losses"
    claim = "image AUROC"
    yield Figure(claim, both, auroc[both], "frozen", auroc["frozen"])
    for name in ("alignment alone", "compactness alone"):
        yield Figure(
            claim, f"{name} (at least)", auroc[name], "frozen", auroc["frozen"], factor=_AT_LEAST
        )
        yield Figure(claim, both, auroc[both], name, auroc[name])
    for modality, name in (("rgb", "colours alone"), ("xyz", "points alone")):
        alone = _image_auroc(_scores_of(models[both], modality, test), test)
        yield Figure(claim, f"{both}, fused", auroc[both], name, alone)
    pixels, baseline = (_pixel_metrics(scores[name], test) for name in (both, "frozen"))
    yield Figure("pixel AUROC", both, pixels[0], "frozen", baseline[0])
    yield Figure("AUPRO", both, pixels[1], "frozen", baseline[1])
    yield from _shrinking(models[both], frozen, test)


def _image_auroc(scores: torch.Tensor, test: list[Sample]) -> float:
    return image_auroc([bool(sample.defective) for sample in test], scores)


def _scores_of(model: LSFA, modality: str, test: list[Sample]) -> torch.Tensor:
    """(n,) image scores of one bank of a model."""
    found = []
    for sample, features, valid in model.adapted(test):
        banks = model.banks[sample.category]
        bank = banks.banks[modality]
        rows = features[modality][valid]
        near = bank.search(rows)
        scoring = SCORINGS[model.scoring]
        found.append(scoring.image_scores(near.distances.T, near.indices.T, rows[None], bank))
    return torch.cat(found)


def _pixel_metrics(found: AnomalyScores, test: list[Sample]) -> tuple[float, float]:
    metrics = PixelMetrics()
    for heat_map, sample in zip(found.maps, test, strict=True):
        if sample.mask is not None:
            metrics.update(heat_map, sample.mask)
    auroc, aupro = metrics.compute()
    return auroc, aupro


def _shrinking(adapted: LSFA, frozen: LSFA, test: list[Sample]) -> Iterator[Figure]:
    """Of what is left of distances, held-out good patches ought to have less than defects."""
    after, before = (nearest_distances(model, test) for model in (adapted, frozen))
    for modality, kinds in _SHOWN.items():
        left = {}
        for name, of in (("good patches", ("good",)), ("defects", kinds)):
            new, old = (
                torch.cat([part[modality, kind] for kind in of if (modality, kind) in part]).mean()
                for part in (after, before)
            )
            left[name] = float(new / old)
        yield Figure(
            f"distance left, {modality}",
            "good patches",
            left["good patches"],
            "defects",
            left["defects"],
            better="lower",
        )
