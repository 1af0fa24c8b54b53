"""Memory of the kernels behind the losses: tiles that are kept, and what calls share."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import dtype_name
from pyfeat._contrast import memory_budget, pair_sums, set_memory_budget
from pyfeat._contrast_cpu import kept_panels
from pyfeat._pairs import Pairs
from pyfeat._softplus import pair_softplus
from tests.support_contrast import own_pairs

# Tiles that are kept


@pytest.mark.parametrize("itself", [False, True], ids=["two", "itself"])
@pytest.mark.parametrize("num_bytes", [0, 400_000, 1 << 30], ids=["none", "some", "all"])
def test_gradients_have_the_same_bits_from_tiles_that_were_kept(
    num_bytes: int, itself: bool
) -> None:
    a, b = torch.randn(301, 40), torch.randn(450, 40)
    panels, _ = kept_panels(301, 301 if itself else 450, torch.float32, num_bytes)
    assert (panels == 0) == (num_bytes == 0)
    before, gradients = memory_budget(), []
    try:
        for budget in (0, num_bytes):
            set_memory_budget(budget)
            leaves = [x.clone().requires_grad_() for x in (a, b, torch.tensor(0.2))]
            other = leaves[0] if itself else leaves[1]
            pairs = own_pairs(301, 9) if itself else Pairs(torch.linspace(-1, 1, 450))
            sums = pair_sums(leaves[0], other, leaves[2], pairs, columns=not itself)
            total = sums.row_lse.sum() + sums.column_lse.square().sum()
            gradients.append(torch.autograd.grad(total, leaves, allow_unused=True))
    finally:
        set_memory_budget(before)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_beyond_the_budget(dtype: torch.dtype) -> None:
    height, width = _C.tile_shape(getattr(_C.Dtype, dtype_name(dtype)))
    panel = 4 * height * width * -(-1000 // width)
    panels = -(-1000 // height)
    assert kept_panels(1000, 1000, dtype, panels * panel) == (panels, panels * panel // 4)
    assert kept_panels(1000, 1000, dtype, panels * panel - 1)[0] == panels - 1
    half = -(-panels // 2)
    assert kept_panels(1000, 1000, dtype, half * panel)[0] == half
    assert kept_panels(1000, 1000, dtype, half * panel - 1)[0] == (half - 1) // 4
    assert kept_panels(1000, 1000, dtype, 12 * panel - 1)[0] == 2
    assert kept_panels(0, 1000, dtype, 1 << 30) == (0, 0)
    assert kept_panels(1000, 0, dtype, 1 << 30) == (0, 0)
    with pytest.raises(ValueError, match="set_memory_budget: num_bytes must be at least 0, got -1"):
        set_memory_budget(-1)


# Memory that calls share


def gradients_of(dim: int, count: int = 130) -> tuple[Tensor, ...]:
    """Of features of width 64, and zeros up to ``dim``, with the gradients of a sum."""
    random = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, 64, generator=random) for _ in range(2))
    leaves = [F.pad(x, (0, dim - 64)).requires_grad_() for x in (a, b)]
    scale, bias = torch.tensor(0.1), torch.tensor(-1.0)
    sums = pair_sums(leaves[0], leaves[1], scale, Pairs())
    total = sums.row_lse.sum() + sums.column_lse.sum()
    total = total + pair_softplus(leaves[0], leaves[1], scale, bias, Pairs()).sum()
    return tuple(x[:, :64] for x in torch.autograd.grad(total, leaves))


def test_gradients_are_the_same_whether_or_not_their_rows_fill_panels() -> None:
    # Those of whole panels are summed where they are returned, others in memory of their own.
    for filled, other in zip(gradients_of(64), gradients_of(65), strict=True):
        assert torch.equal(filled, other)


def test_memory_of_earlier_calls_does_not_show() -> None:
    counts = (130, 700, 129, 40, 131)
    first = [gradients_of(65, count) for count in counts]
    for count, expected in zip(reversed(counts), reversed(first), strict=True):
        for mine, before in zip(gradients_of(65, count), expected, strict=True):
            assert torch.equal(mine, before)


def test_similarities_kept_by_two_calls_are_apart() -> None:
    a, b, c = (torch.randn(300, 8) for _ in range(3))

    def loss(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        return leaf, pair_sums(leaf, y, torch.tensor(0.7), Pairs()).row_lse.sum()

    def gradient(leaf: Tensor, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf)[0]

    alone = gradient(*loss(a, b))
    first, second = loss(a, b), loss(b, c)
    gradient(*second)
    assert torch.equal(gradient(*first), alone)


def test_memory_of_kept_similarities_is_used_again_until_it_is_forgotten() -> None:
    def floats(count: int) -> Tensor:
        return torch.frombuffer(_C.ReusedFloats(count), dtype=torch.float32)

    _C.ReusedFloats.forget()
    kept = floats(1 << 22)
    address = kept.data_ptr()
    beside = floats(1 << 22)
    assert beside.data_ptr() != address
    del kept
    again = floats(3 << 20)
    assert again.data_ptr() == address
    again.fill_(1.0)
    assert again.sum() == 3 << 20
