"""EAR on real solar cells, good ones to learn from and defective ones to find."""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.methods.ear_figures import SIDE, Images, figures_of
from benchmarks.methods.proofs import Figure
from pyfeat.anomaly.demo import elpv_split
from pyfeat.anomaly.images import ImageStream

TITLE = "EAR: excision and recovery, solar cells"
ABOUT = """
Mono-crystalline solar cells (elpv-dataset) at 64 x 64 pixels: 240 good ones are learned from, 120 held-out
good ones and 120 defective ones ranked. All else as with the textures.
"""


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    yield from figures_of(_cells(np.random.default_rng(seed), short=short), seed, short=short)


def _cells(rng: np.random.Generator, *, short: bool) -> Images:
    split = elpv_split("mono")
    good = [p for p, bad in zip(split.test, split.defective, strict=True) if not bad]
    bad = [p for p, bad in zip(split.test, split.defective, strict=True) if bad]
    parts = []
    for paths, most in ((split.train, 240), (good, 120), (bad, 120)):
        chosen = rng.permutation(len(paths))[: most // 30 if short else most]
        stream = ImageStream([paths[i] for i in chosen], op="prove_ear", size=(SIDE, SIDE))
        parts.append(torch.stack([image.pixels for image in stream]))
    return Images("solar cells", *parts)
