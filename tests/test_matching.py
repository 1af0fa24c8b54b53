"""Matches against their dense definitions."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import reference
from pyfeat.matching import Matches
from pyfeat.search import METRICS, Metric

SIZES = (1, 2, 31, 33, 257)
METHODS: list[dict[str, Any]] = [
    {"method": "mutual"},
    {"method": "ratio"},
    {"method": "ratio", "mutual": True},
    {"method": "dual_softmax", "threshold": 0.01},
]
NAMES = ["mutual", "ratio", "mutual ratio", "dual softmax"]
every_method = pytest.mark.parametrize("options", METHODS, ids=NAMES)


def _pairs(num_a: int, num_b: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit vectors of which about half have a noisy copy on the other side."""
    a, b = torch.randn(num_a, dim), torch.randn(num_b, dim)
    num_common = min(num_a, num_b) // 2
    copied = torch.randperm(num_a)[:num_common]
    b[torch.randperm(num_b)[:num_common]] = a[copied] + 0.3 * torch.randn(num_common, dim)
    return torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)


def _assert_same(found: Matches, expected: tuple[Tensor, ...], tolerance: float = 1e-6) -> None:
    assert torch.equal(found.indices_a, expected[0])
    assert torch.equal(found.indices_b, expected[1])
    assert torch.allclose(found.scores.double(), expected[2].double(), rtol=tolerance, atol=1e-12)


@every_method
@pytest.mark.parametrize("num_a", SIZES)
@pytest.mark.parametrize("num_b", SIZES)
def test_matches_are_those_of_the_dense_definition(
    num_a: int, num_b: int, options: dict[str, Any]
) -> None:
    for dim in (5, 33):
        a, b = _pairs(num_a, num_b, dim)
        found = pyfeat.match(a, b, **options)
        # The stated share of 1 % is never reached by far.
        _assert_same(found, reference.match(a, b, **options), tolerance=3e-5)
        assert (found.indices_a.diff() > 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_mutual_matches_take_every_metric(metric: Metric, shift: float) -> None:
    a, b = (8 * x for x in _pairs(300, 200, 24))
    found = pyfeat.match(a + shift, b + shift, metric=metric)
    _assert_same(found, reference.match(a + shift, b + shift, "mutual", metric=metric))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 1.0])
def test_ratio_matches_take_every_distance(metric: Metric, mutual: bool, ratio: float) -> None:
    a, b = _pairs(300, 200, 24)
    options: dict[str, Any] = {"method": "ratio", "metric": metric, "ratio": ratio}
    found = pyfeat.match(a, b, mutual=mutual, **options)
    _assert_same(found, reference.match(a, b, mutual=mutual, **options))
    assert len(found.scores) >= 20
    assert (found.scores < ratio).all()


@pytest.mark.parametrize("temperature", [0.003, 0.02, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
def test_dual_softmax_takes_every_temperature(temperature: float, threshold: float) -> None:
    a, b = _pairs(400, 300, 48)
    options: dict[str, Any] = {"temperature": temperature, "threshold": threshold}
    found = pyfeat.match(a, b, method="dual_softmax", **options)
    expected = reference.match(a, b, "dual_softmax", **options)
    _assert_same(found, expected, tolerance=1e-5 / temperature)


def test_dual_softmax_scores_are_the_product_of_two_softmaxes() -> None:
    a, b = _pairs(50, 60, 16)
    s = (a @ b.T).double() / 0.1
    p = s.softmax(dim=0) * s.softmax(dim=1)
    found = pyfeat.match(a, b, method="dual_softmax", threshold=0.05)
    assert len(found.scores) > 10
    assert torch.allclose(p[found.indices_a, found.indices_b], found.scores.double(), rtol=1e-5)
    largest = (p == p.amax(dim=1, keepdim=True)) & (p == p.amax(dim=0)) & (p >= 0.05)
    assert torch.equal(largest.nonzero(), torch.stack(found[:2], dim=1))


def test_lowe_ratios_are_of_the_nearest_to_the_second_nearest() -> None:
    a, b = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [-4.0], [13.0], [7.0]])
    found = pyfeat.match(a, b, method="ratio")
    assert found.indices_a.tolist() == [0]  # the two at distance 3 from 10 are no match
    assert found.indices_b.tolist() == [0]
    assert found.scores.tolist() == [0.25]
    assert len(pyfeat.match(a, b, method="ratio", ratio=0.25).scores) == 0  # strictly less


def test_the_only_row_passes_the_ratio_test_and_equal_ones_do_not() -> None:
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = pyfeat.match(a, a[:1], method="ratio")
    assert found.indices_a.tolist() == [0, 1]
    assert found.indices_b.tolist() == [0, 0]
    assert found.scores.tolist() == [0.0, 0.0]
    assert len(pyfeat.match(a[:1], a[:1], method="ratio", mutual=True).scores) == 1
    assert len(pyfeat.match(a, a[[0, 0]], method="ratio", ratio=1.0).scores) == 0


def test_mutual_ratio_matches_pass_both_ways_and_score_the_larger_ratio() -> None:
    a, b = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [-10.0]])
    # From a: 1 / 10 to b0, and 2 / 13. From b0: 1 / 2 to a0.
    one_way = pyfeat.match(a, b, method="ratio", ratio=0.6)
    assert one_way.indices_a.tolist() == [0, 1]
    both = pyfeat.match(a, b, method="ratio", ratio=0.6, mutual=True)
    assert both.indices_a.tolist() == [0]
    assert both.scores.tolist() == [0.5]
    assert len(pyfeat.match(a, b, method="ratio", ratio=0.4, mutual=True).scores) == 0


@pytest.mark.parametrize("method", ["mutual", "dual_softmax"])
def test_equal_rows_match_at_their_lowest_index_on_both_sides(method: str) -> None:
    share = 1.0 if method == "mutual" else 1 / 6  # of P, with 2 and 3 copies
    options: dict[str, Any] = {"method": method}
    a, b = _pairs(120, 100, 24)
    plain = pyfeat.match(a, b, **options)
    assert len(plain.scores) > 30
    order_a, order_b = torch.randperm(240) % 120, torch.randperm(300) % 100
    if method == "dual_softmax":
        options["threshold"] = 0.2 * share
    found = pyfeat.match(a[order_a], b[order_b], **options)
    first_a = torch.tensor([int((order_a == i).nonzero()[0]) for i in plain.indices_a])
    first_b = torch.tensor([int((order_b == j).nonzero()[0]) for j in plain.indices_b])
    order = first_a.argsort()
    assert torch.equal(found.indices_a, first_a[order])
    assert torch.equal(found.indices_b, first_b[order])
    assert torch.allclose(found.scores, plain.scores[order] * share, rtol=1e-5)


@pytest.mark.parametrize("options", METHODS[:3], ids=NAMES[:3])
def test_exact_ties_of_whole_numbers_go_as_in_the_definition(options: dict[str, Any]) -> None:
    a, b = torch.randint(-2, 3, (150, 4)).float(), torch.randint(-2, 3, (130, 4)).float()
    for metric in ("euclidean", "sqeuclidean"):
        found = pyfeat.match(a, b, metric=metric, **options)
        _assert_same(found, reference.match(a, b, metric=metric, **options))


def test_no_row_is_in_two_mutual_pairs() -> None:
    a, b = torch.randint(-1, 2, (200, 3)).float(), torch.randint(-1, 2, (200, 3)).float()
    for options in (METHODS[0], METHODS[2], METHODS[3]):
        found = pyfeat.match(a, b, **options)
        for indices in found[:2]:
            assert len(set(indices.tolist())) == len(indices)


@pytest.mark.parametrize("options", [METHODS[i] for i in (0, 2, 3)])  # the other is one-sided
def test_matching_backwards_swaps_the_sides(options: dict[str, Any]) -> None:
    a, b = _pairs(150, 170, 20)
    there, back = pyfeat.match(a, b, **options), pyfeat.match(b, a, **options)
    order = back.indices_b.argsort()
    assert torch.equal(there.indices_a, back.indices_b[order])
    assert torch.equal(there.indices_b, back.indices_a[order])
    assert torch.allclose(there.scores, back.scores[order], rtol=1e-5)


@every_method
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_sides_have_no_matches(
    sizes: tuple[int, int], options: dict[str, Any], backend: Any
) -> None:
    found = pyfeat.match(
        torch.randn(sizes[0], 3), torch.randn(sizes[1], 3), backend=backend, **options
    )
    assert [part.shape for part in found] == [(0,)] * 3
    assert [part.dtype for part in found] == [torch.int64, torch.int64, torch.float32]


@every_method
def test_rows_without_features_all_tie(options: dict[str, Any]) -> None:
    found = pyfeat.match(torch.empty(4, 0), torch.empty(3, 0), **options)
    _assert_same(found, reference.match(torch.empty(4, 0), torch.empty(3, 0), **options))


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_matches_as_its_values_do(options: dict[str, Any], dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in _pairs(150, 130, 20))
    found = pyfeat.match(a, b, **options)
    exact = dtype == torch.float64
    assert found.scores.dtype == (torch.float64 if exact else torch.float32)
    expected = reference.match(a.double(), b.double(), **options)
    _assert_same(found, expected, tolerance=1e-12 if exact else 1e-5)


@every_method
def test_strided_and_numpy_features_match_like_plain_ones(options: dict[str, Any]) -> None:
    a, b = _pairs(90, 110, 12)
    plain = pyfeat.match(a, b, **options)
    wide = torch.zeros(110, 30)
    wide[:, 3:27:2] = b
    _assert_same(pyfeat.match(a.T.contiguous().T, wide[:, 3:27:2], **options), plain, 0.0)
    found = pyfeat.match(a.numpy(), b.numpy(), **options)
    assert all(isinstance(part, np.ndarray) for part in found)
    assert np.array_equal(found.indices_b, plain.indices_b.numpy())
    assert np.array_equal(found.scores, plain.scores.numpy())


@every_method
def test_masked_rows_are_as_if_they_were_not_there(options: dict[str, Any]) -> None:
    a, b = _pairs(150, 130, 20)
    mask_a, mask_b = torch.rand(150) < 0.7, torch.rand(130) < 0.6
    a[~mask_a], b[~mask_b] = float("nan"), float("inf")
    found = pyfeat.match(a, b, mask_a=mask_a, mask_b=mask_b, **options)
    rows_a, rows_b = mask_a.nonzero()[:, 0], mask_b.nonzero()[:, 0]
    expected = pyfeat.match(a[mask_a], b[mask_b], **options)
    assert len(expected.scores) > 10
    assert torch.equal(found.indices_a, rows_a[expected.indices_a])
    assert torch.equal(found.indices_b, rows_b[expected.indices_b])
    assert torch.equal(found.scores, expected.scores)
    nothing = pyfeat.match(a, b, mask_a=mask_a, mask_b=torch.zeros(130).bool(), **options)
    assert len(nothing.scores) == 0


@every_method
def test_thread_count_does_not_change_the_matches(options: dict[str, Any]) -> None:
    a, b = _pairs(900, 1000, 20)
    plain = pyfeat.match(a, b, **options)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            again = pyfeat.match(a, b, **options)
            assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [1e-30, 1e6, 1e15, 1e30])
def test_dual_softmax_of_extreme_features_is_finite_and_right(size: float) -> None:
    # Orthogonal rows of very different length: whoever has a partner has it with certainty.
    a = torch.eye(40) * size
    found = pyfeat.match(a, a.flip(0), method="dual_softmax", threshold=0.0)
    if size > 1.0:
        assert torch.equal(found.indices_b, torch.arange(40).flip(0))
        assert torch.allclose(found.scores, torch.ones(40))
    else:  # products far below the rounding of exp: all pairs tie
        assert torch.equal(torch.stack(found[:2]), torch.zeros(2, 1).long())
        assert torch.allclose(found.scores, torch.full((1,), 1 / 1600.0))
    noisy = torch.randn(50, 8) * size
    scores = pyfeat.match(noisy, noisy, method="dual_softmax", threshold=0.0).scores
    assert ((scores >= 0) & (scores <= 1)).all()


def test_matches_are_detached() -> None:
    a, b = (x.requires_grad_() for x in _pairs(20, 30, 8))
    for options in METHODS:
        assert not pyfeat.match(a, b, **options).scores.requires_grad


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, r"a must be float32 or .*, got int64", {"a": torch.ones(3, 4).long()}),
        (TypeError, r"b must be float32, got float64", {"b": torch.ones(3, 4).double()}),
        (TypeError, r"a and b must both be tensors or both numpy", {"b": np.ones((3, 4))}),
        (TypeError, r"a must be a tensor or a numpy array", {"a": [[1.0]]}),
        (ValueError, r"a must have shape \(N, D\), got \(4,\)", {"a": torch.ones(4)}),
        (ValueError, r"b must have shape \(N, 4\), got \(3, 5\)", {"b": torch.ones(3, 5)}),
        (ValueError, r"b must be on cpu like a, got meta", {"b": torch.ones(3, 4, device="meta")}),
        (ValueError, r"method must be one of 'mutual', .*, got 'nn'", {"method": "nn"}),
        (ValueError, r"metric must be one of 'euclidean', .*, got 'l2'", {"metric": "l2"}),
        (ValueError, r"backend must be one of None, 'cpu', .*, got 'x'", {"backend": "x"}),
        (
            ValueError,
            r"metric must be one of 'euclidean', 'sqeuclidean', 'cosine', got 'inner_product'",
            {"method": "ratio", "metric": "inner_product"},
        ),
        (
            ValueError,
            r"metric must only be given for method 'mutual' or 'ratio', got 'cosine'",
            {"method": "dual_softmax", "metric": "cosine"},
        ),
        (ValueError, r"ratio must only be given for method 'ratio', got 0.7", {"ratio": 0.7}),
        (ValueError, r"mutual must only be given for method 'ratio', got True", {"mutual": True}),
        (
            ValueError,
            r"temperature must only be given for method 'dual_softmax', got 1.0",
            {"temperature": 1.0},
        ),
        (ValueError, r"ratio must be in \(0, 1\], got 0.0", {"method": "ratio", "ratio": 0.0}),
        (ValueError, r"ratio must be in \(0, 1\], got 1.5", {"method": "ratio", "ratio": 1.5}),
        (
            ValueError,
            r"temperature must be in \[1e-30, 1e30\], got 0.0",
            {"method": "dual_softmax", "temperature": 0.0},
        ),
        (
            ValueError,
            r"threshold must be in \[0, 1\], got nan",
            {"method": "dual_softmax", "threshold": float("nan")},
        ),
        (TypeError, r"mask_a must be bool, got float32", {"mask_a": torch.ones(3)}),
        (
            ValueError,
            r"mask_b must have shape \(3,\), got \(4,\)",
            {"mask_b": torch.ones(4).bool()},
        ),
        (
            ValueError,
            r"a must be finite, got NaN or infinity in row 1",
            {"a": torch.tensor([[1.0] * 4, [float("nan")] * 4])},
        ),
        (
            ValueError,
            r"b must be finite, got NaN or infinity in row 0",
            {"b": torch.full((3, 4), float("inf"))},
        ),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], match: str, arguments: dict[str, Any]
) -> None:
    arguments = {"a": torch.ones(3, 4), "b": torch.ones(3, 4), **arguments}
    with pytest.raises(error, match="match: " + match):
        pyfeat.match(**arguments)


def test_similarities_beyond_the_range_are_refused() -> None:
    a = torch.full((2, 3), 1e60, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"match: a and b must have norms .* 1e\+100 .*got 3e\+121"
    ):
        pyfeat.match(a, a, method="dual_softmax")


def test_features_that_no_backend_takes_are_refused_with_the_reasons() -> None:
    a = torch.empty(3, 2, device="meta")
    with pytest.raises(NotImplementedError, match=r"match: backend 'cpu' does not .* on meta"):
        pyfeat.match(a, a, backend="cpu")
    with pytest.raises(NotImplementedError, match=r"match: no backend supports .*cpu: .* on meta"):
        pyfeat.match(a, a)


@every_method
def test_the_reference_backend_gives_the_same_matches(options: dict[str, Any]) -> None:
    a, b = _pairs(60, 70, 10)
    found = pyfeat.match(a, b, backend="reference", **options)
    assert found.scores.dtype == torch.float32
    _assert_same(pyfeat.match(a, b, **options), found, 1e-5)


GROWTH = """
import resource, torch, pyfeat
a, b = torch.randn(20_000, 8), torch.randn(20_000, 8)
pyfeat.match(a[:100], b[:100], method={method!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pyfeat.match(a, b, method={method!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux only")
@pytest.mark.parametrize("method", ["mutual", "dual_softmax"])
def test_memory_grows_with_the_rows_and_not_with_their_pairs(method: str) -> None:
    # One (20,000, 20,000) matrix would take 1.6 GB.
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(method=method)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 96 << 10
