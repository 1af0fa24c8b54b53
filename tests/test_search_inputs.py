"""What may be searched: dtypes, masks, rows that are not finite, memories on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pyfeat
from pyfeat import reference
from pyfeat._backends import Backend
from pyfeat.search import METRICS, Metric
from tests.support import ENGINES, assert_exact_neighbours, kernel_knn, make_features

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated"])
def test_every_dtype_is_exact(dtype: torch.dtype, metric: Metric, kind: str) -> None:
    queries, memory = make_features(kind, 33, 700, 45)
    if kind == "shifted" and dtype == torch.float16:
        queries, memory = queries - 1e6 + 1e3, memory - 1e6 + 1e3
    queries, memory = queries.to(dtype), memory.to(dtype)
    for k in (1, 9, 700):
        found = pyfeat.knn(queries, memory, k, metric=metric)
        assert_exact_neighbours(*found, queries, memory, k, metric)


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_without_loss(isa: str, precision: str, dtype: torch.dtype) -> None:
    # Every finite value of the dtype, subnormal ones too.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = bits[bits.isfinite()]
    memory = values[: len(values) // 16 * 16].view(-1, 16)
    queries = memory[torch.randperm(len(memory))[:40]]
    distances, indices, _ = kernel_knn(
        queries, memory, 2, "sqeuclidean", isa=isa, precision=precision
    )
    expected = reference.knn(queries, memory, 2, "sqeuclidean")
    assert torch.equal(indices, expected[1])
    assert torch.allclose(distances, expected[0], rtol=1e-6, atol=0.0)


def test_float64_tells_apart_what_float32_cannot() -> None:
    row = torch.rand(40, dtype=torch.float64) + 1
    memory = row.repeat(300, 1)
    for i in range(300):
        memory[i, i % 40] += (i % 7 + 1) * torch.finfo(torch.float64).eps
    found = pyfeat.knn(memory[::5].contiguous(), memory, 3)
    expected = reference.knn(memory[::5], memory, 3, "euclidean")
    assert found.distances.dtype == torch.float64
    # The square root of torch may be off by a unit in the last place.
    torch.testing.assert_close(found.distances, expected[0], rtol=2.0**-52, atol=0.0)
    assert torch.equal(found.indices, expected[1])


@pytest.mark.parametrize("scale", [1e-140, 1e-20, 1e15, 1e140])
def test_float64_of_any_scale_is_exact(scale: float) -> None:
    queries, memory = torch.randn(20, 30).double() * scale, torch.randn(900, 30).double() * scale
    found = pyfeat.knn(queries, memory, 4)
    assert torch.equal(found.indices, reference.knn(queries, memory, 4, "euclidean")[1])


def test_float64_too_large_for_its_own_squares_is_refused() -> None:
    memory = torch.ones(50, 3, dtype=torch.float64)
    memory[7] = 1e200
    with pytest.raises(ValueError, match=r"knn: memory must be finite and of norm .* in row 7"):
        pyfeat.knn(memory[:5], memory)


@pytest.mark.parametrize("features", ["sparse", "heavy-tailed"])
@pytest.mark.parametrize(("isa", "precision"), ENGINES)
def test_unusual_features_are_exact(features: str, isa: str, precision: str) -> None:
    memory = torch.randn(2000, 60)
    if features == "sparse":
        memory = memory * (torch.rand(2000, 60) < 0.05)
    else:
        memory = memory / torch.rand(2000, 60).pow(2).clamp_min(1e-6)
    queries = memory[::50] + 0.01 * torch.randn(40, 60)
    for metric in METRICS:
        found = kernel_knn(queries, memory, 6, metric, isa=isa, precision=precision)
        assert_exact_neighbours(found[0], found[1], queries, memory, 6, metric)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kept", [0.002, 0.5])
@pytest.mark.parametrize("per_query", [False, True])
def test_masked_rows_are_never_returned(
    backend: Backend, metric: Metric, kept: float, per_query: bool
) -> None:
    queries, memory = make_features("duplicated", 40, 1500, 30)
    mask = torch.rand(40, 1500) < kept
    if not per_query:
        mask = mask[0]
    for k in (1, 8, 1500):
        found = pyfeat.knn(queries, memory, k, metric=metric, mask=mask, backend=backend)
        distances = reference.pairwise_distances(queries, memory, metric)
        none = -torch.inf if metric == "inner_product" else torch.inf
        ordered = distances.masked_fill(~mask, none).sort(
            dim=1, stable=True, descending=metric == "inner_product"
        )
        missing = ordered.values[:, :k].isinf()
        assert torch.equal(found.indices < 0, missing)
        assert torch.equal(found.distances.isinf(), missing)
        best = ordered.values[:, :k].float()
        assert torch.allclose(found.distances, best, rtol=1e-5, atol=1e-6)
        allowed = mask.expand(40, 1500).gather(1, found.indices.clamp_min(0))
        assert (allowed | missing).all()


def test_a_mask_of_strided_rows_and_of_numpy_is_read_right() -> None:
    queries, memory = torch.randn(5, 8), torch.randn(300, 8)
    wide = torch.rand(5, 600) < 0.3
    expected = reference.knn(queries, memory, 4, "euclidean", wide[:, ::2])
    assert torch.equal(pyfeat.knn(queries, memory, 4, mask=wide[:, ::2]).indices, expected[1])
    found = pyfeat.knn(queries.numpy(), memory.numpy(), 4, mask=wide[:, ::2].numpy())
    assert np.array_equal(found.indices, expected[1].numpy())


def test_missing_neighbours_have_no_gradient() -> None:
    queries, memory = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[[2, 5]] = True
    distances = pyfeat.knn(queries, memory, 4, mask=mask).distances
    distances[:, :2].sum().backward()  # type: ignore[no-untyped-call]
    assert memory.grad is not None
    assert memory.grad.isfinite().all()
    assert torch.equal(memory.grad.abs().sum(1) > 0, mask)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_skipped_when_asked(
    backend: Backend, dtype: torch.dtype, bad: float
) -> None:
    queries, memory = torch.randn(30, 12).to(dtype), torch.randn(400, 12).to(dtype)
    lost, kept = torch.arange(0, 400, 7), torch.ones(400, dtype=torch.bool)
    memory[lost, lost % 12] = bad
    kept[lost] = False
    queries[11, 3] = bad
    for metric in METRICS:
        for k in (2, 400):
            found = pyfeat.knn(queries, memory, k, metric=metric, nonfinite="skip", backend=backend)
            clean = torch.arange(30) != 11
            expected = pyfeat.knn(queries[clean], memory[kept], min(k, 342), metric=metric)
            positions = kept.nonzero()[:, 0]
            width = expected.indices.shape[1]
            assert torch.equal(found.indices[clean, :width], positions[expected.indices])
            assert (found.indices[clean, width:] == -1).all()
            assert (found.indices[11] == -1).all()
            assert found.distances[11].isinf().all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_memory_on_disk_is_searched_where_it_lies(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "memory.bin"
    rng = np.random.default_rng(0)
    rng.standard_normal((3000, 24)).astype(dtype).tofile(path)
    memory = np.memmap(path, dtype=dtype, mode="r", shape=(3000, 24))
    queries: NDArray[Any] = np.asarray(rng.standard_normal((17, 24)), dtype=dtype)
    found = pyfeat.knn(queries, memory, 3)
    expected = reference.knn(
        torch.from_numpy(queries), torch.from_numpy(np.array(memory)), 3, "euclidean"
    )
    assert np.array_equal(found.indices, expected[1].numpy())


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, r"knn: mask must be bool, got int64", {"mask": torch.ones(6).long()}),
        (ValueError, r"knn: mask must have shape \(6,\) or \(2, 6\), got \(5,\)", {"mask": torch.ones(5) > 0}),
        (ValueError, r"knn: mask must have shape .*, got \(6, 2\)", {"mask": torch.ones(6, 2) > 0}),
        (ValueError, r"knn: nonfinite must be one of 'raise', 'skip', got 'drop'", {"nonfinite": "drop"}),
    ],
)  # fmt: skip
def test_bad_options_are_named(
    error: type[Exception], match: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(error, match=match):
        pyfeat.knn(torch.randn(2, 4), torch.randn(6, 4), **arguments)  # type: ignore[call-overload]


def test_features_of_two_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"knn: memory must be float16, got float32"):
        pyfeat.knn(torch.zeros(1, 3).half(), torch.zeros(2, 3))


@pytest.mark.parametrize("num_queries", [1, 6])
def test_few_queries_look_at_every_row_and_name_the_first_that_is_not_finite(
    num_queries: int,
) -> None:
    queries, memory = torch.randn(num_queries, 20), torch.randn(20_000, 20)
    distances, indices, counters = kernel_knn(queries, memory, 7, "euclidean")
    assert_exact_neighbours(distances, indices, queries, memory, 7, "euclidean")
    assert counters == (0, 0, num_queries)
    memory[[19_999, 7_003]] = torch.nan
    with pytest.raises(ValueError, match=r"knn: memory must be finite, .* in row 7003"):
        pyfeat.knn(queries, memory, 7)
    found = pyfeat.knn(queries, memory, 7, nonfinite="skip")
    finite = torch.arange(20_000)[memory.isfinite().all(dim=1)]
    assert torch.equal(found.indices, finite[pyfeat.knn(queries, memory[finite], 7).indices])
