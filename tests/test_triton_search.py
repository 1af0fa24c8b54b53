"""Nearest neighbours by the Triton kernels against the float64 reference."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyfeat import reference
from tests.support import assert_allowed_neighbours, assert_exact_neighbours, make_features
from tests.support_bounds import query_with_largest_errors, rows_with_largest_errors
from tests.support_triton import METRICS, frame, rank, shortlist, similarity, triton_knn


def _assert_exact(queries: Tensor, memory: Tensor, k: int, metric: str) -> None:
    found = triton_knn(queries, memory, k, metric)
    assert_exact_neighbours(*found, queries, memory, k, metric)


@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated", "strided"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 257, 33), (31, 33, 257), (33, 31, 1), (33, 257, 31)]
)
def test_neighbours_equal_float64_brute_force(kind: str, shape: tuple[int, int, int]) -> None:
    queries, memory = make_features(kind, *shape)
    _assert_exact(queries, memory, 1, "euclidean")


def test_more_queries_than_one_tile_holds_are_exact() -> None:
    _assert_exact(*make_features("plain", 257, 31, 33), 1, "euclidean")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated"])
def test_every_metric_and_number_of_neighbours_is_exact(metric: str, kind: str) -> None:
    queries, memory = make_features(kind, 4, 200, 45)
    for k in (1, 9):
        _assert_exact(queries, memory, k, metric)
    _assert_exact(queries[:1], memory, 64, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_scale_of_the_data_does_not_matter(scale: float, metric: str) -> None:
    queries, memory = make_features("plain", 5, 257, 20)
    _assert_exact(queries * scale, memory * scale, 3, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("outlier", [1e18, 1e-18])
def test_rows_of_very_different_size_are_exact(outlier: float, metric: str) -> None:
    queries, memory = make_features("plain", 6, 150, 24)
    memory[::7] *= outlier
    queries[::5] *= outlier
    _assert_exact(queries, memory, 5, metric)


def test_subnormal_features_are_exact() -> None:
    queries, memory = torch.randn(4, 16) * 1e-40, torch.randn(150, 16) * 1e-40
    for metric in ("euclidean", "cosine"):
        _assert_exact(queries, memory, 2, metric)


@pytest.mark.parametrize("exponent", [29, 35, 43, 51, 60])
def test_rows_that_rounding_makes_equal_far_away_come_in_row_order(exponent: int) -> None:
    # Distances to so far a query differ by less than a unit of float64 in more and more rows.
    queries, memory = torch.full((1, 1), 2.0**exponent), torch.rand(600, 1)
    expected = reference.knn(queries, memory, 3, "sqeuclidean")[1]
    assert torch.equal(triton_knn(queries, memory, 3, "sqeuclidean")[1], expected)


def test_rows_that_rounding_makes_equal_under_a_large_mean_come_in_row_order() -> None:
    first = torch.randint(0, 1024, (400,)).double()
    memory = 2.0**40 + torch.stack([first, 1024 - first], dim=1)  # products round to 2^28
    queries = 2.0**40 + torch.tensor([[700.0, 3.0]]).double()
    expected = reference.knn(queries, memory, 3, "inner_product")[1]
    assert torch.equal(expected[0], torch.arange(3))
    assert torch.equal(triton_knn(queries, memory, 3, "inner_product")[1], expected)


def test_rows_beyond_the_range_of_the_packed_form_are_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame, "_SAMPLED_ROWS", 3)  # of a size that says nothing about row 77
    queries, memory = make_features("plain", 3, 140, 24)
    memory[77] *= 1e25
    queries[0] = memory[77] * 1.01
    _assert_exact(queries, memory, 2, "euclidean")


def test_constant_memory_returns_the_first_rows_in_order() -> None:
    distances, indices = triton_knn(torch.randn(3, 12), torch.full((300, 12), 7.25), 5, "euclidean")
    assert torch.equal(indices, torch.arange(5).expand(3, 5))
    assert torch.isfinite(distances).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_query_finds_itself_at_distance_zero(metric: str) -> None:
    memory = torch.randn(150, 100) + 1e5
    distances, indices = triton_knn(memory[::7], memory, 1, metric)
    assert torch.equal(indices[:, 0], torch.arange(0, 150, 7))
    assert (distances == 0).all()


def test_zero_vectors_are_orthogonal_to_all_for_cosine() -> None:
    queries, memory = make_features("plain", 6, 100, 10)
    memory[3::8] = 0.0  # whole groups
    queries[[1, 4]] = 0.0
    _assert_exact(queries, memory, 7, "cosine")
    indices = triton_knn(queries, memory, 7, "cosine")[1]
    assert torch.equal(indices[[1, 4]], torch.arange(7).expand(2, 7))  # all at distance 1
    _assert_exact(-queries.abs(), memory.abs(), 4, "cosine")  # nothing is nearer than a zero row


def test_rows_one_unit_apart_are_told_apart() -> None:
    row = torch.rand(64) + 1
    memory = row.repeat(256, 1)
    for i in range(256):
        memory[i, i % 64] += (i % 5 + 1) * torch.finfo(torch.float32).eps
    _assert_exact(memory[::60].clone(), memory, 4, "euclidean")


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_rounding_of_the_products_is_allowed_for(metric: str) -> None:
    # Whole numbers up to 256 are packed without loss and have mean 0; their products reach 2^26,
    # where float32 counts in steps of 8, and the rows' distances differ by less.
    row = torch.randint(-255, 256, (2048,)).float()
    rows = (row.repeat(60, 1) + torch.randint(-1, 2, (60, 2048))).clamp(-255, 255)
    queries = (row + torch.randint(-3, 4, (2, 2048))).clamp(-255, 255)
    _assert_exact(queries, torch.cat([rows, -rows]), 1, metric)


@pytest.mark.parametrize("make", [rows_with_largest_errors, query_with_largest_errors])
def test_the_error_bound_is_needed_in_full(
    make: Callable[[], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, memory = make()
    expected = reference.knn(queries, memory, 1, "inner_product")[1]
    assert expected.item() == 1
    assert torch.equal(triton_knn(queries, memory, 1, "inner_product")[1], expected)

    monkeypatch.setattr(shortlist, "_SPARE", 0.9)
    assert not torch.equal(triton_knn(queries, memory, 1, "inner_product")[1], expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("per_query", [False, True])
def test_only_allowed_rows_are_found(metric: str, per_query: bool) -> None:
    queries, memory = make_features("duplicated", 5, 290, 12)
    allowed = torch.rand((5, 290) if per_query else (290,)) < 0.1
    allowed[..., 128:256] = False  # a whole tile
    _assert_allowed(queries, memory, 9, metric, allowed)


@pytest.mark.parametrize("metric", METRICS)
def test_missing_neighbours_have_index_minus_one(metric: str) -> None:
    queries, memory = make_features("plain", 4, 140, 8)
    allowed = torch.zeros(4, 140, dtype=torch.bool)
    allowed[1, [3, 139]] = True
    allowed[2, :5] = True
    _assert_allowed(queries, memory, 4, metric, allowed)
    distances, indices = triton_knn(queries, memory, 4, metric, allowed=allowed[0])
    assert (indices == -1).all()
    assert (distances == (-torch.inf if metric == "inner_product" else torch.inf)).all()


def test_a_mask_may_have_any_strides() -> None:
    queries, memory = make_features("plain", 4, 140, 8)
    allowed = torch.rand(140, 8) < 0.5
    _assert_allowed(queries, memory, 3, "euclidean", allowed[:, ::2].T)
    _assert_allowed(queries, memory, 3, "euclidean", allowed[:, 0])


def _assert_allowed(queries: Tensor, memory: Tensor, k: int, metric: str, allowed: Tensor) -> None:
    found = triton_knn(queries, memory, k, metric, allowed=allowed)
    assert_allowed_neighbours(*found, queries, memory, metric, allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_other_dtypes_are_exact(dtype: torch.dtype, metric: str) -> None:
    queries, memory = (x.to(dtype) for x in make_features("plain", 4, 200, 19))
    distances, indices = triton_knn(queries, memory, 5, metric)
    expected = reference.knn(queries.double(), memory.double(), 5, metric)
    assert torch.equal(indices, expected[1])
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-7
    assert torch.allclose(distances.double(), expected[0], rtol=tolerance, atol=tolerance)


def test_float64_features_keep_their_digits() -> None:
    memory = 1.0 + torch.arange(200)[:, None] * torch.tensor([[2.0**-52, 0.0, 0.0]]).double()
    indices = triton_knn(memory[40:44].clone(), memory, 1, "euclidean")[1]
    assert torch.equal(indices[:, 0], torch.arange(40, 44))


@pytest.mark.parametrize("allowed_ndim", [0, 1, 2])
def test_chunks_and_slices_do_not_change_the_answer(
    allowed_ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, memory = make_features("duplicated", 17, 520, 6)
    allowed = [None, torch.rand(520) < 0.5, torch.rand(17, 520) < 0.5][allowed_ndim]
    whole = triton_knn(queries, memory, 5, "euclidean", allowed=allowed)
    monkeypatch.setattr(rank, "_WORDS", 1)
    monkeypatch.setattr(rank, "_PROGRAMS", 34)  # two slices of three words
    sliced = triton_knn(queries, memory, 5, "euclidean", allowed=allowed)
    monkeypatch.setattr(similarity, "_ROW_BYTES", 256 * 2 * 64)
    monkeypatch.setattr(similarity, "_LARGEST_QUERY_CHUNK", 16)
    monkeypatch.setattr(similarity, "QUERY_MULTIPLE", 16)
    chunked = triton_knn(queries, memory, 5, "euclidean", allowed=allowed)
    for other in (sliced, chunked):
        assert torch.equal(whole[0], other[0])
        assert torch.equal(whole[1], other[1])


def test_two_runs_give_equal_bits() -> None:
    queries, memory = make_features("shifted", 5, 150, 40)
    first, second = (triton_knn(queries, memory, 5, "cosine") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 1, 0), (4, 5, 0)])
def test_empty_inputs_have_answers(shape: tuple[int, int, int]) -> None:
    distances, indices = triton_knn(*make_features("plain", *shape), 1, "euclidean")
    assert distances.shape == indices.shape == (shape[0], 1)
    assert (distances == 0).all()
    assert (indices == 0).all()


def test_what_a_gpu_cannot_do_is_refused() -> None:
    x = torch.zeros(100, 2)
    with pytest.raises(ValueError, match=r"knn: k must be at most 64 on a GPU, got 65"):
        similarity.knn(x, x, 65, "euclidean")
    wide = torch.empty(1, similarity.MAX_DIM + 1, device="meta")
    with pytest.raises(ValueError, match=r"knn: features must have at most 131072 columns"):
        similarity.knn(wide, wide, 1, "euclidean")


@pytest.mark.parametrize("module", ["pyfeat", "pyfeat._triton"])
def test_importing_the_package_does_not_import_triton(module: str) -> None:
    code = f"import sys, {module}; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
