"""Pairs, sums and comparisons for the tests of the kernels behind the losses."""

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import as_matrix
from pyfeat._contrast_cpu import KeptPairs
from pyfeat._pairs import Pairs

SIZES = [(1, 1, 1), (5, 33, 7), (97, 31, 40), (130, 481, 33), (300, 129, 257)]
CASES = {
    "plain": Pairs(),
    "bias": Pairs(torch.randn(600)),
    "positives": Pairs(None, torch.arange(600) % 13, torch.arange(600) % 17),
    "separate positives": Pairs(
        None, torch.arange(600), torch.arange(600).flip(0) % 450, separate_positives=True
    ),
    "left out": Pairs(
        None,
        torch.arange(600) % 5,
        torch.arange(600) % 7,
        torch.arange(600) % 11,
        torch.arange(600) % 11,
    ),
    "kept": Pairs(
        torch.randn(600),
        torch.arange(600) % 5,
        torch.arange(600) % 7,
        torch.arange(600) % 3,
        torch.arange(600) % 4,
        keep_positives=True,
    ),
    "only positives": Pairs(
        None, torch.arange(600) % 5, torch.arange(600) % 4, only_positives=True
    ),
}


def cut(pairs: Pairs, num_rows: int, num_columns: int) -> Pairs:
    """For so many rows and columns."""
    bias, *ids = pairs[:5]
    counts = (num_rows, num_columns, num_rows, num_columns)
    kept = [None if x is None else x[:count].int() for x, count in zip(ids, counts, strict=True)]
    return pairs._replace(
        column_bias=None if bias is None else bias[:num_columns],
        row_ids=kept[0],
        column_ids=kept[1],
        row_groups=kept[2],
        column_groups=kept[3],
    )


def own_pairs(num_rows: int, classes: int) -> Pairs:
    ids = torch.arange(num_rows, dtype=torch.int32)
    classes_of = ids % classes
    return Pairs(None, classes_of, classes_of, ids, ids)


def sums_of(a: Tensor, b: Tensor, scale: float, pairs: Pairs, isa: str) -> list[Tensor]:
    sums = [torch.full((len(x),), float("nan"), dtype=torch.float64) for x in (a, b, a, b, a)]
    row_lse, column_lse, row_positives, column_positives, row_largest = (x.data_ptr() for x in sums)
    _C.log_sum_exp_cpu(
        as_matrix(a),
        as_matrix(b),
        scale,
        _C.Dtype.float32,
        row_lse,
        column_lse,
        2,
        isa,
        KeptPairs(pairs).terms,
        row_positives,
        column_positives,
        row_largest,
    )
    return sums


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


def assert_near(ours: Tensor, true: Tensor, terms: float = 0.0) -> None:
    """Up to rounding in float32, relative to the largest element or to terms that cancel."""
    largest = max(float(true.detach().abs().max()) if true.numel() else 0.0, terms)
    torch.testing.assert_close(
        ours.detach().double(), true.detach().double(), rtol=2e-5, atol=2e-5 * largest + 1e-30
    )
