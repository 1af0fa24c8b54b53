"""``pyfeat.knn`` on the backends of a GPU, against float64 brute force on the CPU."""

import pytest
import torch
from torch import Tensor

import pyfeat
from pyfeat import reference
from pyfeat.search import Metric
from tests.support import assert_exact_neighbours, make_features
from tests.support_gpu import Target, each_gpu_target, each_target

METRICS: tuple[Metric, ...] = ("euclidean", "sqeuclidean", "cosine", "inner_product")


def knn_on(
    target: Target,
    queries: Tensor,
    memory: Tensor,
    k: int,
    metric: Metric = "euclidean",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The public op on a target, for tensors of the CPU; the answer comes back."""
    found = pyfeat.knn(
        target(queries),
        target(memory),
        k,
        metric=metric,
        mask=None if mask is None else target(mask),
        backend=target.backend,
    )
    for x in found:
        assert x.device == target.device
    return found.distances.cpu(), found.indices.cpu()


@each_target
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated", "strided"])
@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1, 1), 1), ((1, 4_097, 33), 10), ((33, 1_031, 129), 9), ((257, 259, 17), 1)],
)
def test_neighbours_equal_float64_brute_force(
    target: Target, kind: str, shape: tuple[int, int, int], k: int
) -> None:
    queries, memory = make_features(kind, *shape)
    found = knn_on(target, queries, memory, k)
    assert_exact_neighbours(*found, queries, memory, k, "euclidean")


@each_target
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 5, 64])
def test_every_metric_and_number_of_neighbours_is_exact(
    target: Target, metric: Metric, k: int
) -> None:
    queries, memory = make_features("plain", 37, 517, 45)
    found = knn_on(target, queries, memory, k, metric)
    assert_exact_neighbours(*found, queries, memory, k, metric)


@each_target
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_the_scale_of_the_data_does_not_matter(target: Target, scale: float) -> None:
    queries, memory = (scale * x for x in make_features("plain", 9, 300, 20))
    memory[::7] *= 1e3
    found = knn_on(target, queries, memory, 3)
    assert_exact_neighbours(*found, queries, memory, 3, "euclidean")


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_exact(target: Target, dtype: torch.dtype) -> None:
    queries, memory = (x.to(dtype) for x in make_features("plain", 20, 600, 45))
    found = knn_on(target, queries, memory, 5)
    expected = reference.knn(queries.double(), memory.double(), 5, "euclidean")
    assert torch.equal(found[1], expected[1])
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-7, atol=0.0)


@each_target
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_only_allowed_rows_are_found(target: Target, per_query: bool, strided: bool) -> None:
    queries, memory = make_features("duplicated", 12, 400, 24)
    mask = torch.rand((12, 400) if per_query else (400,)) < 0.1
    if strided:
        mask = mask.T.contiguous().T if per_query else mask.repeat_interleave(2)[::2]
    found = knn_on(target, queries, memory, 9, mask=mask)
    expected = pyfeat.knn(queries, memory, 9, mask=mask, backend="reference")
    assert torch.equal(found[1], expected.indices)
    torch.testing.assert_close(found[0], expected.distances, rtol=1e-6, atol=0.0)


@each_target
def test_rows_that_are_not_finite_are_refused_or_skipped(target: Target) -> None:
    queries, memory = make_features("plain", 5, 90, 7)
    memory[17, 3], queries[2, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"knn: .* must be finite, got NaN or infinity in row"):
        knn_on(target, queries, memory, 1)
    found = pyfeat.knn(target(queries), target(memory), 3, nonfinite="skip", backend=target.backend)
    expected = pyfeat.knn(queries, memory, 3, nonfinite="skip", backend="reference")
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert (found.indices[2] == -1).all()


@each_target
@pytest.mark.parametrize("metric", METRICS)
def test_distances_have_the_gradients_of_the_reference(target: Target, metric: Metric) -> None:
    queries, memory = make_features("plain", 19, 130, 11)
    weights = torch.randn(19, 4, dtype=torch.float64)
    results = []
    for dtype, backend, move in (
        (torch.float32, target.backend, target),
        (torch.float64, "reference", lambda x: x),
    ):
        leaves = [move(x).to(dtype).requires_grad_() for x in (queries, memory)]
        distances = pyfeat.knn(*leaves, 4, metric=metric, backend=backend).distances  # type: ignore[call-overload]
        total = (distances.double().cpu() * weights).sum()
        results.append([x.cpu().double() for x in torch.autograd.grad(total, leaves)])
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))


@each_target
@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 1, 0), (4, 5, 0)])
def test_empty_inputs_have_answers(target: Target, shape: tuple[int, int, int]) -> None:
    distances, indices = knn_on(target, *make_features("plain", *shape), 1)
    assert distances.shape == indices.shape == (shape[0], 1)
    assert not distances.any()
    assert not indices.any()


@each_target
def test_two_runs_give_equal_bits(target: Target) -> None:
    queries, memory = make_features("shifted", 65, 700, 40)
    first, second = (knn_on(target, queries, memory, 5, "cosine") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@each_target
def test_more_neighbours_than_rows_are_refused(target: Target) -> None:
    with pytest.raises(ValueError, match=r"knn: k must be .*, got 6"):
        knn_on(target, *make_features("plain", 2, 5, 3), 6)


@each_gpu_target
def test_what_kernels_do_not_serve_is_refused_with_reasons(target: Target) -> None:
    queries, memory = (target(x) for x in make_features("plain", 2, 100, 3))
    with pytest.raises(NotImplementedError, match=f"backend '{target.backend}' does not.*k must"):
        pyfeat.knn(queries, memory, 65, backend=target.backend)
    with pytest.raises(NotImplementedError, match=f"inputs are on {target.device}"):
        pyfeat.knn(queries, memory, 1, backend="cpu")
    with pytest.raises(ValueError, match="knn: memory must be on"):
        pyfeat.knn(queries, memory.cpu(), 1)


@pytest.mark.slow
@each_gpu_target
@pytest.mark.parametrize("kind", ["plain", "shifted", "duplicated"])
@pytest.mark.parametrize(
    ("shape", "k"), [((4_096, 100_000, 384), 1), ((784, 16_384, 1_536), 9), ((1, 200_000, 768), 64)]
)
def test_large_sizes_are_exact(
    target: Target, kind: str, shape: tuple[int, int, int], k: int
) -> None:
    queries, memory = make_features(kind, *shape)
    found = pyfeat.knn(target(queries), target(memory), k, backend=target.backend)
    some = torch.randperm(shape[0])[:17]
    chosen = found.distances.cpu()[some], found.indices.cpu()[some]
    assert_exact_neighbours(*chosen, queries[some], memory, k, "euclidean")
