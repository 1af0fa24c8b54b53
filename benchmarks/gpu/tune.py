"""Measure the tiles of the Triton kernels on the GPU at hand.

``python -m benchmarks.gpu.tune`` prints what it finds; with ``--write`` it replaces the part of
``pyfeat/_triton/tiles.json`` that is for this GPU's compute capability, to be committed. Only whoever asks for
it waits for it: a search or a loss takes its tiles from the file. Kernels in CUDA C++ are compiled for fixed
tiles.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock, EventClock, HostClock
from benchmarks.timing import Summary
from pyfeat._pairs import Pairs

# A tile replaces the one that is in use if it takes less than this of its time.
GAIN = 0.98
ROUNDS = 7


@dataclass(frozen=True)
class Slot:
    """One tile of the table: which it is, what may stand there, and a call that takes it."""

    kernel: str
    place: int
    candidates: list[tuple[int, ...]]
    call: Callable[[], list[Tensor]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace this GPU's part of the file")
    parser.add_argument("--out", type=Path, help="the file, if not pyfeat/_triton/tiles.json")
    parser.add_argument("--rehearse", action="store_true", help="in Triton's interpreter, tiny")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu.tune: torch sees no NVIDIA GPU", file=sys.stderr)
        return 2
    from pyfeat._triton import tile_table

    device = torch.device("cpu" if options.rehearse else "cuda")
    clock: Clock = HostClock() if options.rehearse else EventClock(device)
    capability = "8.0"
    if not options.rehearse:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    tiles = tile_table.table()
    # What the GPU takes so far is where it begins.
    tiles[capability] = {kernel: tile_table.tiles_of(kernel, device) for kernel in tiles["8.0"]}
    for slot in slots(device, tiny=options.rehearse):
        tune(slot, tiles[capability], clock)
    if options.write:
        tile_table.write_table(tiles, options.out or tile_table.PATH)
        print(f"wrote {options.out or tile_table.PATH}")
    return 0


def tune(slot: Slot, kernels: dict[str, tuple[Any, ...]], clock: Clock) -> None:
    """Put the fastest candidate into the table, if it gives the same answer and is faster by GAIN."""
    from pyfeat._triton.tiles import TileConfig

    used = kernels[slot.kernel]
    answer = slot.call()
    best, least = used[slot.place], _seconds(slot.call, clock)
    first = least
    for numbers in slot.candidates:
        tile = TileConfig(*numbers)
        if tile == used[slot.place]:
            continue
        kernels[slot.kernel] = _replaced(used, slot.place, tile)
        try:
            same = _equal(slot.call(), answer)
        except Exception as error:
            print(f"  {tuple(tile)}: {type(error).__name__}", flush=True)
            continue
        seconds = _seconds(slot.call, clock) if same else float("inf")
        print(f"  {tuple(tile)}: {seconds / first:.2f}" if same else f"  {tuple(tile)}: WRONG")
        if seconds < min(least, GAIN * first):
            best, least = tile, seconds
    kernels[slot.kernel] = _replaced(used, slot.place, best)
    print(f"{slot.kernel}, {slot.place}: {tuple(best)}, {least / first:.2f} of before", flush=True)


def slots(device: torch.device, *, tiny: bool) -> list[Slot]:
    """All that can be tuned, in the order of the table."""
    made = [*_search_slots(device, tiny=tiny), *_pair_slots(device, tiny=tiny)]
    # In the interpreter one of each kernel takes long enough.
    return list({slot.kernel: slot for slot in made}.values()) if tiny else made


def _search_slots(device: torch.device, *, tiny: bool) -> list[Slot]:
    """By the number of queries: the rows of a tile are given, and it must divide 256 columns."""
    from pyfeat._triton import similarity

    num_rows, dim = (60, 20) if tiny else (65_536, 768)
    memory = torch.randn(num_rows, dim, device=device)
    made = []
    for masked in (False, True):
        for place, (block_m, num_queries) in enumerate(((16, 16), (64, 64), (128, 8_192))):
            queries = torch.randn(min(num_queries, 5 if tiny else num_queries), dim, device=device)
            mask = torch.rand(len(queries), num_rows, device=device) < 0.5 if masked else None

            def search(queries: Tensor = queries, mask: Tensor | None = mask) -> list[Tensor]:
                return list(similarity.knn(queries, memory, 1, "euclidean", allowed=mask))

            candidates: list[tuple[int, ...]] = [
                (block_m, *rest)
                for rest in itertools.product((128, 256), (64, 128), (4, 8), (2, 3, 4, 5, 6))
            ]
            kernel = "search, masked" if masked else "search"
            made.append(Slot(kernel, place, candidates[:1] if tiny else candidates, search))
    return made


def _pair_slots(device: torch.device, *, tiny: bool) -> list[Slot]:
    """Square tiles of a given side, which must divide 128."""
    from pyfeat._gpu import contrast
    from pyfeat._triton import contrast as kernels

    scale = torch.tensor(0.1, dtype=torch.float64, device=device)
    made = []
    for dtype, depths in ((torch.bfloat16, (32, 64, 128)), (torch.float32, (16, 32))):
        for place, (side, count) in enumerate(((128, 16_384), (64, 512))):
            dim = 20 if tiny else 768
            features = torch.randn(20 if tiny else count, dim, device=device).to(dtype)

            def sums(features: Tensor = features) -> list[Tensor]:
                found = contrast.pair_sums(
                    kernels, features, features, scale, Pairs(), columns=True
                )
                return cast("list[Tensor]", [found[0], found[1]])

            candidates: list[tuple[int, ...]] = [
                (side, side, *rest) for rest in itertools.product(depths, (4, 8), (2, 3, 4, 5))
            ]
            # The interpreter is given float32 for bfloat16.
            size = 4 if tiny else features.element_size()
            kernel = f"pairs, {size} bytes"
            made.append(Slot(kernel, place, candidates[:1] if tiny else candidates, sums))
    return made


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    return Summary(tuple(clock.seconds(call, cold=False) for _ in range(ROUNDS))).median


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Up to the order of sums."""
    return all(
        torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-6)
        for x, y in zip(found, expected, strict=True)
    )


def _replaced(tiles: tuple[Any, ...], place: int, tile: Any) -> tuple[Any, ...]:
    return (*tiles[:place], tile, *tiles[place + 1 :])


if __name__ == "__main__":
    sys.exit(main())
