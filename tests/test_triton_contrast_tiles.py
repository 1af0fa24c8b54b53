"""How Triton's kernels of sums over all pairs cut a problem into tiles, blocks and chunks."""

import pytest
import torch

from pyfeat._gpu import contrast_products, contrast_sums
from tests.support_triton import UNITS, contrast_tiles


@pytest.mark.parametrize("num_rows", [1, 200, 4097, 10**6])
@pytest.mark.parametrize("num_columns", [1, 5000, 10**6])
@pytest.mark.parametrize("square", [False, True])
def test_the_workspace_stays_under_64_mib(num_rows: int, num_columns: int, square: bool) -> None:
    if square:
        num_columns = num_rows
    height, width = contrast_products._block_shape(num_rows, num_columns, square=square)
    assert 4 * height * width <= 64 << 20
    assert height % 128 == width % 128 == 0
    for dtype in UNITS:
        wanted = torch.empty(0, dtype=dtype)
        tile = contrast_tiles.choose_tile(num_rows, num_columns, wanted)
        height, width = contrast_sums.chunk_shape(num_rows, num_columns, tile, square=square)
        assert tile.block_m == tile.block_n  # which a batch with itself relies on
        row_tiles, column_tiles = -(-height // tile.block_m), -(-width // tile.block_n)
        assert 4 * 4 * (column_tiles * height + row_tiles * width) <= 64 << 20
        assert column_tiles * height * 4 < 2**31


def test_large_problems_get_large_tiles_and_small_ones_enough_of_them() -> None:
    for dtype in UNITS:
        wanted = torch.empty(0, dtype=dtype)
        assert contrast_tiles.choose_tile(8192, 8192, wanted).block_m == 128
        small = contrast_tiles.choose_tile(1024, 1024, wanted)
        assert small.num_tiles(1024, 1024) >= 128
