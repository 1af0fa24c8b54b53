"""How products are cut into tiles, and the order in which tiles are taken."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Rows of tiles that go through all columns of a product together: their operands stay in the cache.
SWEEP = tl.constexpr(8)


class TileConfig(NamedTuple):
    """How a product is cut into tiles."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def num_lines(self) -> int:
        """Rows and columns, each of which a tile leaves numbers behind for."""
        return self.block_m + self.block_n

    def num_tiles(self, num_rows: int, num_columns: int) -> int:
        """Tiles of a product with so many rows and columns."""
        return int(triton.cdiv(num_rows, self.block_m) * triton.cdiv(num_columns, self.block_n))


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may have 227 KB of it, not 99 KB as on consumer GPUs (8.6, 8.9, 12.0)."""
    return _major_capability(device) in (9, 10)


def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


@triton.jit
def swizzled(program, num_row_blocks, num_column_blocks, SWEEP: tl.constexpr):
    """SWEEP blocks of rows go through all columns before the next: both stay in the cache."""
    per_sweep = SWEEP * num_column_blocks
    first = program // per_sweep * SWEEP
    height = tl.minimum(num_row_blocks - first, SWEEP)
    within = program % per_sweep
    return first + within % height, within // height
