"""Textures made from a seed, and defects pasted into images, of which the pixels are known."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]
TEXTURES = ("brick", "grass", "gravel")


def texture(kind: str, side: int, rng: np.random.Generator) -> Array:
    """(side, side) in [0, 1]: bricks with mortar, blades in one direction, or stones of many greys."""
    noise = rng.normal(0, 1, (side, side))
    y, x = np.mgrid[:side, :side]
    if kind == "brick":
        row = y // 16
        mortar = (y % 16 < 2) | ((x + 16 * (row % 2)) % 32 < 2)
        tint = rng.normal(0, 0.06, (side // 16 + 1, side // 32 + 2))
        grey = (
            0.5 + tint[row, (x + 16 * (row % 2)) // 32] + 0.05 * ndimage.gaussian_filter(noise, 0.7)
        )
        values = np.where(mortar, 0.75 + 0.02 * noise, grey)
    elif kind == "grass":
        fine = ndimage.gaussian_filter(noise, (4, 0.7))
        values = 0.45 + 0.13 * fine / fine.std()
    else:
        seeds = rng.uniform(0, side, (side * side // 60, 2))
        owner = ndimage.distance_transform_edt(
            _without(seeds, side), return_distances=False, return_indices=True
        )
        shade = rng.uniform(0.25, 0.75, (side, side))
        values = ndimage.gaussian_filter(shade[tuple(owner)], 1.0) + 0.02 * noise
    return values.clip(0, 1).astype(np.float32)


def _without(points: npt.NDArray[np.float64], side: int) -> Masks:
    free = np.ones((side, side), bool)
    free[tuple(points.astype(int).T)] = False
    return free


def crops(kind: str, count: int, side: int, rng: np.random.Generator) -> Array:
    """(count, side, side), from a sheet of the texture that no other call sees."""
    sheet = texture(kind, 6 * side, rng)
    tops, lefts = rng.integers(0, 5 * side, (2, count))
    return np.stack([sheet[t : t + side, u : u + side] for t, u in zip(tops, lefts, strict=True)])


def with_defects(images: Array, foreign: Array, rng: np.random.Generator) -> tuple[Array, Masks]:
    """Paste one defect into each of (B, S, S) images: crack, blob, scratch and patch by turns.

    Args:
        images: In [0, 1].
        foreign: (n, S, S), what patches are cut from.
        rng: Of all draws.

    Returns:
        The images, and (B, S, S) the pixels that were changed.
    """
    changed, masks = images.copy(), np.zeros(images.shape, bool)
    side = images.shape[1]
    for i, image in enumerate(changed):
        kind = i % 4
        if kind == 3:
            size = int(rng.integers(side // 6, side // 3))
            top, left = rng.integers(0, side - size, 2)
            source = foreign[int(rng.integers(len(foreign)))]
            where = (slice(top, top + size), slice(left, left + size))
            masks[i][where] = True
            image[where] = source[where]
        elif kind == 1:
            y, x = np.mgrid[:side, :side]
            top, left = rng.uniform(side / 6, side * 5 / 6, 2)
            radii = rng.uniform(side / 20, side / 9, 2)
            masks[i] = ((y - top) / radii[0]) ** 2 + ((x - left) / radii[1]) ** 2 < 1
            image[masks[i]] *= 0.5
        else:
            masks[i] = _line(side, straight=kind == 2, rng=rng)
            image[masks[i]] = 0.15 if kind == 0 else np.minimum(1, image[masks[i]] + 0.35)
    return changed, masks


def _line(side: int, *, straight: bool, rng: np.random.Generator) -> Masks:
    """A line of two pixels' width, a third to two thirds of the side long."""
    mask = np.zeros((side, side), bool)
    place, heading = rng.uniform(side / 4, side * 3 / 4, 2), rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.uniform(side / 3, side * 2 / 3))):
        row, column = place.astype(int)
        mask[max(0, row) : row + 2, max(0, column) : column + 2] = True
        place += (np.sin(heading), np.cos(heading))
        if not straight:
            heading += rng.normal(0, 0.35)
        if not (place >= 0).all() or not (place < side).all():
            break
    return mask
