"""Written digits (scikit-learn) alone and in scenes, and what is said of them."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.3, 0.4, 1.0),
           "white": (1.0, 1.0, 1.0)}  # fmt: skip
PLACES = ("top left", "top middle", "top right", "middle left", "centre", "middle right",
          "bottom left", "bottom middle", "bottom right")  # fmt: skip
SENTENCES = (
    "a {colour} {digit} is at the {place}",
    "at the {place} there is a {colour} {digit}",
    "the {place} shows a {digit} in {colour}",
)
SIDE, GRID = 8, 3


@dataclass(frozen=True)
class Digits:
    """Digits, divided by a seed.

    Attributes:
        images: (N, 8, 8) in [0, 1].
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor


def digits(seed: int) -> tuple[Digits, Digits]:
    """Two thirds to train on and a third to test on."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    images = torch.from_numpy(data.images[order]).float() / 16
    labels = torch.from_numpy(data.target[order]).long()
    cut = 2 * len(images) // 3
    return Digits(images[:cut], labels[:cut]), Digits(images[cut:], labels[cut:])


@dataclass(frozen=True)
class Thing:
    """A digit of a scene."""

    digit: int
    colour: str
    cell: int  # of the grid, row by row

    def said(self, template: str) -> str:
        """A sentence on it."""
        return template.format(
            digit=DIGITS[self.digit], colour=self.colour, place=PLACES[self.cell]
        )


@dataclass(frozen=True)
class Scenes:
    """Grids of 3 x 3 cells, of which two to four hold a coloured digit.

    Attributes:
        images: (N, 3, 24, 24) in [0, 1].
        things: Of each scene.
    """

    images: Tensor
    things: list[list[Thing]]


def scenes(source: Digits, count: int, seed: int) -> Scenes:
    """Compose scenes; no two things of one are of equal digit and colour."""
    rng = np.random.default_rng(seed)
    images, things = torch.zeros(count, 3, GRID * SIDE, GRID * SIDE), []
    for image in images:
        found: dict[tuple[int, str], Thing] = {}
        cells = rng.permutation(GRID * GRID)[: rng.integers(2, 5)]
        for cell in cells.tolist():
            row = int(rng.integers(len(source.images)))
            thing = Thing(int(source.labels[row]), str(rng.choice(list(COLOURS))), cell)
            if (thing.digit, thing.colour) in found:
                continue
            found[thing.digit, thing.colour] = thing
            top, left = cell // GRID * SIDE, cell % GRID * SIDE
            colour = torch.tensor(COLOURS[thing.colour]).view(3, 1, 1)
            image[:, top : top + SIDE, left : left + SIDE] = colour * source.images[row]
        things.append(list(found.values()))
    return Scenes(images, things)


def captions(made: Scenes, seed: int) -> list[list[str]]:
    """Of each scene a short caption, of one thing without its place, and a long one, of all."""
    rng = np.random.default_rng(seed)
    said = []
    for things in made.things:
        one = things[int(rng.integers(len(things)))]
        sentences = [thing.said(str(rng.choice(SENTENCES))) for thing in things]
        short = f"a picture with a {one.colour} {DIGITS[one.digit]}"
        said.append([short, ". ".join(sentences)])
    return said
