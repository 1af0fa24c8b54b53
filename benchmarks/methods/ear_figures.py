"""What EAR has to show on a set of images: hint, mask, one pass instead of many, switched skips."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods.proofs import Figure
from benchmarks.methods.riad import Riad
from pyfeat.anomaly.ear import EAR
from pyfeat.anomaly.excision import HINTS, Excision, coverage
from pyfeat.anomaly.metrics import image_auroc
from pyfeat.anomaly.reconstruction import RebuildOptions, RebuiltImage, residual_maps
from pyfeat.anomaly.saliency import EnergySaliency, MemorySaliency, Saliency
from pyfeat.features import load_backbone

SIDE, WINDOW, BLOCK = 64, 7, 8


@dataclass(frozen=True, eq=False)
class Images:
    """What is learned from and tested on, (N, 3, S, S) each; defective pixels where they are known."""

    name: str
    train: Tensor
    good: Tensor
    bad: Tensor
    defects: Tensor | None = None


class _Random(Saliency):
    """Masks of the same area and grain, anywhere."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> Tensor:
        cells = SIDE // 8
        return torch.rand(len(images), cells, cells, generator=self._generator)

    def fingerprint(self) -> str:
        return "random"


def figures_of(images: Images, seed: int, *, short: bool) -> Iterator[Figure]:
    """Train three EARs and a rival, and compare them."""
    training = RebuildOptions(steps=1 if short else 480, batch_size=4, lr=2e-3)
    # The stage of stride 8 alone: 64 pixels have too few cells on that of 16.
    backbone = load_backbone("efficientnet_lite0", layers=["_blocks.4"], dtype=torch.float32)
    models: dict[str, EAR] = {}
    for hint in HINTS:
        models[hint] = EAR(
            MemorySaliency(backbone),
            image_size=SIDE,
            excision=Excision(hint=hint, block=BLOCK),
            width=8,
            levels=3,
            window=WINDOW,
            training=training,
            seed=seed,
        ).fit(images.train)
    rival = Riad(width=8, levels=3, training=training, window=WINDOW).fit(images.train, seed)
    ear = models["mosaic"]
    auroc = {hint: _auroc(model, images) for hint, model in models.items()}
    name = images.name
    yield Figure(f"image AUROC, {name}", "mosaic", auroc["mosaic"], "zeros", auroc["empty"])
    yield Figure(f"image AUROC, {name}", "zeros", auroc["empty"], "autoencoder", auroc["none"])
    yield Figure(f"image AUROC, {name}", "mosaic", auroc["mosaic"], "autoencoder", auroc["none"])
    yield Figure(
        f"squared error of good pixels in the cut, {name}",
        "mosaic",
        _error_in_the_cut(ear, images.good),
        "zeros",
        _error_in_the_cut(models["empty"], images.good),
        better="lower",
    )
    yield from _against_rival(ear, rival, images, auroc["mosaic"], seed)
    yield from _mask_matters(ear, images, auroc["mosaic"], seed, EnergySaliency(backbone))
    if images.defects is not None:
        fine = (False, *[True] * (ear.levels - 1))
        ratio = [_ratio(ear, images, skips) for skips in (fine, None)]
        claim = f"residual of defective pixels over that of good images, {name}"
        yield Figure(claim, "finest skip off", ratio[0], "all skips on", ratio[1])


def _against_rival(
    ear: EAR, rival: Riad, images: Images, own: float, seed: int
) -> Iterator[Figure]:
    everything = torch.cat([images.good, images.bad])
    labels = np.arange(len(everything)) >= len(images.good)
    began = time.process_time()
    first = rival.scores(everything, seed)
    middle = time.process_time()
    scores = ear.score(everything).scores
    seconds = [time.process_time() - middle, middle - began]
    name = images.name
    claim = f"image AUROC within noise, {name}"
    yield Figure(claim, "EAR", own, "RIAD-like", image_auroc(labels, first), factor=0.97)
    claim = f"ms of one core an image, saliency included, {name}"
    per_image = [1000 * s / len(everything) for s in seconds]
    yield Figure(claim, "EAR", per_image[0], "RIAD-like", per_image[1], better="lower", factor=0.2)
    # A second run of the rival has other grids; that of EAR has nothing that could differ.
    again = ear.score(everything).scores, rival.scores(everything[:32], seed + 1)
    changed = [
        float((a != b).double().mean()) for a, b in zip((scores, first[:32]), again, strict=True)
    ]
    claim = f"share of scores that change in a second run, {name}"
    yield Figure(claim, "EAR", changed[0], "RIAD-like", changed[1], better="lower")


def _mask_matters(
    ear: EAR, images: Images, own: float, seed: int, energy: Saliency
) -> Iterator[Figure]:
    name, saliency, normal = images.name, ear.saliency, ear.normal
    masked = _auroc(ear, images, "masked")
    yield Figure(f"image AUROC, {name}", "judged in the cut only", masked, "judged everywhere", own)
    covers: dict[str, float] = {}
    sources = {"memory": saliency, "random": _Random(seed), "energy": energy}
    try:
        for kind, source in sources.items():
            ear.saliency = source
            if images.defects is not None:
                masks = torch.stack([each.mask for each in ear.rebuild(images.bad)])
                covers[kind] = coverage(masks, images.defects)
            if kind == "random":
                ear.learn_residuals(images.train)
                claim = f"image AUROC, {name}"
                yield Figure(claim, "mask by saliency", own, "random mask", _auroc(ear, images))
    finally:
        ear.saliency, ear.normal = saliency, normal
    for kind in ("memory", "energy"):
        if covers:
            claim = f"share of defective pixels in the cut, {name}"
            yield Figure(claim, kind, covers[kind], "random", covers["random"])


def _auroc(model: EAR, images: Images, weighting: Literal["plain", "masked"] = "plain") -> float:
    model.weighting = weighting
    scores = torch.cat([model.score(part).scores for part in (images.good, images.bad)])
    model.weighting = "plain"
    return image_auroc(np.arange(len(scores)) >= len(images.good), scores)


def _error_in_the_cut(model: EAR, images: Tensor) -> float:
    def error(image: RebuiltImage) -> Tensor:
        return (image.pixels - image.rebuilt).square().mean(dim=0)[image.mask]

    return float(torch.cat([error(image) for image in model.rebuild(images)]).mean())


def _ratio(model: EAR, images: Images, skips: Any) -> float:
    """Mean residual of the defective pixels over that of all pixels of good images."""
    model.skips = skips
    means = []
    for part in (images.bad, images.good):
        rebuilt = torch.stack([image.rebuilt for image in model.rebuild(part)])
        residual = residual_maps(part, rebuilt, "absolute")
        inside = images.defects if part is images.bad else None
        means.append(float(residual.mean() if inside is None else residual[inside].mean()))
    model.skips = None
    return means[0] / means[1]
