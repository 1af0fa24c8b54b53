"""EAR on generated textures with pasted defects, of which the pixels are known."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.methods.ear_figures import SIDE, Images, figures_of
from benchmarks.methods.proofs import Figure
from benchmarks.methods.surfaces import TEXTURES, crops, with_defects

TITLE = "EAR: excision and recovery, textures"
ABOUT = """
Three generated textures of 64 x 64 pixels (bricks, blades, stones) with pasted cracks, blobs, scratches and
foreign patches. One U-Net, one number of steps and one loss for all: shown a mosaic in the cut (EAR), zeros there, or the
whole image (a plain autoencoder); and the RIAD-like rival, three random disjoint grids of four sizes of
cells, twelve passes an image. The cut is 30 % of the image, where patches of an ImageNet network are far
from a memory of normal ones. All are scored by the highest smoothed residual of the
whole image, relative to those of the images learned from at the same pixel; "within noise" of the rival, which is
judged alike, allows 0.97 of its AUROC. Blocks of a mosaic have 8 pixels, 480 steps. Textures go on alike everywhere,
so that zeros do: the hole is rebuilt from what is around it. Longer training (960 steps), blocks of 4 and 16 pixels
and absolute residuals did not turn the order of the hints on seed 100; real cells, below, do.
"""


def figures(seed: int, *, short: bool) -> Iterator[Figure]:
    """See ``Family``."""
    yield from figures_of(_textures(np.random.default_rng(seed), short=short), seed, short=short)


def _textures(rng: np.random.Generator, *, short: bool) -> Images:
    numbers = (3, 2, 4) if short else (120, 30, 40)
    sets = [[crops(kind, n, SIDE, rng) for kind in TEXTURES] for n in numbers]
    bad, masks = [], []
    for i, part in enumerate(sets[2]):
        foreign = sets[2][(i + 1) % len(TEXTURES)]
        changed, mask = with_defects(part, foreign, rng)
        bad.append(changed)
        masks.append(mask)
    train, good, bad_images = (_grey(np.concatenate(part)) for part in (*sets[:2], bad))
    return Images("textures", train, good, bad_images, torch.from_numpy(np.concatenate(masks)))


def _grey(images: Any) -> Tensor:
    return torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1).contiguous()
