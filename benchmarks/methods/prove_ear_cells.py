"""EAR on solar cells: real defects, and pasted ones of which the pixels are known."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods.ear_figures import SIDE, Images, figures_of
from benchmarks.methods.proofs import Figure
from benchmarks.methods.surfaces import with_defects
from pyfeat.anomaly.demo import elpv_split
from pyfeat.anomaly.images import ImageStream

TITLE = "EAR: excision and recovery, solar cells"
ABOUT = """
Solar cells (elpv-dataset) at 64 x 64 pixels, all else as with the textures. *Real*: 240 good mono-crystalline
cells are learned from, 120 held-out good ones and 120 defective ones ranked. *Pasted*: polycrystalline cells, whose
grain is another in each; 240 good ones are learned from, 120 others ranked against 120 more that had a crack, a blob,
a scratch or a foreign patch pasted in. Residuals relative to those of good cells were introduced, and blocks of 8
pixels chosen, on seed 100: real defects 0.60 to 0.91 (zeros) and 0.35 to 0.89 (mosaics), pasted ones
0.56 to 0.88 (mosaics), after 480 steps.
"""


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    yield from figures_of(_real(np.random.default_rng(seed), short=short), seed, short=short)
    yield from figures_of(_pasted(np.random.default_rng(seed), short=short), seed, short=short)


def _real(rng: np.random.Generator, *, short: bool) -> Images:
    train, good, bad = _split("mono")
    parts = [
        _drawn(paths, most, rng, short=short)
        for paths, most in ((train, 240), (good, 120), (bad, 120))
    ]
    return Images("real", *parts)


def _pasted(rng: np.random.Generator, *, short: bool) -> Images:
    train, good, _ = _split("poly")
    held_out = _drawn(good, 240, rng, short=short)
    whole, changed = torch.chunk(held_out, 2)
    bad, defects = with_defects(changed[:, 0].numpy(), whole[:, 0].numpy(), rng)
    pixels = torch.from_numpy(bad)[:, None].expand(-1, 3, -1, -1).contiguous()
    learned = _drawn(train, 240, rng, short=short)
    return Images("pasted", learned, whole, pixels, torch.from_numpy(defects))


def _split(cells: str) -> tuple[list[Path], list[Path], list[Path]]:
    split = elpv_split(cells)
    parts: tuple[list[Path], list[Path]] = [], []
    for path, defective in zip(split.test, split.defective, strict=True):
        parts[defective].append(path)
    return split.train, *parts


def _drawn(paths: Sequence[Path], most: int, rng: np.random.Generator, *, short: bool) -> Tensor:
    """(n, 3, S, S)."""
    chosen = rng.permutation(len(paths))[: most // 30 if short else most]
    stream = ImageStream([paths[i] for i in chosen], op="prove_ear", size=(SIDE, SIDE))
    return torch.stack([image.pixels for image in stream])
