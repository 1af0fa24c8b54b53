"""Gradients of the distances that ``knn`` returns."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import _ops, reference
from pyfeat._backends import Backend
from pyfeat.search import METRICS, Metric


def _gradients(
    search: Callable[[Tensor, Tensor, int, str], tuple[Tensor, Tensor]],
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: Metric,
) -> tuple[Tensor, Tensor]:
    queries, memory = queries.clone().requires_grad_(), memory.clone().requires_grad_()
    distances = search(queries, memory, k, metric)[0]
    weights = torch.linspace(-1, 1, distances.numel()).view_as(distances).to(distances)
    grad_queries, grad_memory = torch.autograd.grad((distances * weights).sum(), (queries, memory))
    return grad_queries, grad_memory


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (33, 257, 31, 5), (9, 12, 3, 12)], ids=str)
def test_gradients_equal_those_of_the_reference(
    metric: Metric, shape: tuple[int, int, int, int]
) -> None:
    num_queries, num_rows, dim, k = shape
    queries, memory = torch.randn(num_queries, dim), torch.randn(num_rows, dim)
    found = _gradients(_ops.knn, queries, memory, k, metric)
    exact = _gradients(reference.knn, queries.double(), memory.double(), k, metric)
    for actual, expected in zip(found, exact, strict=True):
        assert actual.dtype == torch.float32
        # Sums of at most Q k terms of float32 precision.
        bound = 1e-6 * (1.0 + expected.abs().max() + num_queries**0.5)
        assert (actual.double() - expected).abs().max() <= bound


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_passes_gradcheck(metric: Metric) -> None:
    queries = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def distances(q: Tensor, x: Tensor) -> Tensor:
        return reference.knn(q, x, 2, metric)[0]

    assert torch.autograd.gradcheck(distances, (queries, memory))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_distance_of_zero_and_a_zero_vector_have_finite_gradients(
    metric: Metric, backend: Backend
) -> None:
    memory = torch.randn(5, 4)
    memory[2] = 0.0
    queries = torch.cat([memory[:1], torch.zeros(1, 4)]).requires_grad_()
    memory.requires_grad_()
    distances = pyfeat.knn(queries, memory, 3, metric=metric, backend=backend).distances
    for gradient in torch.autograd.grad(distances.sum(), (queries, memory)):
        assert torch.isfinite(gradient).all()


def test_gradients_do_not_depend_on_the_number_of_threads_or_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries, memory = torch.randn(200, 16), torch.randn(300, 16)
    expected = _gradients(_ops.knn, queries, memory, 4, "euclidean")
    monkeypatch.setattr(_ops, "_BACKWARD_BYTES", 10_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other = _gradients(_ops.knn, queries, memory, 4, "euclidean")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(expected[0], other[0])
    assert torch.equal(expected[1], other[1])


def test_one_input_alone_may_need_a_gradient() -> None:
    queries, memory = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    distances = pyfeat.knn(queries, memory).distances
    assert torch.autograd.grad(distances.sum(), queries)[0].shape == (6, 4)
    with torch.no_grad():
        assert not pyfeat.knn(queries, memory).distances.requires_grad


def test_the_gradient_passes_through_opcheck_and_compile() -> None:
    queries = torch.randn(7, 20, requires_grad=True)
    memory = torch.randn(30, 20, requires_grad=True)
    torch.library.opcheck(
        torch.ops.pyfeat.knn.default, (queries, memory, 3, "euclidean", None, False)
    )

    def loss(q: Tensor, x: Tensor) -> Tensor:
        return pyfeat.knn(q, x, 3).distances.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(queries, memory), (queries, memory))
    found = torch.autograd.grad(compiled(queries, memory), (queries, memory))
    assert torch.allclose(found[0], expected[0])
    assert torch.allclose(found[1], expected[1])


def test_a_bank_gives_no_gradient_in_silence() -> None:
    queries = torch.randn(3, 2, requires_grad=True)
    assert not pyfeat.MemoryBank(torch.randn(4, 2)).search(queries).distances.requires_grad
