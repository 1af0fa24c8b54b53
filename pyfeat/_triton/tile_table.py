"""The tiles of products by compute capability, from ``tiles.json``: nothing is measured on a user's GPU.

``python -m benchmarks.gpu.tune --write`` measures them on the GPU at hand and writes its part of the file.
A GPU that the file does not name takes the tiles of 9.0 if a program may have as much shared memory
there, else those of 8.0: a stage takes (block_m + block_n) block_k numbers of it, of 99 KB or 227 KB.
"""

import functools
import json
from pathlib import Path

import torch

from pyfeat._triton.tiles import TileConfig, has_large_shared_memory

PATH = Path(__file__).with_name("tiles.json")

# Tiles by kernel and compute capability.
Table = dict[str, dict[str, tuple[TileConfig, ...]]]


def tiles_of(kernel: str, device: torch.device) -> tuple[TileConfig, ...]:
    """The tiles among which a launcher of ``kernel`` chooses by the size of the product."""
    return table()[_entry(device)][kernel]


@functools.cache
def table() -> Table:
    """All tiles; whoever tunes replaces some."""
    return read_table(PATH)


def read_table(path: Path) -> Table:
    """From JSON: block_m, block_n, block_k, warps and stages of each tile."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        capability: {
            kernel: tuple(TileConfig(*tile) for tile in tiles) for kernel, tiles in kernels.items()
        }
        for capability, kernels in entries.items()
    }


def write_table(tiles: Table, path: Path) -> None:
    """As ``read_table`` reads it, a line for each kernel."""
    entries = []
    for capability in sorted(tiles, key=lambda name: tuple(map(int, name.split(".")))):
        lines = (
            f"    {json.dumps(kernel)}: {json.dumps([list(tile) for tile in configs])}"
            for kernel, configs in tiles[capability].items()
        )
        entries.append(f"  {json.dumps(capability)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def _entry(device: torch.device) -> str:
    if device.type == "cuda":
        name = ".".join(map(str, torch.cuda.get_device_capability(device)))
        if name in table():
            return name
    return "9.0" if has_large_shared_memory(device) else "8.0"
