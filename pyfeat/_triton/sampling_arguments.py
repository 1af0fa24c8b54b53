"""The arguments of deformable attention as its kernels take them.

The sizes of levels come as numbers, not as a tensor: nothing is copied to the GPU, and no kernel is
compiled again for other sizes or counts of points.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from pyfeat._sampling_inputs import SamplingInputs

# Levels of one launch, and the bits for each size of a level, by the number of its axes; the
# points of the level take the bits above 48.
MAX_LEVELS = 8
_SIZE_BITS = {1: 48, 2: 24, 3: 16}
_POINT_BITS = 15
_POINTS_SHIFT = 48

# Elements of values that a program holds of each corner; small programs where large ones would be
# fewer than _FEW_PROGRAMS. A thread takes as many as it reads at once, 16 bytes.
_ELEMENTS = 1024
_MAX_BYTES = 4096
_SMALL_ELEMENTS = 256
_FEW_PROGRAMS = 1024
_BYTES_PER_WARP = 32 * 16
_MAX_QUERIES = 128
_MAX_WARPS = 8

# Arguments of kernels that change from call to call: no kernel is compiled for one value of them.
CHANGING = ["num_blocks", "num_queries", "num_points", "num_levels"]
CHANGING += [f"level_{place}" for place in range(MAX_LEVELS)]


@dataclass(frozen=True)
class Sampling(SamplingInputs):
    """The inputs of at most 8 levels, and what the kernels take for them."""

    @property
    def is_wide(self) -> bool:
        """Whether offsets of cells pass 2^31, in values or in their gradient."""
        _, num_cells, num_heads, dim = self.value.shape
        return num_cells * max(self.value.stride(1), num_heads * dim) >= 2**31

    def levels(self) -> tuple[int, ...]:
        """Eight numbers: sizes of a level from x up, 48 bits in all, and above them its points."""
        bits = _SIZE_BITS[self.ndim]
        packed = []
        for shape, count in zip(self.shapes, self.num_points, strict=True):
            if max(*shape, 0) >= 1 << min(bits, 31) or count >= 1 << _POINT_BITS:
                limits = f"sizes below 2^{min(bits, 31)} and less than 2^{_POINT_BITS} points"
                message = (
                    f"deform_attn: spatial_shapes must have {limits} in every level on a GPU, got "
                    f"{shape} with {count} points"
                )
                raise ValueError(message)
            sizes = sum(size << bits * axis for axis, size in enumerate(reversed(shape)))
            packed.append(sizes + (count << _POINTS_SHIFT))
        return (*packed, *(0 for _ in range(MAX_LEVELS - len(packed))))

    def arguments(self) -> tuple[Any, ...]:
        """Of a kernel, behind its tensors and the blocks of queries."""
        _, num_queries, num_heads, num_points, _ = self.locations.shape
        strides = self.value.stride()[:3]
        return (num_queries, num_heads, num_points, *strides, len(self.shapes), *self.levels())

    def constants(self) -> dict[str, Any]:
        """Of a kernel, by name."""
        return {
            "N": self.ndim,
            "BORDER": self.border,
            "ALIGN_CORNERS": self.align_corners,
            "DISCRETE": self.discrete,
            "SOFTMAX": self.softmax,
            "DOUBLE": self.value.dtype == torch.float64,
            "WIDE": self.is_wide,
        }


@dataclass(frozen=True)
class QueryBlocks:
    """How queries are cut into blocks, of each of which one program takes one head."""

    block_q: int
    block_d: int
    num_warps: int
    # Sizes of a block along y and x; a block is the cells of a part of a level where queries are
    # the cells of levels, since neighbours sample the same cells, else a range of queries.
    tile: tuple[int, int]
    tiled: bool
    count: int

    @classmethod
    def of(cls, sampling: Sampling) -> "QueryBlocks":
        """Blocks for all queries of one batch and head."""
        batch, num_queries, num_heads, *_ = sampling.locations.shape
        block_d = triton.next_power_of_2(sampling.value.shape[3])
        elements = min(_ELEMENTS, _MAX_BYTES // sampling.value.element_size())
        if batch * num_heads * num_queries * block_d < _FEW_PROGRAMS * elements:
            elements = _SMALL_ELEMENTS
        block_q = min(max(1, elements // block_d), _MAX_QUERIES)
        size = block_q * block_d * sampling.value.element_size()
        num_warps = min(max(1, size // _BYTES_PER_WARP), _MAX_WARPS)
        tiled = sampling.ndim > 1 and num_queries == sampling.value.shape[1]
        z, y, x = _tile(block_q, sampling.ndim)
        count = triton.cdiv(num_queries, block_q)
        if tiled:
            levels = [(1, *shape)[-3:] for shape in sampling.shapes]
            count = sum(-(-a // z) * -(-b // y) * -(-c // x) for a, b, c in levels)
        return cls(block_q, block_d, num_warps, (y, x), tiled, count)

    def constants(self, dim: int) -> dict[str, Any]:
        """Of a kernel, by name, with the options of its compilation."""
        return {
            "D": dim,
            "BLOCK_Q": self.block_q,
            "BLOCK_D": self.block_d,
            "TILED": self.tiled,
            "TILE_Y": self.tile[0],
            "TILE_X": self.tile[1],
            "num_warps": self.num_warps,
            "enable_fp_fusion": True,
            # Left alone, ptxas spills some to fit one more program on a processor.
            "maxnreg": 255,
        }


def _tile(block_q: int, ndim: int) -> tuple[int, int, int]:
    """As even a box of ``block_q`` cells as powers of two make, longest along x."""
    bits, sizes = block_q.bit_length() - 1, []
    for axes in range(ndim, 0, -1):
        sizes.append(1 << bits // axes)
        bits -= bits // axes
    z, y, x = (1, 1, *sizes)[-3:]
    return z, y, x
