"""Nearest neighbours by the CUDA kernels against the float64 reference."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import select_backend
from pyfeat._packed import PackedCopy
from pyfeat.search import METRICS
from tests.support import assert_allowed_neighbours, assert_exact_neighbours, make_features
from tests.support_bounds import query_with_largest_errors, rows_with_largest_errors
from tests.support_cuda import DEVICE, EMULATION

_cuda: Any = importlib.import_module("pyfeat._cuda")
search: Any = importlib.import_module("pyfeat._cuda_ops.search")
frame: Any = importlib.import_module("pyfeat._frame")


@pytest.fixture(params=[80, 90], ids=["mma", "wgmma"])
def either_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kernels that multiply tiles; a GPU has one."""
    if EMULATION is None:
        if request.param == 80:
            pytest.skip("the GPU says which")
        yield
    else:
        with EMULATION.device(capability=request.param):
            yield


def _knn(
    queries: Tensor, memory: Tensor, k: int, metric: str, allowed: Tensor | None = None, **more: Any
) -> tuple[Tensor, Tensor]:
    """The launcher, on DEVICE, for tensors of the CPU."""
    mask = None if allowed is None else allowed.to(DEVICE)
    distances, indices = search.knn(
        queries.to(DEVICE), memory.to(DEVICE), k, metric, allowed=mask, **more
    )
    return distances.cpu(), indices.cpu()


def _assert_exact(queries: Tensor, memory: Tensor, k: int, metric: str) -> None:
    found = _knn(queries, memory, k, metric)
    assert_exact_neighbours(*found, queries, memory, k, metric)


def _assert_allowed(queries: Tensor, memory: Tensor, k: int, metric: str, allowed: Tensor) -> None:
    found = _knn(queries, memory, k, metric, allowed)
    assert_allowed_neighbours(*found, queries, memory, metric, allowed)


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated", "strided"])
def test_neighbours_equal_float64_brute_force(kind: str) -> None:
    _assert_exact(*make_features(kind, 33, 257, 67), 3, "euclidean")


@pytest.mark.parametrize(("shape", "k"), [((1, 1, 1), 1), ((130, 31, 33), 31), ((1, 700, 257), 1)])
def test_sizes_off_the_tile_are_exact(shape: tuple[int, int, int], k: int) -> None:
    _assert_exact(*make_features("plain", *shape), k, "euclidean")


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_and_number_of_neighbours_is_exact(metric: str) -> None:
    queries, memory = make_features("duplicated", 4, 600, 20)
    _assert_exact(queries, memory, 9, metric)
    _assert_exact(queries[:1], memory + 3, 64, metric)


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_scale_of_the_data_does_not_matter(scale: float, metric: str) -> None:
    queries, memory = make_features("plain", 5, 257, 20)
    _assert_exact(queries * scale, memory * scale, 3, metric)


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
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


@pytest.mark.parametrize("exponent", [35, 43, 60])
def test_rows_that_rounding_makes_equal_far_away_come_in_row_order(exponent: int) -> None:
    # Distances to so far a query differ by less than a unit of float64 in more and more rows.
    queries, memory = torch.full((1, 1), 2.0**exponent), torch.rand(600, 1)
    expected = reference.knn(queries, memory, 3, "sqeuclidean")[1]
    assert torch.equal(_knn(queries, memory, 3, "sqeuclidean")[1], expected)


def test_rows_that_rounding_makes_equal_under_a_large_mean_come_in_row_order() -> None:
    first = torch.randint(0, 1024, (400,)).double()
    memory = 2.0**40 + torch.stack([first, 1024 - first], dim=1)  # products round to 2^28
    queries = 2.0**40 + torch.tensor([[700.0, 3.0]]).double()
    expected = reference.knn(queries, memory, 3, "inner_product")[1]
    assert torch.equal(expected[0], torch.arange(3))
    assert torch.equal(_knn(queries, memory, 3, "inner_product")[1], expected)


def test_rows_beyond_the_range_of_the_packed_form_are_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frame, "_SAMPLED_ROWS", 3)  # of a size that says nothing about row 77
    queries, memory = make_features("plain", 3, 140, 24)
    memory[77] *= 1e25
    queries[0] = memory[77] * 1.01
    _assert_exact(queries, memory, 2, "euclidean")


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_query_finds_itself_at_distance_zero(metric: str) -> None:
    memory = torch.randn(150, 100) + 1e5
    distances, indices = _knn(memory[::7], memory, 1, metric)
    assert torch.equal(indices[:, 0], torch.arange(0, 150, 7))
    assert (distances == 0).all()


def test_zero_vectors_are_orthogonal_to_all_for_cosine() -> None:
    queries, memory = make_features("plain", 6, 100, 10)
    memory[3::8] = 0.0
    queries[[1, 4]] = 0.0
    _assert_exact(queries, memory, 7, "cosine")
    indices = _knn(queries, memory, 7, "cosine")[1]
    assert torch.equal(indices[[1, 4]], torch.arange(7).expand(2, 7))  # all at distance 1
    _assert_exact(-queries.abs(), memory.abs(), 4, "cosine")  # nothing is nearer than a zero row


def test_rows_one_unit_apart_are_told_apart() -> None:
    row = torch.rand(64) + 1
    memory = row.repeat(256, 1)
    for i in range(256):
        memory[i, i % 64] += (i % 5 + 1) * torch.finfo(torch.float32).eps
    _assert_exact(memory[::60].clone(), memory, 4, "euclidean")


@pytest.mark.usefixtures("either_kernel")
def test_rounding_of_the_products_is_allowed_for() -> None:
    # Even whole numbers up to 254 are packed without loss and have mean 0. From 2^24 on, which 18 of
    # 64 sums of 16 products reach, float32 drops what is odd: there row 0 loses all that it has more
    # than row 1, which has a smaller number more, but at the beginning.
    query = torch.full((1, 1024), 254.0)
    query[:, 15::16] = 1.0
    near = torch.full((2, 1024), 254.0)
    near[:, 15::16] = 0.0
    near[0, 18 * 16 + 15 :: 16] = 1.0
    near[1, 15] = 20.0
    memory = torch.cat([near, -near])
    assert _knn(query, memory, 1, "inner_product")[1].item() == 0
    if EMULATION is not None:  # a GPU may keep more digits
        assert _knn(query, memory, 1, "inner_product", bound_scale=0.0)[1].item() == 1


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("make", [rows_with_largest_errors, query_with_largest_errors])
def test_the_error_bound_is_needed_in_full(make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    queries, memory = make()
    memory = torch.cat([torch.zeros(5, 64), memory])  # among rows without errors
    expected = reference.knn(queries, memory, 1, "inner_product")[1]
    assert expected.item() == 6
    assert torch.equal(_knn(queries, memory, 1, "inner_product")[1], expected)
    wrong = _knn(queries, memory, 1, "inner_product", bound_scale=0.9)[1]
    assert not torch.equal(wrong, expected)


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("per_query", [False, True])
def test_only_allowed_rows_are_found(per_query: bool) -> None:
    queries, memory = make_features("duplicated", 5, 290, 12)
    allowed = torch.rand((5, 290) if per_query else (290,)) < 0.1
    _assert_allowed(queries, memory, 9, "euclidean", allowed)


@pytest.mark.parametrize("metric", METRICS)
def test_missing_neighbours_have_index_minus_one(metric: str) -> None:
    queries, memory = make_features("plain", 4, 140, 8)
    allowed = torch.zeros(4, 140, dtype=torch.bool)
    allowed[1, [3, 139]] = True
    allowed[2, :5] = True
    _assert_allowed(queries, memory, 4, metric, allowed)
    distances, indices = _knn(queries, memory, 4, metric, allowed[0])
    assert (indices == -1).all()
    assert (distances == (-torch.inf if metric == "inner_product" else torch.inf)).all()


def test_a_mask_may_have_any_strides() -> None:
    queries, memory = make_features("plain", 4, 140, 8)
    allowed = torch.rand(140, 8) < 0.5
    _assert_allowed(queries, memory, 3, "euclidean", allowed[:, ::2].T)
    _assert_allowed(queries, memory, 3, "euclidean", allowed[:, 0])


@pytest.mark.parametrize("metric", METRICS)
def test_rows_and_queries_that_are_not_finite_find_and_are_nothing(metric: str) -> None:
    queries, memory = make_features("plain", 4, 64, 8)
    queries[1, 3] = torch.nan
    queries[2, 0] = -torch.inf
    memory[5] = torch.inf
    memory[47, 2] = torch.nan
    distances, indices = _knn(queries, memory, 64, metric)
    usable = memory.isfinite().all(dim=1)
    found = distances[[0, 3]], indices[[0, 3]]
    assert_allowed_neighbours(*found, queries[[0, 3]], memory, metric, usable)
    assert (indices[1:3] == -1).all()
    assert (distances[1:3] == (-torch.inf if metric == "inner_product" else torch.inf)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_exact(dtype: torch.dtype) -> None:
    queries, memory = (x.to(dtype) for x in make_features("plain", 4, 200, 19))
    for metric in ("euclidean", "cosine"):
        distances, indices = _knn(queries, memory, 5, metric)
        expected = reference.knn(queries.double(), memory.double(), 5, metric)
        assert torch.equal(indices, expected[1])
        assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-13 if dtype == torch.float64 else 1e-7
        assert torch.allclose(distances.double(), expected[0], rtol=tolerance, atol=tolerance)


def test_float64_features_keep_their_digits() -> None:
    memory = 1.0 + torch.arange(200)[:, None] * torch.tensor([[2.0**-52, 0.0, 0.0]]).double()
    indices = _knn(memory[40:44].clone(), memory, 1, "euclidean")[1]
    assert torch.equal(indices[:, 0], torch.arange(40, 44))


class _Counts:
    """What a search reports: rows listed, and queries whose list was too short, of each part."""

    def __init__(self) -> None:
        self.listed: list[Tensor] = []
        self.overflowed: list[int] = []

    def __call__(self, listed: Tensor, overflowed: Tensor) -> None:
        self.listed.append(listed.cpu())
        self.overflowed.append(int(overflowed))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("allowed_ndim", [0, 1, 2])
def test_a_list_that_is_too_short_leads_to_all_rows(k: int, allowed_ndim: int) -> None:
    # One row far off makes the packed form too coarse for all others, more than 2,048.
    queries, memory = torch.randn(3, 4), 7.25 + 1e-4 * torch.randn(2_200, 4)
    memory[0] = 3e3
    mask = torch.ones(2_200, dtype=torch.bool)
    mask[reference.knn(queries, memory, 20, "euclidean")[1].flatten()] = False  # the nearest
    allowed = [None, mask, mask.repeat(3, 1)][allowed_ndim]
    counts = _Counts()
    distances, indices = _knn(queries, memory, k, "euclidean", allowed, report=counts)
    everything = torch.ones(2_200, dtype=torch.bool) if allowed is None else allowed
    assert_allowed_neighbours(distances, indices, queries, memory, "euclidean", everything)
    assert counts.overflowed == [3]


def test_a_cluster_that_rounding_does_not_tell_apart_fits_a_list() -> None:
    queries, memory = torch.randn(2, 4), 7.25 + 1e-4 * torch.randn(1_900, 4)
    memory[0] = 3e3
    counts = _Counts()
    found = _knn(queries, memory, 1, "euclidean", report=counts)
    assert_exact_neighbours(*found, queries, memory, 1, "euclidean")
    assert (counts.listed[0] >= 1_899).all()
    assert counts.overflowed == [0]


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
@pytest.mark.parametrize("k", [1, 9])
def test_few_rows_are_listed(k: int, metric: str) -> None:
    counts = _Counts()
    _knn(torch.randn(40, 40) + 5, torch.randn(1500, 40) + 5, k, metric, report=counts)
    assert counts.overflowed == [0]
    assert (counts.listed[0] >= k).all()
    # Of 1,500 rows, a sixth or a twelfth is sampled.
    assert counts.listed[0].double().mean() <= 20 * k + 20


@pytest.mark.parametrize("allowed_ndim", [0, 1, 2])
def test_chunks_and_packing_do_not_change_the_answer(
    allowed_ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, memory = make_features("duplicated", 130, 300, 6)
    allowed = [None, torch.rand(300) < 0.5, torch.rand(130, 300) < 0.5][allowed_ndim]
    whole = _knn(queries, memory, 5, "euclidean", allowed)
    everything = torch.ones(300, dtype=torch.bool) if allowed is None else allowed
    assert_allowed_neighbours(*whole, queries, memory, "euclidean", everything)
    packed = search.pack(memory.to(DEVICE), "euclidean")
    others = [_knn(queries, memory, 5, "euclidean", allowed, packed=packed)]
    monkeypatch.setattr(search, "_ROW_BYTES", 1)
    monkeypatch.setattr(search, "_QUERY_BYTES", 1)
    others.append(_knn(queries, memory, 5, "euclidean", allowed))
    for other in others:
        assert torch.equal(whole[0], other[0])
        assert torch.equal(whole[1], other[1])


@pytest.mark.usefixtures("either_kernel")
def test_the_order_of_threads_and_blocks_does_not_matter() -> None:
    queries, memory = make_features("duplicated", 8, 2_200, 4)
    memory[:2_150] = 1.0  # some lists are too short
    first = _knn(queries, memory, 3, "euclidean")
    if EMULATION is None:
        second = _knn(queries, memory, 3, "euclidean")
    else:
        with EMULATION.device(multiprocessors=3, backwards=True):
            second = _knn(queries, memory, 3, "euclidean")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 1, 0), (4, 5, 0)])
def test_empty_inputs_have_answers(shape: tuple[int, int, int]) -> None:
    distances, indices = _knn(*make_features("plain", *shape), 1, "euclidean")
    assert distances.shape == indices.shape == (shape[0], 1)
    assert (distances == 0).all()
    assert (indices == 0).all()


def test_a_packed_copy_is_made_once_until_rows_change(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = []
    pack = search.pack

    def counted(*arguments: Any) -> Any:
        packs.append(arguments)
        return pack(*arguments)

    monkeypatch.setattr(search, "pack", counted)
    queries, rows = (x.to(DEVICE) for x in make_features("plain", 3, 50, 8))
    copy = PackedCopy()
    for expected_packs in (1, 1, 2):
        if expected_packs == 2:
            rows += 1.0
            copy.drop()
        distances, indices = copy.search_on_gpu(queries, rows, 2, "cosine", None)
        found = distances.cpu(), indices.cpu()
        assert_exact_neighbours(*found, queries.cpu(), rows.cpu(), 2, "cosine")
        assert len(packs) == expected_packs
    assert copy.__getstate__()["_on_gpu"] is None


@pytest.mark.parametrize(
    ("num_queries", "num_rows", "dim", "k"),
    list(itertools.product([1, 784, 10**6], [1, 70_000, 10**8], [1, 384, 131_072], [1, 64])),
)
def test_the_workspace_stays_under_256_mb(
    num_queries: int, num_rows: int, dim: int, k: int
) -> None:
    chunks = search.plan(num_queries, num_rows, dim, k)
    assert chunks.rows % 256 == 0
    assert chunks.queries % 128 == 0
    size = _cuda.packed_bytes(min(chunks.rows, num_rows), dim)
    size += _cuda.workspace_bytes(min(chunks.queries, num_queries), dim, k)
    assert size <= 256 << 20


def test_what_the_kernels_do_not_serve_is_said() -> None:
    x = torch.zeros(100, 2)
    with pytest.raises(NotImplementedError, match=r"cuda: k must be at most 64, got 65"):
        select_backend("knn", "cuda", x, k=65)
    wide = torch.empty(1, (1 << 17) + 1, device="meta")
    with pytest.raises(NotImplementedError, match=r"cuda: features must have at most 131072"):
        select_backend("knn", "cuda", wide)
    with pytest.raises(ValueError, match=r"knn: arguments must fit each other, got k 65"):
        search.knn(x.to(DEVICE), x.to(DEVICE), 65, "euclidean")
