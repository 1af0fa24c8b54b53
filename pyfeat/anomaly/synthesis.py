"""Plates rendered in colour and height, with defects whose pixels are known."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from pyfeat._checks import check_choice
from pyfeat.anomaly.samples import GOOD, SPLITS, Dataset, Sample, Split

Defect = Literal["dent", "stain", "scratch"]
DEFECTS: tuple[Defect, ...] = get_args(Defect)
_Plane = NDArray[np.float64]  # (H, W)

_RELIEF = 0.6  # half the depth of the ribs, in pixels
_DEPTH = 1.6  # of a dent or scratch of severity 1, in pixels
_CONTRAST = 0.28  # of a stain or scratch of severity 1, of the range of colours
_NOISE = 0.04  # of heights, in pixels: the depth sensor's
_DISTANCE = 100.0  # of the sensor, in pixels
_LEAST = 0.25  # of a defect's full strength that counts as defective


def synthesise(
    *,
    train: int = 60,
    good: int = 60,
    defective: int = 60,
    seed: int = 0,
    size: int | tuple[int, int] = 128,
    category: str = "plate",
    defects: Sequence[Defect] = DEFECTS,
    severity: float = 1.0,
) -> Dataset:
    """Make a set of ribbed plates in colour and height: train on good ones, test on both.

    Plates differ in pose (shift, turn, tilt), colour, light, grain and the width of their ribs; some
    points are missing. Defects take turns:

    - dent: a hollow. Under the diffuse light of these plates colours do not show it.
    - stain: another colour; heights do not show it.
    - scratch: a dark groove that both show.

    A sample depends on the seed, the category, its split and its number alone: equal ones are equal
    whatever the counts. Lengths are in pixels: x to the right, y down, z away from the sensor.

    Args:
        train: Good samples to learn from, at least 0.
        good: Good samples to test, at least 0.
        defective: Samples with one defect each to test, at least 0.
        seed: At least 0.
        size: Height and width in pixels, or one number for both; at least 16.
        category: Name, which also decides base colour and ribs.
        defects: Kinds, in the order in which they take turns.
        severity: Factor of depth and contrast of defects, > 0.

    Returns:
        Records that are rendered when they are loaded, some milliseconds each.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> sample = synthesise(train=0, good=0, defective=1, size=64)[0].load()
        >>> sample.kind, tuple(sample.rgb.shape), tuple(sample.xyz.shape), bool(sample.mask.any())
        ('dent', (3, 64, 64), (3, 64, 64), True)
    """
    op = "synthesise"
    sides = (size, size) if isinstance(size, int) else tuple(size)
    counts = {"train": train, "good": good, "defective": defective, "seed": seed}
    for name, count in counts.items():
        _check(count >= 0, f"{op}: {name} must be at least 0, got {count}")
    _check(len(sides) == 2 and min(sides) >= 16, f"{op}: size must be at least 16, got {size}")
    _check(0 < severity < math.inf, f"{op}: severity must be positive and finite, got {severity}")
    _check(len(defects) > 0 or not defective, f"{op}: defects must name at least one, got none")
    for defect in defects:
        check_choice(op, "defects", defect, DEFECTS)

    def plate(split: Split, kind: str, number: int) -> Plate:
        return Plate(category, split, kind, number, seed, (sides[0], sides[1]), severity)

    records = [plate("train", GOOD, i) for i in range(train)]
    records += [plate("test", GOOD, i) for i in range(good)]
    records += [plate("test", defects[i % len(defects)], i) for i in range(defective)]
    return Dataset(records, op=op)


@dataclass(frozen=True)
class Plate:
    """Record of one rendered sample; see ``pyfeat.anomaly.synthesise``."""

    category: str
    split: Split
    kind: str
    number: int  # among the good, or the defective, ones of its split
    seed: int
    size: tuple[int, int]
    severity: float

    @property
    def name(self) -> str:
        """Category, split, kind and number."""
        return f"{self.category}/{self.split}/{self.kind}/{self.number:03d}"

    @property
    def defective(self) -> bool:
        """Whether there is a defect."""
        return self.kind != GOOD

    @property
    def has_mask(self) -> bool:
        """Always: defects are drawn."""
        return True

    @property
    def has_points(self) -> bool:
        """Always."""
        return True

    def load(self) -> Sample:
        """Render the sample."""
        random = np.random.default_rng(
            (
                self.seed,
                zlib.crc32(self.category.encode()),
                SPLITS.index(self.split),
                int(self.defective),
                self.number,
            )
        )
        style = np.random.default_rng(zlib.crc32(self.category.encode()))
        scene = _Scene(self.size, style, random)
        mask = np.zeros(self.size, bool)
        if self.kind != GOOD:
            mask = scene.damage(self.kind, self.severity, random)
        return Sample(
            self.name,
            self.category,
            self.split,
            self.kind,
            self.defective,
            torch.from_numpy(scene.colours(random)),
            torch.from_numpy(scene.points(random)),
            torch.from_numpy(mask),
        )


class _Scene:
    """A plate without defect: its outline, height and colour on the pixel grid."""

    def __init__(
        self, size: tuple[int, int], style: np.random.Generator, random: np.random.Generator
    ) -> None:
        self.size, self.scale = size, min(size)
        rows, columns = np.indices(size, dtype=np.float64)
        shift = random.uniform(-0.03, 0.03, 2) * self.scale
        self.y = rows - (size[0] - 1) / 2 - shift[0]
        self.x = columns - (size[1] - 1) / 2 - shift[1]
        turn = random.uniform(-0.2, 0.2)
        self.u = (self.x * math.cos(turn) + self.y * math.sin(turn)) / size[1]  # about [-.5, .5]
        self.v = (self.y * math.cos(turn) - self.x * math.sin(turn)) / size[0]
        self.inside = self.u**8 + self.v**8 < 0.41**8
        ribs = style.uniform(7, 10) * random.uniform(0.95, 1.05)
        wave = np.sin(2 * math.pi * (ribs * self.u + random.uniform()))
        tilt = random.uniform(-0.05, 0.05, 2)
        self.height = tilt[0] * self.x + tilt[1] * self.y + _RELIEF * wave
        self.height += 0.5 * _smooth(size, 0.15 * self.scale, random)
        base = style.uniform(0.35, 0.65, 3) + random.uniform(-0.04, 0.04, 3)
        grain = _smooth(size, np.array([0.6, 4.0]), random)
        light = random.uniform(0.85, 1.1) + random.uniform(-0.1, 0.1) * self.u
        # Ribs are darker in their valleys: colour tells of the height, as it does on real parts.
        shade = light * (1 - 0.12 * wave) + 0.05 * grain + 0.05 * _smooth(size, 6.0, random)
        self.colour = base[:, None, None] * shade  # [3, H, W]

    def damage(self, kind: str, severity: float, random: np.random.Generator) -> NDArray[np.bool_]:
        """Draw a defect, and return its mask."""
        centre = random.uniform(-0.26, 0.26, 2)
        angle = random.uniform(0, math.pi)
        du, dv = self.u - centre[0], self.v - centre[1]
        along = du * math.cos(angle) + dv * math.sin(angle)
        across = dv * math.cos(angle) - du * math.sin(angle)
        if kind == "scratch":
            across = across + random.uniform(-0.6, 0.6) * along**2
            length, width = random.uniform(0.1, 0.18), 0.9 / self.scale
            strength = np.exp(-0.5 * (across / width) ** 2 - (along / length) ** 8)
        else:
            radii = random.uniform(0.035, 0.065, 2)
            blob = (along / radii[0]) ** 2 + (across / radii[1]) ** 2
            blob = blob * (1 + 0.25 * _smooth(self.size, 0.04 * self.scale, random))
            strength = np.exp(-0.5 * np.maximum(blob, 0) ** (2 if kind == "stain" else 1))
        strength = strength * self.inside
        if kind in ("dent", "scratch"):
            self.height = self.height + severity * _DEPTH * strength
        if kind in ("stain", "scratch"):
            tint = -np.ones(3) if kind == "scratch" else random.uniform(-1.0, 0.3, 3)
            tint = tint / np.linalg.norm(tint)
            self.colour = self.colour + severity * _CONTRAST * strength * tint[:, None, None]
        return np.asarray(strength > _LEAST)

    def colours(self, random: np.random.Generator) -> NDArray[np.float32]:
        """(3, H, W) in [0, 1]: dark outside of the plate."""
        colour = np.where(self.inside, self.colour, 0.08)
        colour = colour + random.normal(0, 0.01, colour.shape)
        clipped: NDArray[np.float32] = colour.clip(0, 1).astype(np.float32)
        return clipped

    def points(self, random: np.random.Generator) -> NDArray[np.float32]:
        """(3, H, W): zero outside of the plate and where the sensor has no answer."""
        z = _DISTANCE + self.height + random.normal(0, _NOISE, self.size)
        seen = self.inside & (_smooth(self.size, 1.5, random) < 3.2)
        points: NDArray[np.float32] = (np.stack([self.x, self.y, z]) * seen).astype(np.float32)
        return points


def _smooth(size: tuple[int, int], sigma: Any, random: np.random.Generator) -> _Plane:
    """(H, W) noise of mean 0 and variance 1, Gaussian of width ``sigma`` pixels, periodic."""
    down, right = np.broadcast_to(sigma, 2)
    rows, columns = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None]
    response = np.exp(-2 * math.pi**2 * ((down * rows) ** 2 + (right * columns) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(random.normal(size=size)) * response, s=size)
    standard: _Plane = (noise - noise.mean()) / noise.std()
    return standard


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
