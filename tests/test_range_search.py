"""Range search against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyfeat
from pyfeat import _C, reference
from pyfeat._backends import Backend
from pyfeat._checks import as_mask, as_matrix
from pyfeat.search import METRICS, Metric, RangeNeighbours
from tests.support import ENGINES, make_features


def assert_same_rows(
    found: RangeNeighbours, queries: Tensor, memory: Tensor, radius: float, metric: Metric
) -> None:
    """Fail unless they are the rows of the reference, but for those at the radius by rounding."""
    exact = reference.pairwise_distances(queries, memory, metric)  # [Q, N]
    # cosine: vectors of length 1 are rounded, so that even equal ones may lie 1e-16 apart.
    spare = max(1e-13 * float(exact.abs().max()), 1e-15) if exact.numel() else 0.0
    for q in range(len(queries)):
        part = slice(int(found.offsets[q]), int(found.offsets[q + 1]))
        rows, distances = found.indices[part], exact[q, found.indices[part]]
        inside = exact[q] if metric == "inner_product" else -exact[q]
        bound = radius if metric == "inner_product" else -radius
        surely = (inside >= bound + spare).nonzero()[:, 0]
        assert set(surely.tolist()) <= set(rows.tolist())
        assert (inside[rows] >= bound - spare).all()
        order = distances.diff() if metric != "inner_product" else -distances.diff()
        assert (order >= -spare).all()
        assert len(rows.unique()) == len(rows)  # type: ignore[no-untyped-call]
        assert torch.allclose(found.distances[part].double(), distances, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated", "strided"])
@pytest.mark.parametrize("quantile", [0.0, 0.01, 0.6, 1.0])
def test_rows_within_a_radius_are_those_of_brute_force(
    backend: Backend, metric: Metric, kind: str, quantile: float
) -> None:
    for shape in [(1, 1, 1), (31, 257, 33), (257, 1301, 20)]:
        queries, memory = make_features(kind, *shape)
        exact = reference.pairwise_distances(queries, memory, metric).flatten()
        radius = float(exact.sort().values[int(quantile * (len(exact) - 1))])
        found = pyfeat.range_search(queries, memory, radius, metric=metric, backend=backend)
        assert found.offsets.shape == (shape[0] + 1,)
        assert_same_rows(found, queries, memory, radius, metric)


@pytest.mark.parametrize(("isa", "precision"), ENGINES)
@pytest.mark.parametrize("metric", METRICS)
def test_every_precision_finds_the_same_rows(isa: str, precision: str, metric: Metric) -> None:
    queries, memory = make_features("shifted", 30, 3000, 70)
    exact = reference.pairwise_distances(queries, memory, metric)
    radius = float(exact.flatten().sort().values[exact.numel() // 50])
    offsets, distances, indices, counters = _C.within_cpu(
        as_matrix(queries),
        as_matrix(memory),
        radius,
        getattr(_C.Metric, metric),
        as_mask(None),
        _C.NonFinite.refuse,
        2,
        isa,
        precision,
    )
    found = RangeNeighbours(*map(torch.from_numpy, (offsets, distances, indices)))
    assert_same_rows(found, queries, memory, radius, metric)
    assert counters[2] == 0


@given(
    num_queries=st.integers(0, 30),
    num_rows=st.integers(0, 90),
    dim=st.integers(0, 20),
    levels=st.integers(0, 3),
    radius=st.floats(-1.0, 6.0),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_any_sizes_and_radii_are_exact(
    num_queries: int,
    num_rows: int,
    dim: int,
    levels: int,
    radius: float,
    metric: Metric,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_queries + num_rows, dim, generator=generator)
    if levels:
        features, radius = (features * levels / 2).round(), float(round(radius))
    queries, memory = features[:num_queries], features[num_queries:]
    found = pyfeat.range_search(queries, memory, radius, metric=metric)
    assert_same_rows(found, queries, memory, radius, metric)
    if levels and metric != "cosine":  # whole numbers: nothing rounds, and rows tie at the radius
        expected = reference.range_search(queries, memory, radius, metric)
        assert torch.equal(found.offsets, expected[0])
        assert torch.equal(found.indices, expected[2])


def test_masks_and_rows_that_are_not_finite_are_left_out() -> None:
    queries, memory = torch.randn(20, 9), torch.randn(500, 9)
    mask = torch.rand(20, 500) < 0.5
    found = pyfeat.range_search(queries, memory, 3.5, mask=mask)
    expected = reference.range_search(queries, memory, 3.5, "euclidean", mask)
    assert torch.equal(found.indices, expected[2])
    memory[5], queries[3] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"range_search: queries must be finite.*row 3"):
        pyfeat.range_search(queries, memory, 3.5)
    with pytest.raises(ValueError, match=r"range_search: memory must be finite.*row 5"):
        pyfeat.range_search(queries[:2], memory, 3.5)
    found = pyfeat.range_search(queries, memory, 3.5, nonfinite="skip")
    assert 5 not in found.indices
    assert found.offsets[3] == found.offsets[4]


def test_thread_count_does_not_change_what_is_found() -> None:
    queries, memory = torch.randn(7, 30), torch.randn(4000, 30)
    many = pyfeat.range_search(queries, memory, 6.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = pyfeat.range_search(queries, memory, 6.5)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


def test_numpy_arrays_give_numpy_arrays() -> None:
    rng = np.random.default_rng(0)
    queries, memory = rng.standard_normal((4, 5)), rng.standard_normal((80, 5))
    found = pyfeat.range_search(queries, memory, 2.0)
    assert isinstance(found.indices, np.ndarray)
    assert found.distances.dtype == np.float64
    assert found.offsets[-1] == len(found.indices) == len(found.distances)


def test_a_radius_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"range_search: radius must be a number, got nan"):
        pyfeat.range_search(torch.zeros(1, 2), torch.zeros(3, 2), float("nan"))
