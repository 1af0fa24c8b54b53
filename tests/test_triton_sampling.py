"""What is particular to the Triton kernels of deformable attention; see test_gpu_sampling.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support_attention import SHAPES, make_inputs
from tests.support_sampling import Kernels, kernels_of
from tests.support_triton import sampling, sampling_arguments, sampling_gradient


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Several programs a head, and several reads of logits, for few queries and points."""
    monkeypatch.setattr(sampling_arguments, "_SMALL_ELEMENTS", 64)
    monkeypatch.setattr(sampling, "BLOCK_T", 2)
    monkeypatch.setattr(sampling_gradient, "BLOCK_T", 2)
    return kernels_of("triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes", [[(5, 6), (0, 3), (2, 3)], [(3, 3, 3), (1, 2, 1)]], ids=["2-D", "3-D"]
)
def test_queries_that_are_cells_give_the_same_bits_in_any_order(
    kernels: Kernels, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_cells = sum(math.prod(shape) for shape in shapes)
    inputs = make_inputs(shapes, batch=1, queries=num_cells, heads=1, num_points=1)
    inputs = inputs.to(torch.float32)
    grad_output = torch.randn(1, num_cells, 4)
    tiled = kernels.all(inputs, grad_output)
    blocks = sampling_arguments.QueryBlocks.of

    def plain(given: Any) -> Any:
        made = blocks(given)
        assert made.tiled
        count = -(-num_cells // made.block_q)
        assert made.count > count  # tiles reach over edges
        return sampling_arguments.QueryBlocks(
            made.block_q, made.block_d, made.num_warps, made.tile, False, count
        )

    monkeypatch.setattr(sampling_arguments.QueryBlocks, "of", plain)
    in_order = kernels.all(inputs, grad_output)
    for a, b in zip(tiled, in_order, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("block_q", "ndim", "tile"),
    [(32, 2, (1, 4, 8)), (1, 2, (1, 1, 1)), (4, 3, (1, 2, 2)), (128, 3, (4, 4, 8))],
)
def test_blocks_of_cells_are_near_cubes(
    block_q: int, ndim: int, tile: tuple[int, int, int]
) -> None:
    assert sampling_arguments._tile(block_q, ndim) == tile


@pytest.mark.slow
def test_offsets_beyond_32_bits_give_the_same_bits(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(SHAPES[3], batch=1, queries=5, heads=1).to(torch.float32)
    grad_output = torch.randn(1, 5, 4)
    narrow = kernels.all(inputs, grad_output)
    monkeypatch.setattr(sampling_arguments.Sampling, "is_wide", True)
    wide = kernels.all(inputs, grad_output)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize(("cells", "stride", "wide"), [(2**20, 2**10, False), (2**21, 2**10, True)])
def test_offsets_are_wide_where_values_pass_32_bits(cells: int, stride: int, wide: bool) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    # Values may be an expanded tensor of few elements: their gradient is not.
    value = empty(1, 1, stride // 4, 4).expand(1, cells, stride // 4, 4)
    inputs = (value, ((cells,),), (1,), empty(1, 1, 8, 1, 1), empty(1, 1, 8, 1))
    assert sampling_arguments.Sampling(*inputs, *[False] * 4).is_wide == wide


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1 << 24, 0), 1), ((0, 1 << 24), 1), ((2, 2), 1 << 15), ((1 << 16, 0, 1), 1)],
)
def test_a_level_that_is_too_large_is_refused(shape: tuple[int, ...], count: int) -> None:
    locations = torch.zeros(1, 1, 1, 1, len(shape))
    value = torch.zeros(1, 4, 1, 1)
    given = (value, (shape,), (count,), locations, locations[..., 0], *[False] * 4)
    with pytest.raises(ValueError, match="deform_attn: spatial_shapes must have sizes below 2"):
        sampling_arguments.Sampling(*given).levels()


def test_terms_of_one_cell_are_added_in_one_order(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs([(2,)], batch=1, queries=40, heads=1, dim=2, num_points=3)
    inputs = inputs.to(torch.float32)
    grad_output = torch.randn(1, 40, 2) * torch.logspace(-6, 6, 40)[None, :, None]
    first = kernels.gradients(inputs, grad_output, (True, False, False))[0]
    # A GPU may sort equal cells in another order in every run if it is not told to be stable.
    sort, stable = Tensor.sort, []

    def recorded(self: Tensor, **options: Any) -> Any:
        stable.append(options["stable"])
        return sort(self, **options)

    monkeypatch.setattr(Tensor, "sort", recorded)
    again = kernels.gradients(inputs, grad_output, (True, False, False))[0]
    assert stable == [True]
    assert torch.equal(first, again)
