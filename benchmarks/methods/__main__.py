"""Prove what the methods are for, and write ``RESULTS.md`` from all figures kept so far.

A family is a file ``prove_<family>.py``; it takes minutes a seed. Figures are kept after each seed, so
an interrupted run loses one seed at most.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from benchmarks.machine import commit_name, package_version, processor_name
from benchmarks.methods.proofs import Family, Figure, keep_figures, report

FOLDER = Path(__file__).resolve().parent
# What runs before this one have changed.
_WRITTEN = ("benchmarks/methods/figures", "benchmarks/methods/RESULTS.md")


def families() -> dict[str, Family]:
    """Modules by family."""
    names = sorted(path.stem.removeprefix("prove_") for path in FOLDER.glob("prove_*.py"))
    modules = {name: importlib.import_module(f"benchmarks.methods.prove_{name}") for name in names}
    return cast(dict[str, Family], modules)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a claim failed."""
    known = families()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(known), help="this family")
    parser.add_argument("--seed", action="append", type=int, help="this seed (0, 1, 2)")
    parser.add_argument("--short", action="store_true", help="seconds, proves nothing; needs --out")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of RESULTS.md")
    options = parser.parse_args(arguments)
    if options.short and options.out == FOLDER:
        parser.error("--short needs --out: its figures must not replace the results")
    failed = 0
    for name in options.only or sorted(known):
        for seed in options.seed or (0, 1, 2):
            figures = []
            progress = tqdm(known[name].figures(seed, short=options.short), unit=" figures")
            for figure in progress:
                figures.append(figure)
                progress.write(_line(name, seed, figure))
            failed += sum(not figure.held for figure in figures)
            keep_figures(options.out / "figures" / f"{name}.json", seed, figures, _machine())
            text = report(options.out / "figures", known)
            (options.out / "RESULTS.md").write_text(text, encoding="utf-8")
    return int(failed > 0)


def _line(name: str, seed: int, figure: Figure) -> str:
    return (
        f"{name} {seed}: {figure.claim}: {figure.subject} {figure.value:.4g}, "
        f"{figure.baseline} {figure.baseline_value:.4g} {'held' if figure.held else 'FAILED'}"
    )


def _machine() -> list[str]:
    return [
        f"{processor_name()}, torch {package_version('torch')}, commit {commit_name(*_WRITTEN)}"
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
