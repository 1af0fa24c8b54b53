"""Solar cells of the ELPV set for proofs: parts of them, runs on them, and what features tell of them.

``python -m benchmarks.methods.solar simclr training.epochs=20`` is how recipes were chosen: it trains on all
cells but those held out for development, and prints the AUROC of these. No proof is tested on them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import elpv_dataset
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pyfeat import knn
from pyfeat.anomaly import PatchCore, image_auroc
from pyfeat.ssl.config import Config, make_config
from pyfeat.ssl.registry import SOURCES
from pyfeat.ssl.training import fit, make_objective

DEVELOPMENT_SEED = 2_000_003
NEIGHBOURS = 20


class Cells(NamedTuple):
    """Images and what is known of them."""

    pixels: npt.NDArray[np.uint8]  # (N, side, side)
    defects: npt.NDArray[np.int64]  # (N,), 0 good, 1 defective, -1 unsure


class Parts(NamedTuple):
    """Indices of cells."""

    unlabelled: npt.NDArray[np.int64]  # trained on: all but ``test``
    labelled: npt.NDArray[np.int64]  # good and defective, among the unlabelled
    test: npt.NDArray[np.int64]  # good and defective


def load_cells(side: int, *, every: int = 1) -> Cells:
    """Every n-th cell; good are those of defect probability 0, defective those of 1."""
    folder = Path(elpv_dataset.__path__[0]) / "data"
    table = np.genfromtxt(folder / "labels.csv", dtype=None, encoding="ascii")[::every]
    pixels = np.empty((len(table), side, side), np.uint8)
    for i, name in enumerate(table["f0"]):
        with Image.open(folder / name) as image:
            pixels[i] = np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX))
    probability = table["f1"]
    defects = np.where(probability == 0, 0, np.where(probability == 1, 1, -1))
    return Cells(pixels, defects)


def divide(cells: Cells, seed: int | None) -> Parts:
    """Half of what is no development part is tested on, stratified by defect; None: the development part."""
    held_out = _stratified(np.arange(len(cells.defects)), cells.defects, 0.2, DEVELOPMENT_SEED)
    rest = np.setdiff1d(np.arange(len(cells.defects)), held_out)
    test = held_out if seed is None else _stratified(rest, cells.defects, 0.5, seed)
    unlabelled = np.setdiff1d(np.arange(len(cells.defects)), test)
    labelled = np.setdiff1d(rest, test)
    return Parts(unlabelled, labelled[cells.defects[labelled] >= 0], test)


def _stratified(
    rows: npt.NDArray[np.int64], defects: npt.NDArray[np.int64], share: float, seed: int
) -> npt.NDArray[np.int64]:
    """A share of the good and of the defective ones among rows, ascending."""
    rng = np.random.default_rng(seed)
    kinds = [rng.permutation(rows[defects[rows] == kind]) for kind in (0, 1)]
    return np.sort(np.concatenate([kind[: round(share * len(kind))] for kind in kinds]))


def solar_config(
    cells: Cells, parts: Parts, folder: Path, seed: int, recipe: Mapping[str, Mapping[str, Any]]
) -> Config:
    """A run on the unlabelled part, whose images are written into a folder."""
    path = folder / "cells.npy"
    np.save(path, cells.pixels[parts.unlabelled])
    sections: dict[str, Any] = {name: dict(section) for name, section in recipe.items()}
    sections["network"] = {"in_channels": 1, **sections["network"]}
    side = cells.pixels.shape[1]
    sections["data"] = {
        "name": "images",
        "path": str(path),
        "size": [side, side],
        "channels": "grey",
    }
    quiet = {"seed": seed, "progress": False, "keep": 1, "checkpoint_every": 10_000}
    sections["training"] = {**quiet, **sections["training"]}
    return make_config({"out": str(folder / "run"), "watch": {"every": 0}, **sections})


def networks(config: Config) -> tuple[nn.Module, nn.Module]:
    """The backbone that a run begins with, and the one that it ends with."""
    source = SOURCES.find(config.data.name).make(config.data.options)
    untrained: nn.Module = make_objective(config, source).backbone
    run = fit(config)
    if not run.finished:
        message = f"run was stopped after step {run.steps_done}"
        raise RuntimeError(message)
    return untrained.eval(), run.backbone()


@torch.no_grad()
def embed(network: nn.Module, pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(N, D) features of images."""
    images = torch.from_numpy(pixels)[:, None].float() / 255
    return torch.cat([network(images[i : i + 256]) for i in range(0, len(images), 256)])


def probe(network: nn.Module, cells: Cells, parts: Parts) -> float:
    """AUROC of the share of defective cells among the nearest labelled ones, by cosine."""
    rows, queries = (embed(network, cells.pixels[part]) for part in (parts.labelled, parts.test))
    found = knn(queries, rows, min(NEIGHBOURS, len(rows)), metric="cosine")
    labels = torch.from_numpy(cells.defects[parts.labelled]).double()
    return image_auroc(cells.defects[parts.test] == 1, labels[found.indices].mean(dim=1))


class Stages:
    """The stages of a network of grey images, as ``PatchCore`` takes them."""

    def __init__(self, network: nn.Module, stages: Sequence[int]) -> None:
        self.name, self.layers = type(network).__name__, tuple(map(str, stages))
        self._network, self._stages = network, stages

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        maps = self._network.maps(images.mean(dim=1, keepdim=True))  # type: ignore[operator]
        return [maps[stage] for stage in self._stages]

    def fingerprint(self) -> str:
        return "0" * 64


def anomalies(network: nn.Module, cells: Cells, parts: Parts, stages: Sequence[int]) -> float:
    """AUROC of ``PatchCore`` that has learned the good ones of the labelled part."""
    good = parts.labelled[cells.defects[parts.labelled] == 0]
    images = {
        name: torch.from_numpy(cells.pixels[rows])[:, None].float().div(255).expand(-1, 3, -1, -1)
        for name, rows in (("fit", good), ("score", parts.test))
    }
    side = cells.pixels.shape[1]
    model = PatchCore(Stages(network, stages), image_size=(side, side)).fit(images["fit"])
    return image_auroc(cells.defects[parts.test] == 1, model.score(images["score"]).scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a recipe with changes shows on the development part."""
    from benchmarks.methods.prove_solar import RECIPES, SIDE, STAGES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods.solar", description=__doc__)
    parser.add_argument("objective", choices=sorted(RECIPES))
    parser.add_argument("changes", nargs="*", help="section.key=value")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(arguments)
    recipe = {name: dict(section) for name, section in RECIPES[options.objective].items()}
    for change in options.changes:
        place, _, value = change.partition("=")
        section, _, key = place.partition(".")
        recipe.setdefault(section, {})[key] = _literal(value)
    cells = load_cells(SIDE)
    parts = divide(cells, None)
    with tempfile.TemporaryDirectory() as folder:
        config = solar_config(cells, parts, Path(folder), options.seed, recipe)
        began = time.process_time()
        untrained, trained = networks(config)
        seconds = time.process_time() - began
    for name, network in (("untrained", untrained), ("trained", trained)):
        line = f"{options.objective} {' '.join(options.changes)} {name}: {probe(network, cells, parts):.4f}"
        if STAGES.get(options.objective):
            line += f", PatchCore {anomalies(network, cells, parts, STAGES[options.objective]):.4f}"
        print(f"{line}, {seconds:.0f} s")
    return 0


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
