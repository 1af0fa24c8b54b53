"""Sums over all pairs by the kernels of a GPU, and their gradients, against the float64 reference."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._contrast import Pairs, pair_sums
from pyfeat._gpu import contrast_products, contrast_sums
from tests.support_gpu_contrast import BACKENDS, run_with
from tests.support_triton import (
    DEVICE,
    UNITS,
    TritonOps,
    contrast_tiles,
    masks_of,
    moved,
    triton_sums_kernels,
)

# Rows, columns and features off the tiles of 64 x 64 pairs and 16 or 64 features.
SIZES = [(1, 1, 1), (3, 70, 17), (130, 67, 80)]
CASES = ["plain", "bias", "positives", "separate", "left out", "groups", "kept", "only"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    run_with(request.param, monkeypatch)
    return str(request.param)


# Of tests that look inside the launchers of one backend.
only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


class Found(NamedTuple):
    """Of rows, columns, rows and columns; the largest of rows; gradients by a, b and scale."""

    sums: list[Tensor]
    largest: Tensor
    gradients: list[Tensor]


def pairs_of(case: str, num_rows: int, num_columns: int) -> Pairs:
    row, column = torch.arange(num_rows).int(), torch.arange(num_columns).int()
    bias, ids, groups = torch.randn(num_columns), (row % 5, column % 7), (row % 3, column % 4)
    return {
        "plain": Pairs(),
        "bias": Pairs(bias),
        "positives": Pairs(None, *ids),
        "separate": Pairs(None, row * 2, column, separate_positives=True),
        "left out": Pairs(None, *ids, *groups),
        "groups": Pairs(bias, None, None, *groups),
        "kept": Pairs(bias, *ids, *groups, keep_positives=True, separate_positives=True),
        "only": Pairs(bias, *ids, *groups, only_positives=True),
    }[case]


def features(
    num_rows: int, num_columns: int, dim: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    a, b = torch.randn(num_rows, dim), torch.randn(num_columns, dim)
    return [a.to(dtype), b.to(dtype), torch.tensor(3.0 / dim**0.5)]


def eager_sums(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs) -> Sequence[Tensor]:
    """``reference.pair_sums`` in the dtype of the features; -1e30 stands for -inf."""
    s = scale * (a @ b.T)
    s = s if pairs.column_bias is None else s + pairs.column_bias
    positive, left_out = masks_of(pairs, len(a), len(b))
    powerless = left_out | (positive & pairs.separate_positives)
    counted = s.masked_fill(powerless | (~positive & pairs.only_positives), -1e30)
    positives = s.where(positive, 0.0)
    largest = s.detach().masked_fill(left_out | positive, -1e30).amax(1)
    lse = counted.logsumexp(1), counted.logsumexp(0)
    return (*lse, positives.sum(1), positives.sum(0), largest)


def triton_sums(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs) -> Sequence[Tensor]:
    sums = pair_sums(a.to(DEVICE), b.to(DEVICE), scale.to(DEVICE), moved(pairs), largest=True)
    return [x.cpu() for x in sums]


def reference_sums(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs) -> Sequence[Tensor]:
    return reference.pair_sums(a, b, scale, *pairs)


def found_by(
    sums_of: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    pairs: Pairs,
    weights: Sequence[Tensor],
) -> Found:
    """Sums, and the gradients of their sum with weights; what is -inf does not count."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with TritonOps():
        *sums, largest = sums_of(*leaves, pairs)
        total = torch.zeros((), dtype=torch.float64)
        for x, weight in zip(sums, weights, strict=True):
            total = total + (x.where(x > -1e29, 0.0).double() * weight).sum()
        gradients = torch.autograd.grad(total, leaves)
    return Found([x.detach() for x in sums], largest, list(gradients))


def gradient_by_similarities(
    inputs: Sequence[Tensor], pairs: Pairs, weights: Sequence[Tensor]
) -> Tensor:
    """(L, S) float64."""
    a, b, scale = (x.double() for x in inputs)
    s, one = scale * a @ b.T, torch.ones((), dtype=torch.float64)
    eye = torch.eye(len(b), dtype=torch.float64)
    return found_by(reference_sums, (s, eye, one), pairs, weights).gradients[0]


def assert_right(
    inputs: Sequence[Tensor], pairs: Pairs, found: Found, weights: Sequence[Tensor]
) -> None:
    """Fail unless errors are at most twice those of float32, and of rounding to 16 bits."""
    exact = found_by(reference_sums, [x.double() for x in inputs], pairs, weights)
    eager = found_by(eager_sums, [x.float() for x in inputs], pairs, weights)
    values = zip(
        [*found.sums, found.largest],
        [*exact.sums, exact.largest],
        [*eager.sums, eager.largest],
        strict=True,
    )
    similarity = float((inputs[2].double() * inputs[0].double() @ inputs[1].double().T).abs().max())
    for mine, true, theirs in values:
        assert mine.dtype == torch.float64
        assert torch.equal(mine.isinf(), true.isinf())
        error, torchs = (x.where(true.isfinite(), true) - true for x in (mine, theirs.double()))
        error, torchs = error.nan_to_num(0.0).abs(), torchs.nan_to_num(0.0).abs()
        assert (error <= 2 * torchs.max() + 2.0**-23 * (1 + similarity)).all(), float(error.max())

    g = gradient_by_similarities(inputs, pairs, weights).abs()
    unit, scale = UNITS[inputs[0].dtype], float(inputs[2])
    rounded = [scale * g @ inputs[1].double().abs(), scale * g.T @ inputs[0].double().abs()]
    # Products of D roundings each, as if by chance: the error of one number may be far above torch's.
    sizes = g * (inputs[0].double().abs() @ inputs[1].double().abs().T)
    rounded.append(2.0**-24 * sizes.norm())
    for mine, true, theirs, terms in zip(
        found.gradients, exact.gradients, eager.gradients, rounded, strict=True
    ):
        torchs = (theirs.double() - true).abs().max()
        budget = 2 * torchs + 2.0**-23 * true.abs().max()
        budget = budget + terms if true.ndim == 0 else budget
        if inputs[0].dtype != torch.float32 and true.ndim == 2:
            assert mine.dtype == inputs[0].dtype
            budget = budget + unit * (terms + true.abs()) + 2.0**-24
        error = (mine.double() - true).abs()
        assert (error <= budget).all(), f"{float(error.max()):.2e} {float(true.abs().max()):.2e}"


def check(inputs: Sequence[Tensor], pairs: Pairs, weights: Sequence[Tensor] | None = None) -> Found:
    counts = (len(inputs[0]), len(inputs[1])) * 2
    weights = weights or [torch.randn(count, dtype=torch.float64) for count in counts]
    found = found_by(triton_sums, inputs, pairs, weights)
    assert_right(inputs, pairs, found, weights)
    return found


@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients_are_as_good_as_those_of_torch(case: str) -> None:
    for num_rows, num_columns, dim in SIZES:
        check(features(num_rows, num_columns, dim), pairs_of(case, num_rows, num_columns))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["separate", "kept"])
def test_features_of_16_bits_lose_what_rounding_takes_and_no_more(
    case: str, dtype: torch.dtype
) -> None:
    for num_rows, num_columns, dim in SIZES:
        check(features(num_rows, num_columns, dim, dtype), pairs_of(case, num_rows, num_columns))


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_tiles_do_as_small_ones(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_tiles, "_FEW_TILES", 1)
    check(features(130, 150, 70, dtype), pairs_of("kept", 130, 150))


def test_chunks_and_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_sums, "_PART_BYTES", 4 * 16 * 128)  # two tiles by two
    monkeypatch.setattr(contrast_products, "_BLOCK_SIDE", 128)
    monkeypatch.setattr(contrast_products, "_BLOCK_PAIRS", 128 * 128)
    check(features(150, 330, 20), pairs_of("kept", 150, 330))


def test_only_sums_of_rows_are_taken_where_no_others_are_wanted() -> None:
    a, b, scale = features(40, 70, 20)
    pairs = pairs_of("kept", 40, 70)
    weights = [torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)]

    def of_rows(sums_of: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
        def sums(*inputs: Tensor) -> list[Tensor]:
            lse, _, positives, _, largest = sums_of(*inputs)
            return [lse, positives, largest]

        return sums

    def triton(a: Tensor, b: Tensor, scale: Tensor, said: Pairs) -> Sequence[Tensor]:
        on_device = a.to(DEVICE), b.to(DEVICE), scale.to(DEVICE)
        found = pair_sums(*on_device, moved(said), columns=False)
        assert [len(x) for x in found] == [40, 0, 40, 0, 0]
        return [found.row_lse.cpu(), found.row_positives.cpu(), torch.zeros(0)]

    found = found_by(triton, (a, b, scale), pairs, weights)
    true = found_by(of_rows(reference_sums), (a, b, scale), pairs, weights)
    for mine, exact in zip(found.sums + found.gradients, true.sums + true.gradients, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("num_rows", "chunked"), [(1, True), (2, True), (70, True), (200, True), (330, False)]
)
def test_a_batch_with_itself_is_as_two_equal_batches(
    num_rows: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(contrast_sums, "_PART_BYTES", 4 * 16 * 128)
        monkeypatch.setattr(contrast_products, "_BLOCK_SIDE", 128)
    z, _, scale = features(num_rows, 1, 21)
    ids = torch.arange(num_rows).int()
    classes = ids % 5
    pairs = Pairs(None, classes, classes, ids, ids)
    weights = torch.randn(2, num_rows, dtype=torch.float64)

    def sums_of(kind: Callable[..., Sequence[Tensor]], *options: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (z, scale)]
        with TritonOps():
            lse, positives, largest = kind(*leaves)
            gradients = torch.autograd.grad(
                lse.where(lse.isfinite(), 0.0) @ weights[0] + positives @ weights[1], leaves
            )
        return [x.detach() for x in (lse, positives, largest, *gradients)]

    def triton(x: Tensor, s: Tensor) -> Sequence[Tensor]:
        x, s = x.to(DEVICE), s.to(DEVICE)
        found = pair_sums(x, x, s, moved(pairs), columns=False, largest=True)
        return found.row_lse.cpu(), found.row_positives.cpu(), found.row_largest.cpu()

    def exact(x: Tensor, s: Tensor) -> Sequence[Tensor]:
        return reference.pair_sums(x, x, s, *pairs)[::2]

    for mine, true in zip(sums_of(triton), sums_of(exact), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5, check_dtype=False)


@only_triton
def test_one_tile_of_a_batch_with_itself_has_the_bits_of_two_equal_batches() -> None:
    z = torch.randn(60, 21, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    with TritonOps():
        itself, twice = (pair_sums(z, x, one, Pairs(), columns=False) for x in (z, z.clone()))
    assert torch.equal(itself.row_lse, twice.row_lse)


@only_triton
def test_half_of_the_products_of_a_batch_with_itself_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = triton_sums_kernels._pair_sums_kernel
    programs: list[int] = []

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> object:
            programs.extend(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_sums_kernels, "_pair_sums_kernel", Counted())
    z = torch.randn(500, 4, device=DEVICE)
    with TritonOps():
        pair_sums(z, z, torch.ones((), device=DEVICE), Pairs(), columns=False)
        assert sum(programs) == 8 * 9 // 2  # of 8 x 8 tiles
        monkeypatch.setattr(contrast_sums, "_PART_BYTES", 4 * 16 * 128)
        programs.clear()
        pair_sums(z, z, torch.ones((), device=DEVICE), Pairs(), columns=False)
    assert sum(programs) == 8 * 9 // 2


# Traps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_with_nothing_that_counts_are_empty_and_get_no_gradient(dtype: torch.dtype) -> None:
    a, b, scale = features(70, 66, 9, dtype)
    ids = torch.zeros(70, dtype=torch.int32), torch.arange(66).int() % 2
    found = check([a, b, 100.0 * scale], Pairs(None, None, None, *ids))
    assert found.sums[1][::2].isinf().all()
    assert (found.gradients[1][::2] == 0).all()
    nothing = check([a, b, scale], Pairs(None, None, None, ids[0], torch.zeros_like(ids[1])))
    assert all((x == 0).all() for x in nothing.gradients)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("cosine", ["one", "small"])
def test_a_scale_of_100_neither_overflows_nor_vanishes(cosine: str, dtype: torch.dtype) -> None:
    a = torch.eye(70, 100) if cosine == "small" else torch.ones(70, 100) / 10.0
    b = a.roll(30, 1) if cosine == "small" else a
    noise = [0.001 * torch.randn(70, 100) for _ in range(2)]
    inputs = [(a + noise[0]).to(dtype), (b + noise[1]).to(dtype), torch.tensor(100.0)]
    ids = torch.arange(70).int()
    check(inputs, Pairs(None, ids, ids, separate_positives=True))
    check(inputs, Pairs(None, ids, ids))


def test_what_fills_up_a_tile_does_not_overflow() -> None:
    # All similarities are -700: a power of 0 relative to that would be infinite.
    inputs = [torch.full((13, 2), 1.0), torch.full((35, 2), -1.0), torch.tensor(350.0)]
    found = check(inputs, Pairs(), [torch.ones(n, dtype=torch.float64) for n in (13, 35) * 2])
    assert all((gradient != 0).all() for gradient in found.gradients)


@pytest.mark.parametrize("upstream", [65536.0, 2.0**-8])
def test_gradients_of_float16_keep_their_digits_at_any_size(upstream: float) -> None:
    a, b, scale = features(65, 70, 20, torch.float16)
    weights = [upstream / 65 * torch.rand(n, dtype=torch.float64) for n in (65, 70, 65, 70)]
    ids = torch.arange(65).int(), torch.arange(70).int()
    found = check([a, b / 64, scale], Pairs(None, *ids, separate_positives=True), weights)
    assert found.gradients[0].isfinite().all()
    assert (found.gradients[0] != 0).any()


def test_the_gradient_by_the_scale_is_taken_before_gradients_are_rounded() -> None:
    a, b, scale = features(100, 100, 32, torch.float16)
    a, b = a + 4.0, b + 4.0  # a direction in common, that cancels
    ids = torch.arange(100).int()
    found = check([a, b, scale / 40], Pairs(None, ids, ids))
    assert found.gradients[2].isfinite()


def test_two_runs_give_equal_bits() -> None:
    inputs = features(150, 130, 40)
    pairs = pairs_of("kept", 150, 130)
    weights = [torch.rand(n, dtype=torch.float64) for n in (150, 130, 150, 130)]
    first, second = (found_by(triton_sums, inputs, pairs, weights) for _ in range(2))
    for mine, other in zip(
        [*first.sums, first.largest, *first.gradients],
        [*second.sums, second.largest, *second.gradients],
        strict=True,
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (4, 5, 0)])
def test_empty_batches_have_sums(shape: tuple[int, int, int]) -> None:
    num_rows, num_columns, dim = shape
    inputs = [torch.randn(num_rows, dim), torch.randn(num_columns, dim), torch.tensor(2.0)]
    weights = [torch.ones(n, dtype=torch.float64) for n in (num_rows, num_columns) * 2]
    found = found_by(triton_sums, inputs, Pairs(), weights)
    exact = found_by(reference_sums, [x.double() for x in inputs], Pairs(), weights)
    for mine, true in zip(
        [*found.sums, found.largest, *found.gradients],
        [*exact.sums, exact.largest, *exact.gradients],
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), true)


def test_strides_do_not_matter() -> None:
    a, b, scale = (
        torch.randn(40, 2, 70)[:, 1].T,
        torch.randn(66, 100)[:, 10:90:2],
        torch.tensor(0.5),
    )
    bias = torch.randn(132)[::2]
    ids = torch.arange(140)[::2].int() % 3, torch.arange(66).int() % 4
    check([a, b, scale], Pairs(bias, *ids))
    one = torch.ones((), dtype=torch.float64)
    check([a, b, scale], Pairs(bias, *ids), [one.expand(n) for n in (70, 66, 70, 66)])


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_features_that_would_overflow_are_refused(scale: float) -> None:
    a, b = torch.full((3, 4), 1e30), torch.full((2, 4), 1e30)
    with pytest.raises(ValueError, match=r"pair_sums: scale \|a\| \|b\| must be at most 1e\+36"):
        triton_refuses(a, b, scale)
    a[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"pair_sums: .*, got nan"):
        triton_refuses(a, b / 1e20, scale)


def triton_refuses(a: Tensor, b: Tensor, scale: float) -> None:
    with TritonOps():
        triton_sums(a, b, torch.tensor(scale), Pairs())
