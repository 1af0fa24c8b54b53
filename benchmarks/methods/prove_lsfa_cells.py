"""Compactness alone on real solar cells, where there is one modality."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.methods.lsfa_parts import Kept, adaptation
from benchmarks.methods.proofs import Figure
from pyfeat.anomaly import LSFA, Sample, image_auroc
from pyfeat.anomaly.demo import elpv_split
from pyfeat.anomaly.extractors import BackbonePatches
from pyfeat.anomaly.images import ImageStream

TITLE = "LSFA: compactness alone, solar cells"
ABOUT = """
Mono-crystalline solar cells (elpv-dataset) at 128 x 128 pixels: 120 good ones, drawn by the seed, are learned
from, all 177 held-out good ones and 200 defective ones ranked. Features of an ImageNet network (stride 8 and 16),
frozen (PatchCore on them) or adapted by compactness alone, with the same bank and scores. "At least" allows
0.99999 of the baseline.
"""


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    size = 64 if short else 128
    train, test = _cells(np.random.default_rng(seed), size, short=short)
    extractor = Kept(BackbonePatches(dtype=torch.float32))
    labels = [bool(sample.defective) for sample in test]
    compact = adaptation(align=False, compact=True, short=short)
    found = {}
    for name, options in (("frozen", None), ("compactness", compact)):
        model = LSFA(extractor, None, adaptation=options, image_size=size, seed=seed).fit(train)
        found[name] = image_auroc(labels, model.score(test).scores)
    yield Figure(
        "image AUROC",
        "compactness alone (at least)",
        found["compactness"],
        "frozen",
        found["frozen"],
        factor=0.99999,
    )


def _cells(
    rng: np.random.Generator, size: int, *, short: bool
) -> tuple[list[Sample], list[Sample]]:
    split = elpv_split("mono")
    good = [p for p, bad in zip(split.test, split.defective, strict=True) if not bad]
    bad = [p for p, bad in zip(split.test, split.defective, strict=True) if bad]
    counts = (4, 3, 3) if short else (120, 177, 200)
    train, *test = (
        _load([paths[i] for i in rng.permutation(len(paths))[:count]], size, defective=paths is bad)
        for paths, count in zip((split.train, good, bad), counts, strict=True)
    )
    return train, [sample for part in test for sample in part]


def _load(paths: list[Path], size: int, *, defective: bool) -> list[Sample]:
    kind = "defect" if defective else "good"
    stream = ImageStream(paths, op="prove_lsfa_cells", size=(size, size), strict=True)
    return [Sample(image.name, "mono", "test", kind, defective, image.pixels) for image in stream]
