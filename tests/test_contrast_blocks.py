"""Sums over pairs by blocks in plain torch: float64 features, and memory."""

import functools
import itertools
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pyfeat import _contrast, _contrast_blocks, reference
from pyfeat._contrast import Pairs, WeightedSide, pair_sums
from pyfeat._contrast_second import second_gradients
from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss
from tests.support_losses import LargestTensor

# The last are off the block of 1,024 rows and columns, or meet blocks of other shapes.
SIZES = [(1, 1), (3, 5), (40, 7), (0, 4), (4, 0), (1030, 3), (3, 1100)]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(count: int, different: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32) % different


def kinds_of_pairs(num_rows: int, num_columns: int) -> list[Pairs]:
    """With all options, positives kept and separate or not."""
    positive = ids(num_rows, 5), ids(num_columns, 7)
    groups = ids(num_rows, 3), ids(num_columns, 4)
    kinds = [Pairs(), Pairs(torch.randn(num_columns))]
    for keep, separate in itertools.product((False, True), repeat=2):
        kinds += [
            Pairs(None, *positive, *groups, keep, separate, not separate),
            Pairs(torch.randn(num_columns), *positive, *groups, keep, separate),
            Pairs(None, *positive, None, None, keep, separate),
            Pairs(None, None, None, *groups, keep, separate),
        ]
    kinds.append(Pairs(only_positives=True))
    return [*kinds, Pairs(None, None, None, ids(num_rows, 1), ids(num_columns, 1))]


def finite(sums: Sequence[Tensor]) -> list[Tensor]:
    """What has a gradient: 0 in place of log-sum-exps over nothing."""
    return [x.where(x.isfinite(), 0.0) for x in sums if x.requires_grad and len(x)]


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize(("num_rows", "num_columns"), SIZES)
def test_sums_and_gradients_of_float64_features_are_those_of_the_reference(
    num_rows: int, num_columns: int, columns: bool
) -> None:
    inputs = random(num_rows, 6), random(num_columns, 6), torch.tensor(1.5).double()
    every = 4 if num_rows * num_columns > 1000 else 1
    for pairs in kinds_of_pairs(num_rows, num_columns)[::every]:
        a, b, scale = (x.clone().requires_grad_() for x in inputs)
        found = list(pair_sums(a, b, scale, pairs, columns=columns, largest=True))
        exact = list(reference.pair_sums(a, b, scale, *pairs))
        if not columns:
            assert all(x.shape == (0,) for x in found[1:4:2])
            found, exact = found[::2], exact[::2]
        for mine, true in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-13, atol=1e-12)
        if num_rows * num_columns == 0:
            for gradient in torch.autograd.grad(
                [x.sum() for x in found if x.requires_grad], (a, b, scale)
            ):
                assert (gradient == 0).all()
            continue
        weights = [torch.randn_like(x) for x in finite(exact)]
        for mine, true in zip(
            torch.autograd.grad(finite(found), (a, b, scale), weights),
            torch.autograd.grad(finite(exact), (a, b, scale), weights),
            strict=True,
        ):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
def test_both_derivatives_of_the_op_are_right(
    columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_contrast_blocks, "SIDE", 4)
    leaves = random(6, 2), random(7, 2), torch.tensor(1.3).double()
    for leaf in leaves:
        leaf.requires_grad_()
    for pairs in kinds_of_pairs(6, 7):

        def sums(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs = pairs) -> list[Tensor]:
            return finite(pair_sums(a, b, scale, pairs, columns=columns))

        assert torch.autograd.gradcheck(sums, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(sums, leaves, fast_mode=True)


def test_both_derivatives_of_a_batch_with_itself_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_contrast_blocks, "SIDE", 4)
    z, scale = random(6, 2).requires_grad_(), torch.tensor(1.3).double().requires_grad_()
    labels, places = ids(6, 3), ids(6, 6)
    pairs = Pairs(None, labels, labels, places, places)

    def sums(z: Tensor, scale: Tensor) -> list[Tensor]:
        return finite(pair_sums(z, z, scale, pairs, columns=False))

    assert torch.autograd.gradcheck(sums, (z, scale))
    assert torch.autograd.gradgradcheck(sums, (z, scale))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda a, b, s, **o: info_nce(a, b, temperature=1.0 / s, normalize=True, **o),
    "clip_loss": clip_loss,
    "captions": lambda a, b, s, **o: clip_loss(
        a, b, s, image_ids=torch.arange(5) // 2, text_ids=torch.arange(5) % 3, **o
    ),
    "supcon_loss": lambda a, b, s, **o: supcon_loss(
        torch.cat([a, b]), torch.arange(10) % 4, temperature=1.0 / s, **o
    ),
    "nt_xent": lambda a, b, s, **o: nt_xent(a, b, temperature=1.0 / s, **o),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_pass_the_gradient_checks_of_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_contrast_blocks, "SIDE", 4)
    loss = functools.partial(LOSSES[name], reduction="none")
    inputs = [random(5, 2), random(5, 2), torch.tensor(1.3).double()]
    leaves = tuple(x.requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_losses_of_float64_features_are_float64() -> None:
    a, b = random(30, 8).requires_grad_(), random(30, 8)
    for name in ("info_nce", "clip_loss", "nt_xent"):
        scale = torch.tensor(2.0, requires_grad=True)
        loss = LOSSES[name](a, b, scale)
        exact = LOSSES[name](a, b, scale.double(), backend="reference")
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, exact, rtol=1e-14, atol=0.0)
        gradients = torch.autograd.grad(loss, (a, scale))
        assert [x.dtype for x in gradients] == [torch.float64, torch.float32]


def test_strided_float64_features_are_read_as_they_are() -> None:
    wide = random(40, 16).T[:, ::2]
    expected = clip_loss(wide.contiguous(), wide.flip(0).contiguous(), 0.3)
    assert clip_loss(wide, wide.flip(0), 0.3) == expected


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_is_not_multiplied_with_fewer_digits(precision: str) -> None:
    features = torch.randn(2, 2)
    assert _contrast_blocks.product_dtype(features) == torch.float32
    torch.set_float32_matmul_precision(precision)
    try:
        assert _contrast_blocks.product_dtype(features) == torch.float64
    finally:
        torch.set_float32_matmul_precision("highest")
    assert _contrast_blocks.product_dtype(features) == torch.float32


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, "1e+300"), (torch.float32, "1e+36")])
def test_similarities_that_would_overflow_are_refused(dtype: torch.dtype, limit: str) -> None:
    a = torch.full((3, 1), 2e6, dtype=dtype)
    scale = torch.tensor(float(limit) / 1e12, dtype=torch.float64)
    message = f"pair_sums: scale |a| |b| must be at most {limit} for the longest rows, got 4e+"
    with pytest.raises(ValueError, match=re.escape(message)):
        _contrast_blocks.sums(a, a, scale, Pairs(), columns=True, largest=False)


def test_no_tensor_of_all_pairs_exists() -> None:
    count, scale = 3000, torch.tensor(5.0).double()
    a, b = random(count, 4), random(count, 4)
    columns = torch.arange(count, dtype=torch.int32)
    pairs = Pairs(torch.randn(count), columns, columns, columns // 2, columns // 2, True, True)
    block = _contrast_blocks.SIDE**2
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        sums = _contrast_blocks.sums(a, b, scale, pairs, columns=True, largest=True)
        sides = {
            1 - i: WeightedSide(sums[i], torch.randn(count), torch.randn(count)) for i in (0, 1)
        }
        _contrast_blocks.gradients(a, b, scale, pairs, sides)
        second_gradients(a, b, scale, pairs, sides, (a.flip(0), b.flip(0), scale))
    assert largest.elements == block


def test_no_tensor_of_all_pairs_passes_between_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contrast, "_memory_budget", 0)
    a, b = torch.randn(300, 4).requires_grad_(), torch.randn(300, 4)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        loss = clip_loss(a, b, 5.0, normalize=True) + nt_xent(a, b, normalize=True)
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), a)
    assert largest.elements <= 600 * 4
