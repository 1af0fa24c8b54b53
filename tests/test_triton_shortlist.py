"""The shortlist of the Triton kernels: packing, bounds, marks, and the workspace they take."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support_triton import DEVICE, frame, pack, shortlist, similarity


def _packed(metric: str, group_rows: int) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """Shifted features with an outlier, their frame, and both packed."""
    queries, memory = torch.randn(20, 70) + 3, torch.randn(300, 70) + 3
    memory[77] *= 50
    queries, memory = queries.to(DEVICE), memory.to(DEVICE)
    chosen = frame.choose_frame(memory, metric)
    packed_memory = pack.pack_memory(
        memory, 0, 300, chosen, group_rows=group_rows, multiple=512, allowed=None
    )
    packed_queries = pack.pack_queries(queries, chosen, multiple=128)
    return queries, memory, chosen, packed_queries, packed_memory


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "inner_product"])
def test_bounds_hold_for_every_pair_and_are_not_idle(metric: str) -> None:
    queries, memory, chosen, packed_queries, packed = _packed(metric, 8)
    q, x = queries.double(), memory.double()
    if metric == "cosine":
        q, x = q / q.norm(dim=1, keepdim=True), x / x.norm(dim=1, keepdim=True)
    q, x = (q - chosen.mean) * chosen.scale, (x - chosen.mean) * chosen.scale
    terms = x.square().sum(1) / 2
    if metric == "inner_product":
        terms = -(x @ (chosen.mean * chosen.scale))
    exact = terms - q @ x.T  # [Q, N]
    products = packed_queries.values[:20].double() @ packed.values[:300].double().T
    error = (packed.row_terms[:300].double() - products - exact).abs()

    row = torch.arange(300, device=DEVICE)
    group = row // 128 * 16 + row % 128 % 16
    norm, residual, slack = packed_queries.bounds.double()[:, :, None]  # [Q, 1] each
    reach, row_norm, row_slack = packed.bounds.double()[:, group]  # [N] each
    bound = norm * reach + residual * row_norm + slack + row_slack
    assert (error <= bound).all()
    assert (error / bound).mean() > 0.02


@pytest.mark.parametrize("group_rows", [8, 16])
def test_a_group_has_the_smallest_score_of_its_rows(group_rows: int) -> None:
    *_, queries, memory = _packed("euclidean", group_rows)
    scores = torch.empty((20, memory.num_groups), device=DEVICE)
    shortlist.group_scores(queries, memory, None, scores)
    products = queries.values[:20].double() @ memory.values.double().T  # [Q, slots]
    tiles = (memory.row_terms - products).view(20, -1, group_rows, 128 // group_rows)
    expected = tiles.amin(2).flatten(1)
    assert scores.isinf().any()  # the last tile is not full
    assert torch.equal(scores.isinf(), expected.isinf())
    assert torch.allclose(scores.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("small", [1.9 * 2.0**-24, 1.9 * 2.0**-17, 2.0**-9])
def test_products_lose_no_more_than_the_bound_allows(small: float) -> None:
    # Beside the first product, the others vanish or lose their last bits, all in one direction.
    dim = 1024
    row = torch.full((dim,), small).bfloat16()
    row[0] = 1
    packed_queries = pack.PackedQueries(
        torch.ones((128, dim)).to(DEVICE, pack._packed_dtype(torch.empty(0, device=DEVICE))),
        torch.ones(128, device=DEVICE),
        torch.zeros((3, 128), device=DEVICE),
    )
    packed = pack.PackedMemory(
        0,
        256,
        16,
        row.repeat(256, 1).to(packed_queries.values),
        torch.zeros(256, device=DEVICE),
        torch.ones(256, device=DEVICE),
        torch.zeros((3, 16), device=DEVICE),
    )
    scores = torch.empty((128, 16), device=DEVICE)
    shortlist.group_scores(packed_queries, packed, None, scores)
    exact = row.double().sum()
    allowed = 4 * dim * 2.0**-24 * exact  # g of pack.py, times sum |q_d x_d|
    assert ((scores.cpu().double() + exact).abs() <= allowed).all()


def test_queries_beyond_the_range_of_the_packed_form_have_no_bound() -> None:
    chosen = frame.choose_frame(1e-3 * torch.randn(50, 8, device=DEVICE), "euclidean")
    queries = torch.tensor([[1.0], [1e12], [1e18], [1e38]], device=DEVICE).repeat(1, 8)
    packed = pack.pack_queries(queries, chosen, multiple=128)
    assert packed.bounds[0].isfinite().tolist() == [True, True, False, False]
    assert packed.values.isfinite().all()


def test_bounds_leave_room_for_what_tensor_cores_may_lose() -> None:
    # Rows that are packed without loss: what remains is one unit for each product, and two more for
    # each instruction, which takes at least four products.
    memory = (torch.rand(128, 384) < 0.5).float() * 2 - 1
    memory[64:] = -memory[:64]
    chosen = frame.choose_frame(memory.to(DEVICE), "euclidean")
    packed = pack.pack_memory(
        memory.to(DEVICE), 0, 128, chosen, group_rows=16, multiple=256, allowed=None
    )
    reach, norm = packed.bounds[0, :8].double(), packed.bounds[1, :8].double()
    assert (reach >= 1.5 * 384 * 2.0**-23 * norm).all()
    assert (reach <= 2.1 * 384 * 2.0**-23 * norm).all()


@pytest.mark.parametrize("k", [1, 3, 64])
def test_groups_are_marked_up_to_the_kth_upper_bound(k: int) -> None:
    *_, queries, memory = _packed("euclidean", 8)
    scores = torch.randn(20, memory.num_groups)
    scores[:, 11] = torch.inf  # no rows
    scores[5, 1:] = torch.inf
    queries.bounds[0, 7] = torch.inf  # no bound for this query
    memory.bounds[0, 20] = torch.inf  # nor for this group
    queries.bounds[0, 8] = torch.nan
    kept = torch.full((20, shortlist.LANES), torch.inf, device=DEVICE)
    words = shortlist.mark_words(memory.num_groups)
    marks = torch.zeros((20, words), dtype=torch.int32, device=DEVICE)
    shortlist.mark_groups(scores.to(DEVICE), queries, memory, k, kept, marks)
    bits = (marks.cpu()[:, :, None] >> torch.arange(32)) & 1
    marked = bits.flatten(1)[:, : memory.num_groups] != 0

    norm, residual, slack = queries.bounds.cpu().double()[:, :, None]
    reach, row_norm, row_slack = memory.bounds.cpu().double()
    error = norm * reach + residual * row_norm + slack + row_slack
    uppers = (scores + error).nan_to_num(torch.inf, torch.inf).sort(dim=1).values
    needed = scores.isfinite() & ~(scores - error > uppers[:, k - 1 : k])
    assert (marked | ~needed).all()
    assert torch.equal(marked[7:9], scores[7:9].isfinite())
    assert torch.equal(marked[:, 20], scores[:, 20].isfinite())
    assert (marked & ~needed).sum() == 0


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("k", [1, 9])
def test_few_groups_are_ranked(k: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = []

    def count(*arguments: Any) -> None:
        marks = arguments[6]  # [Q, words] int32
        marked.append(sum((word & 0xFFFFFFFF).bit_count() for word in marks.flatten().tolist()))

    monkeypatch.setattr(similarity, "rank_marked", count)
    queries, memory = torch.randn(40, 152) + shift, torch.randn(1500, 152) + shift
    similarity.knn(queries.to(DEVICE), memory.to(DEVICE), k, "euclidean")
    assert k * 40 <= sum(marked) <= (2 * k + 1) * 40


@pytest.mark.parametrize(
    ("num_queries", "num_rows", "dim", "k"),
    list(itertools.product([1, 784, 10**6], [1, 70_000, 10**8], [1, 384, 131_072], [1, 64])),
)
def test_the_workspace_stays_under_256_mb(
    num_queries: int, num_rows: int, dim: int, k: int
) -> None:
    group_rows = similarity._group_rows(k)
    chunks = similarity._plan(num_queries, num_rows, dim, group_rows=group_rows)
    assert chunks.rows % shortlist.ROW_MULTIPLE == 0
    assert chunks.queries % shortlist.QUERY_MULTIPLE == 0
    width, groups = pack.packed_width(dim), chunks.rows // group_rows
    assert chunks.rows * width < 2**31  # offsets in the kernels are int32
    assert chunks.queries * groups < 2**31
    size = chunks.rows * (2 * width + 4 + 8) + 12 * groups  # packed rows
    size += chunks.queries * (2 * width + 8 + 12)  # packed queries
    size += chunks.queries * (4 * groups + groups // 8)  # scores and marks
    size += chunks.queries * (4 * shortlist.LANES + 5 * 16 * k)  # bounds, candidates and their sort
    assert size <= 256 << 20
