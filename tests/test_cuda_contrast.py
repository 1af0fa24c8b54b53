"""What only the CUDA kernels of losses have: two kinds of tiles, a diagonal, and an order of threads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._gpu import contrast
from pyfeat._pairs import Pairs, WeightedSide
from tests.support_cuda import DEVICE, EMULATION
from tests.support_gpu_contrast import kernels_of

KERNELS = kernels_of("cuda")
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])

pytestmark = pytest.mark.skipif(EMULATION is None, reason="other devices are emulated")


def emulated(**device: Any) -> Any:
    assert EMULATION is not None
    return EMULATION.device(**device)


def sums_and_gradients(a: Tensor, b: Tensor, pairs: Pairs, *, itself: bool) -> list[Tensor]:
    scale = torch.tensor(0.3, device=DEVICE)
    inputs = (a.to(DEVICE), (a if itself else b).to(DEVICE), scale)
    if itself:
        inputs = (inputs[0], inputs[0], scale)
    sums = contrast.pair_sums(KERNELS, *inputs, pairs, columns=not itself, itself=itself)
    ones = [torch.ones_like(x) for x in sums[:2]]
    rows = WeightedSide(sums.row_lse, ones[0], -ones[0])
    columns = None if itself else WeightedSide(sums.column_lse, ones[1], -ones[1])
    wanted = contrast.Wanted(True, not itself, itself)
    gradients = contrast.pair_gradients(KERNELS, *inputs, pairs, rows, columns, wanted)
    return [*sums[:4], *gradients]


@CAPABILITIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [130, 390])
def test_a_batch_with_itself_is_right_on_every_tile(
    num_rows: int, dtype: torch.dtype, capability: int
) -> None:
    z = torch.randn(num_rows, 20).to(dtype)
    ids = torch.arange(num_rows).int()
    classes = ids % 5
    pairs = Pairs(None, classes, classes, ids, ids)
    with emulated(capability=capability):
        found = sums_and_gradients(z, z, pairs, itself=True)
    wide = z.double().requires_grad_()
    sums = reference.pair_sums(wide, wide, torch.tensor(0.3).double(), *pairs)
    torch.testing.assert_close(found[0], sums[0].detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[2], sums[2].detach(), rtol=1e-6, atol=1e-4)
    exact = torch.autograd.grad(sums[0].sum() - sums[2].sum(), wide)[0]
    size = float(exact.abs().max())
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(found[4].double(), exact, rtol=unit, atol=unit * size)


_ROWS, _COLUMNS = torch.arange(140).int(), torch.arange(300).int()
# Positive pairs and those that are left out lie in every group of columns, or in few of them: all others
# are plain, but for those of rows and columns that are not there.
SAID = {
    "everywhere": Pairs(None, _ROWS % 7, _COLUMNS % 9),
    "in few groups": Pairs(torch.randn(300), _ROWS, _COLUMNS, _ROWS // 3, (_COLUMNS + 70) // 3),
    "kept": Pairs(None, _ROWS, _COLUMNS, _ROWS // 5, _COLUMNS // 5, keep_positives=True),
    "nowhere": Pairs(torch.randn(300)),
    "alone": Pairs(None, _ROWS, 139 - _COLUMNS % 140, only_positives=True),
}


@CAPABILITIES
@pytest.mark.parametrize("said", SAID)
def test_bfloat16_is_right_on_every_tile(said: str, capability: int) -> None:
    a, b = torch.randn(140, 70).bfloat16(), torch.randn(300, 70).bfloat16()
    pairs = SAID[said]
    with emulated(capability=capability):
        found = sums_and_gradients(a, b, pairs, itself=False)
    wide = a.double().requires_grad_(), b.double().requires_grad_()
    sums = reference.pair_sums(wide[0], wide[1], torch.tensor(0.3).double(), *pairs)
    for mine, true in zip(found[:4], sums[:4], strict=True):
        torch.testing.assert_close(mine, true.detach(), rtol=1e-6, atol=1e-5)
    total = sums[0].sum() + sums[1].sum() - sums[2].sum() - sums[3].sum()
    for mine, true in zip(found[4:6], torch.autograd.grad(total, wide), strict=True):
        atol = 2.0**-8 * float(true.abs().max())
        torch.testing.assert_close(mine.double(), true, rtol=2.0**-7, atol=atol)


@CAPABILITIES
def test_bits_do_not_depend_on_the_order_of_threads(capability: int) -> None:
    a, b = torch.randn(140, 30).bfloat16(), torch.randn(400, 30).bfloat16()
    pairs = Pairs(torch.randn(400), torch.arange(140).int(), torch.arange(400).int())
    runs = []
    for device in ({}, {"backwards": True}):
        with emulated(capability=capability, **device):
            runs.append(sums_and_gradients(a, b, pairs, itself=False))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("num_rows", [1, 128, 129, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_packed_matrix_has_a_panel_to_spare_and_zeros_where_it_has_no_values(
    num_rows: int, dtype: torch.dtype
) -> None:
    features = torch.rand(num_rows, 3, device=DEVICE).to(dtype) + 1
    panels = KERNELS.packed(features)
    whole = panels.as_strided((-(-num_rows // 128) * 128 + 128, panels.shape[1]), panels.stride())
    assert int((whole != 0).sum()) == 3 * num_rows
    torch.testing.assert_close(whole.double().sum(), features.double().sum())


def test_float64_features_are_refused() -> None:
    with pytest.raises(ValueError, match="pack_features: features must have 32 or 16 bits"):
        KERNELS.packed(torch.zeros(3, 4, dtype=torch.float64, device=DEVICE))
