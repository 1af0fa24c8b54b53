"""Features of the searches on a GPU, and how many of their rows are listed."""

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.lists import FORMATS, SAMPLING, bounds, counts
from benchmarks.gpu.search import search_features
from benchmarks.harness import Shape
from pyfeat._frame import choose_frame
from tests.support_bounds import query_with_largest_errors, rows_with_largest_errors


@pytest.mark.parametrize("patch_like", [False, True])
def test_patch_like_queries_lie_in_the_clusters_of_the_memory(patch_like: bool) -> None:
    queries, memory = search_features(Shape(30, 2_000, 32), patch_like=patch_like)
    assert queries.shape == (30, 32)
    assert memory.shape == (2_000, 32)
    distances = torch.cdist(queries, memory)
    share = distances.amin(dim=1).median() / distances.median()
    assert (share < 0.2) == patch_like


_NEARLY_HALF = 0.5 - 2.0**-8


def whole_rows_with_largest_errors() -> tuple[Tensor, Tensor]:
    """Nearly half a unit of 127 to a row in all features but two, up in one and down in the other."""
    rows = torch.full((2, 64), 10.0)
    rows[0] += 1 - _NEARLY_HALF
    rows[1] += _NEARLY_HALF
    rows[:, :2] = torch.tensor([127.0, 0.0])
    return torch.ones(1, 64), torch.cat([rows, -rows])


def whole_query_with_largest_errors() -> tuple[Tensor, Tensor]:
    """The same of a query, always against the first row."""
    signs = torch.ones(64)
    signs[:32] = -1
    query = 10.5 + (_NEARLY_HALF - 0.5) * signs
    query[0], signs[0] = 127.0, 0.0
    return query[None], torch.stack([signs, -signs])


LARGEST_ERRORS = {
    "bfloat16": (rows_with_largest_errors, query_with_largest_errors),
    "int8": (whole_rows_with_largest_errors, whole_query_with_largest_errors),
}


@pytest.mark.parametrize("name", FORMATS)
def test_scores_lie_between_bounds_that_rounding_reaches(name: str) -> None:
    normal = search_features(Shape(20, 300, 64), patch_like=False)
    shares = []  # of the bound
    for queries, memory in (normal, *(make() for make in LARGEST_ERRORS[name])):
        low, high = bounds(queries.double(), memory.double(), name)
        frame = choose_frame(memory, "euclidean")
        q, x = ((each.double() - frame.mean) * frame.scale for each in (queries, memory))
        scores = x.square().sum(dim=1) / 2 - q @ x.T
        assert (low <= scores).all()
        assert (scores <= high).all()
        shares.append(float(((2 * scores - low - high).abs() / (high - low)).amax()))
    assert min(shares[1:]) > 0.9, shares


def test_as_many_rows_are_listed_as_are_sampled_one_of() -> None:
    features = search_features(Shape(100, 2_000, 16), patch_like=False)
    listed = counts(*features, "bfloat16").listed.double().mean()
    assert 0.6 * SAMPLING < listed < 1.6 * SAMPLING


def test_int8_leaves_more_rows_the_more_features_there_are() -> None:
    more = []
    for dim in (16, 256, 2_048):
        features = search_features(Shape(20, 2_000, dim), patch_like=False)
        found = {name: counts(*features, name) for name in FORMATS}
        assert all((each.ranked >= 1).all() for each in found.values())
        assert all((each.listed >= each.ranked).all() for each in found.values())
        more.append(found["int8"].ranked.double().mean() / found["bfloat16"].ranked.double().mean())
    assert 1 <= more[0] < more[1] / 1.5
    assert more[1] < more[2] / 3
