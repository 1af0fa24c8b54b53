"""Nearest neighbours against the float64 reference."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyfeat
from pyfeat import reference
from pyfeat._backends import Backend
from pyfeat.search import METRICS, Metric
from tests.support import ENGINES, assert_exact_neighbours, kernel_knn, make_features

SIZES = (1, 31, 33, 257)
SHAPES = list(itertools.product(SIZES, SIZES, SIZES))


def _ks(num_rows: int) -> list[int]:
    return sorted({1, min(9, num_rows), num_rows})


@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_neighbours_equal_float64_brute_force(kind: str, shape: tuple[int, int, int]) -> None:
    queries, memory = make_features(kind, *shape)
    for k in _ks(shape[1]):
        found = pyfeat.knn(queries, memory, k)
        assert_exact_neighbours(*found, queries, memory, k, "euclidean")


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated"])
def test_every_instruction_set_and_metric_is_exact(
    isa: str, precision: str, metric: Metric, kind: str
) -> None:
    queries, memory = make_features(kind, 67, 1301, 45)
    for k in (1, 7, 100):
        distances, indices, _ = kernel_knn(queries, memory, k, metric, isa=isa, precision=precision)
        assert_exact_neighbours(distances, indices, queries, memory, k, metric)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 4096, 33), (31, 4096, 4096), (4096, 257, 257)])
@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_large_sizes_equal_float64_brute_force(kind: str, shape: tuple[int, int, int]) -> None:
    queries, memory = make_features(kind, *shape)
    found = pyfeat.knn(queries, memory, 3)
    some = torch.randperm(shape[0])[:31]
    assert_exact_neighbours(
        found.distances[some], found.indices[some], queries[some], memory, 3, "euclidean"
    )


@given(
    num_queries=st.integers(0, 40),
    num_rows=st.integers(1, 90),
    dim=st.integers(0, 40),
    levels=st.sampled_from([0, 2, 5]),
    scale=st.sampled_from([2.0**-100, 2.0**-10, 1.0, 2.0**50]),  # ties stay exact
    shift=st.sampled_from([0.0, 1e4]),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_sizes_ties_and_scales_are_exact(
    num_queries: int,
    num_rows: int,
    dim: int,
    levels: int,
    scale: float,
    shift: float,
    metric: Metric,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_queries + num_rows, dim, generator=generator)
    if levels:  # few distinct values: many exact ties
        features = (features * levels / 2).round()
    features = (features + shift) * scale
    queries, memory = features[:num_queries], features[num_queries:]
    k = 1 + seed % num_rows
    found = pyfeat.knn(queries, memory, k, metric=metric)
    assert torch.isfinite(found.distances).all() or scale > 1e10
    if metric in ("euclidean", "cosine"):
        assert_exact_neighbours(*found, queries, memory, k, metric)
    else:
        expected = reference.knn(queries, memory, k, metric)
        assert torch.allclose(found.distances, expected[0], rtol=1e-6, atol=0.0, equal_nan=False)


@pytest.mark.parametrize("outlier", [1e18, 1e-18])
def test_rows_of_very_different_size_are_exact(outlier: float) -> None:
    queries, memory = torch.randn(50, 24), torch.randn(600, 24)
    memory[::7] *= outlier
    queries[::5] *= outlier
    for metric in METRICS:
        found = pyfeat.knn(queries, memory, 5, metric=metric)
        if metric in ("euclidean", "cosine"):
            assert_exact_neighbours(*found, queries, memory, 5, metric)


def test_subnormal_features_are_exact_when_torch_flushes_them() -> None:
    queries, memory = torch.randn(20, 16) * 1e-40, torch.randn(300, 16) * 1e-40
    expected = reference.knn(queries, memory, 2, "euclidean")[1]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        found = pyfeat.knn(queries, memory, 2).indices
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
def test_rows_one_unit_apart_are_told_apart(isa: str, precision: str) -> None:
    row = torch.rand(384) + 1
    memory = row.repeat(512, 1)
    for i in range(512):
        memory[i, i % 384] += (i % 5 + 1) * torch.finfo(torch.float32).eps
    queries = memory[::3].clone()
    distances, indices, _ = kernel_knn(
        queries, memory, 4, "euclidean", isa=isa, precision=precision
    )
    assert_exact_neighbours(distances, indices, queries, memory, 4, "euclidean")


def test_a_query_finds_itself_at_distance_zero() -> None:
    memory = torch.randn(2000, 100) + 1e5
    found = pyfeat.knn(memory, memory)
    assert torch.equal(found.indices[:, 0], torch.arange(2000))
    assert (found.distances == 0).all()


def test_constant_memory_returns_the_first_rows_in_order() -> None:
    memory = torch.full((3000, 12), 7.25)
    distances, indices, counters = kernel_knn(torch.randn(30, 12), memory, 5, "euclidean")
    assert torch.equal(indices, torch.arange(5).expand(30, 5))
    assert counters[2] == 30  # every row ties, so every distance is taken
    assert torch.isfinite(distances).all()


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
def test_shortlists_stay_short_on_gaussian_features(isa: str, precision: str) -> None:
    queries, memory = torch.randn(300, 152), torch.randn(10_000, 152)
    _, _, (reranked, _, exhaustive) = kernel_knn(
        queries, memory, 9, "euclidean", isa=isa, precision=precision
    )
    assert exhaustive == 0
    # bfloat16 rounds 2^16 times as coarsely as float32, whole numbers up to 127 (63) coarser still.
    assert reranked < {"float32": 5, "bf16": 8, "int8": 30}[precision] * 9 * 300


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 1, 0), (4, 5, 0)])
def test_empty_inputs_have_answers(shape: tuple[int, int, int]) -> None:
    queries, memory = make_features("plain", *shape)
    found = pyfeat.knn(queries, memory, 1)
    assert found.distances.shape == found.indices.shape == (shape[0], 1)
    assert (found.distances == 0).all()
    assert (found.indices == 0).all()


def test_thread_count_does_not_change_the_answer() -> None:
    queries, memory = torch.randn(300, 40), torch.randn(5000, 40)
    one = kernel_knn(queries, memory, 5, "euclidean", threads=1)
    for threads in (2, 3, 8):
        other = kernel_knn(queries, memory, 5, "euclidean", threads=threads)
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_batch_size_does_not_change_the_answer() -> None:
    queries, memory = torch.randn(257, 40) + 100, torch.randn(5000, 40) + 100
    whole = pyfeat.knn(queries, memory, 5)
    for size in (1, 13, 100):
        parts = [pyfeat.knn(chunk, memory, 5) for chunk in queries.split(size)]  # type: ignore[no-untyped-call]
        assert torch.equal(torch.cat([p.distances for p in parts]), whole.distances)
        assert torch.equal(torch.cat([p.indices for p in parts]), whole.indices)


def test_instruction_sets_agree_bit_for_bit() -> None:
    queries, memory = torch.randn(100, 77), torch.randn(3000, 77)
    results = [
        kernel_knn(queries, memory, 6, "cosine", isa=isa, precision=precision)
        for isa, precision in ENGINES
    ]
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_the_shift_of_the_data_does_not_change_the_answer() -> None:
    # Multiples of 1/8 stay exact in float32 after a shift by 1e5.
    queries, memory = (torch.randn(64, 30) * 8).round() / 8, (torch.randn(900, 30) * 8).round() / 8
    plain, moved = pyfeat.knn(queries, memory, 4), pyfeat.knn(queries + 1e5, memory + 1e5, 4)
    assert torch.equal(plain.indices, moved.indices)
    assert torch.equal(plain.distances, moved.distances)


def test_ties_across_packed_chunks_go_to_the_lower_row() -> None:
    memory = torch.randn(20_000, 300).repeat(6, 1)  # 144 MB: several chunks of any precision
    nearest = torch.arange(0, 20_000, 1900)
    queries = memory[nearest] + 0.01  # few: the memory is cut into slices, too
    found = pyfeat.knn(queries, memory, 2)
    assert_exact_neighbours(*found, queries, memory, 2, "euclidean")
    assert torch.equal(found.indices, torch.stack([nearest, nearest + 20_000], dim=1))


def test_numpy_arrays_give_numpy_arrays() -> None:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((9, 6)).astype(np.float32)
    memory = rng.standard_normal((50, 6)).astype(np.float32)
    memory.flags.writeable = False
    found = pyfeat.knn(queries[::-1], memory, 3)
    assert isinstance(found.distances, np.ndarray)
    assert isinstance(found.indices, np.ndarray)
    expected = pyfeat.knn(torch.from_numpy(queries).flip(0), torch.tensor(memory), 3)
    assert np.array_equal(found.indices, expected.indices.numpy())


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"knn: queries must be float32 or .*, got int64", lambda q, x: (q.long(), x)),
        (TypeError, r"knn: memory must be float32, got float64", lambda q, x: (q, x.double())),
        (TypeError, r"knn: queries and memory must both be", lambda q, x: (q.numpy(), x)),
        (TypeError, r"knn: queries must be a tensor .*, got list", lambda q, x: (q.tolist(), x)),
        (ValueError, r"knn: memory must have shape \(N, 4\), got \(3, 5\)", lambda q, x: (q, torch.zeros(3, 5))),
        (ValueError, r"knn: queries must have shape \(Q, D\), got \(4,\)", lambda q, x: (q[0], x)),
        (ValueError, r"knn: k must be in \[1, N = 6\], got 0", lambda q, x: (q, x, 0)),
        (ValueError, r"knn: k must be in \[1, N = 6\], got 7", lambda q, x: (q, x, 7)),
        (ValueError, r"knn: k must be in \[1, N = 0\], got 1", lambda q, x: (q, x[:0])),
        (TypeError, r"knn: k must be an integer, got 1.0", lambda q, x: (q, x, 1.0)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    error: type[Exception], match: str, call: Callable[[Tensor, Tensor], tuple[object, ...]]
) -> None:
    with pytest.raises(error, match=match):
        pyfeat.knn(*call(torch.randn(2, 4), torch.randn(6, 4)))  # type: ignore[call-overload]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["queries", "memory"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_features_that_are_not_finite_are_refused(bad: float, name: str, backend: Backend) -> None:
    inputs = {"queries": torch.randn(40, 20), "memory": torch.randn(50, 20)}
    inputs[name][33, 7] = bad
    with pytest.raises(ValueError, match=rf"knn: {name} must be finite, .* in row 33"):
        pyfeat.knn(inputs["queries"], inputs["memory"], backend=backend)


def test_an_unknown_metric_or_backend_is_refused() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"knn: metric must be one of 'euclidean'.*, got 'l2'"):
        pyfeat.knn(x, x, metric="l2")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"knn: backend must be one of .*, got 'gpu'"):
        pyfeat.knn(x, x, backend="gpu")  # type: ignore[call-overload]


def test_an_explicit_backend_never_falls_back() -> None:
    x = torch.empty(3, 2, device="meta")
    with pytest.raises(
        NotImplementedError, match=r"knn: backend 'cpu' does not support .* on meta"
    ):
        pyfeat.knn(x, x, backend="cpu")


def test_torch_sees_a_well_formed_operator() -> None:
    queries, memory = torch.randn(7, 20), torch.randn(30, 20)
    torch.library.opcheck(
        torch.ops.pyfeat.knn.default, (queries, memory, 3, "euclidean", None, False)
    )


def test_torch_compiles_it_in_one_graph() -> None:
    queries, memory = torch.randn(7, 20), torch.randn(30, 20)

    def doubled(q: Tensor, x: Tensor) -> Tensor:
        return pyfeat.knn(q, x, 3).distances * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, memory), doubled(queries, memory))


def test_what_stands_in_the_way_of_a_gpu_is_listed() -> None:
    x = torch.randn(80, 2)
    wanted = r"knn: backend 'triton' does not .*k must be at most 64, got 65; inputs are on cpu"
    with pytest.raises(NotImplementedError, match=wanted):
        pyfeat.knn(x, x, 65, backend="triton")
    with pytest.raises(NotImplementedError, match=r"range_search: .*it has no range_search"):
        pyfeat.range_search(x, x, 1.0, backend="triton")
    report = pyfeat.info()["backends"]
    assert isinstance(report, dict)
    assert set(report) == {"cpu", "cuda", "triton", "reference"}
