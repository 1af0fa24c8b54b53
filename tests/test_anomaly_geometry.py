"""Normals and fast point feature histograms against definitions written out point by point."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat.anomaly.geometry import Neighbourhoods, estimate_normals, fpfh, neighbourhoods

Array = NDArray[np.float64]


def cloud(count: int = 60, seed: int = 0) -> Tensor:
    """(count, 3): points of a wavy sheet."""
    random = np.random.default_rng(seed)
    x, y = random.uniform(-2, 2, (2, count))
    z = 50 + np.sin(2 * x) + 0.3 * y**2 + random.normal(0, 0.05, count)
    return torch.from_numpy(np.stack([x, y, z], axis=1)).float()


def pair(p: Array, n: Array, q: Array, m: Array) -> Array:
    """Angles of two points as Open3D defines them."""
    d = q - p
    length = np.linalg.norm(d)
    if length == 0:
        return np.zeros(3)
    first, second = float(n @ d / length), float(m @ d / length)
    if math.acos(min(abs(first), 1.0)) > math.acos(min(abs(second), 1.0)):
        n, m, d, third = m, n, -d, -second
    else:
        third = first
    v = np.cross(d, n)
    if np.linalg.norm(v) == 0:
        return np.zeros(3)
    v /= np.linalg.norm(v)
    w = np.cross(n, v)
    return np.array([math.atan2(w @ m, n @ m), v @ m, third])


def spelled_out(points: Tensor, normals: Tensor, k: int, radius: float) -> Array:
    """(P, 33): the histograms, one pair after the other."""
    p, n = points.double().numpy(), normals.double().numpy()
    squared = ((p[:, None] - p) ** 2).sum(-1)
    near = []
    for i in range(len(p)):
        order = [j for j in np.argsort(squared[i], kind="stable") if j != i][:k]
        near.append([j for j in order if squared[i, j] <= radius**2])
    simple = np.zeros((len(p), 33))
    for i, others in enumerate(near):
        for j in others:
            angles = pair(p[i], n[i], p[j], n[j])
            places = [
                (angles[0] + math.pi) / (2 * math.pi),
                (angles[1] + 1) / 2,
                (angles[2] + 1) / 2,
            ]
            for number, place in enumerate(places):
                simple[i, 11 * number + min(10, max(0, math.floor(11 * place)))] += 100 / len(
                    others
                )
    result = np.zeros_like(simple)
    for i, others in enumerate(near):
        for number in range(3):
            part = slice(11 * number, 11 * number + 11)
            for j in others:
                if squared[i, j] > 0:
                    result[i, part] += simple[j, part] / squared[i, j]
            if result[i, part].sum() > 0:
                result[i, part] *= 100 / result[i, part].sum()
        result[i] += simple[i]
    return result


def around(points: Tensor, k: int = 12, radius: float = math.inf) -> Neighbourhoods:
    return neighbourhoods(points, k=k, radius=radius)


@pytest.mark.parametrize("radius", [math.inf, 0.8], ids=["all", "near"])
def test_histograms_are_those_of_the_formula(radius: float) -> None:
    points = cloud()
    near = around(points, radius=radius)
    assert radius == math.inf or 0.2 < near.near.float().mean() < 0.9
    normals = estimate_normals(points, near)
    found = fpfh(points, normals, near).double().numpy()
    expected = spelled_out(points, normals, 12, radius)
    # An angle on the edge of two bins, by rounding, moves a share of one of at most 12 neighbours.
    assert (np.abs(found - expected) < 1e-3).mean() > 0.995
    assert np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


def test_histograms_sum_to_two_hundred_and_do_not_depend_on_the_pose() -> None:
    points = cloud(400)
    near = around(points, 20)
    normals = estimate_normals(points, near)
    found = fpfh(points, normals, near)
    assert torch.allclose(found.view(-1, 3, 11).sum(dim=2), torch.full((), 200.0), atol=1e-2)
    angle = 0.7
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    turned = fpfh(points @ turn.T + torch.tensor([3.0, -4.0, 9.0]), normals @ turn.T, near)
    assert (found - turned).abs().median() < 1e-3
    assert (found - turned).abs().mean() < 1.0


def test_a_plane_and_a_sphere_differ() -> None:
    flat = cloud(200)
    flat[:, 2] = 10 + 0.5 * flat[:, 0]
    up = torch.randn(200, 3)
    ball = up / up.norm(dim=1, keepdim=True)
    one, other = (
        fpfh(points, estimate_normals(points, around(points)), around(points)).mean(dim=0)
        for points in (flat, ball)
    )
    assert one[[5, 16, 27]].min() > 195  # all angles of a plane are 0, in the middle bins
    assert other[16] < 190 or other[27] < 100


def test_normals_are_those_of_planes_and_face_the_sensor() -> None:
    points = cloud(300) + torch.tensor([1000.0, -1000.0, 0.0])
    points[:, 2] = 5000 + 0.5 * points[:, 0] - 0.25 * points[:, 1]
    normals = estimate_normals(points, around(points))
    expected = torch.tensor([0.5, -0.25, -1.0])
    assert (normals - expected / expected.norm()).abs().max() < 1e-2
    assert torch.allclose(normals.norm(dim=1), torch.ones(()), atol=1e-5)


def test_normals_are_those_of_the_least_variance() -> None:
    points = cloud(80)
    near = around(points, 10, 0.9)
    normals = estimate_normals(points, near).double().numpy()
    for i, normal in enumerate(normals):
        others = near.indices[i][near.near[i]].tolist()
        if len(others) < 2:
            assert normal.tolist() == [0, 0, -1]
            continue
        values, vectors = np.linalg.eigh(np.cov(points[[i, *others]].double().numpy().T))
        if values[1] > 1.2 * values[0]:
            assert abs(abs(normal @ vectors[:, 0]) - 1) < 1e-4
        assert normal[2] <= 0


def test_points_alone_or_on_top_of_each_other_are_no_trouble() -> None:
    for points in (torch.zeros(0, 3), torch.ones(1, 3), torch.ones(9, 3), torch.eye(3)):
        near = around(points, 4)
        normals = estimate_normals(points, near)
        found = fpfh(points, normals, near)
        assert found.shape == (len(points), 33)
        assert found.isfinite().all()
        assert normals.isfinite().all()
        assert (near.indices != torch.arange(len(points))[:, None]).all()
    assert not fpfh(torch.ones(1, 3), torch.eye(3)[:1], around(torch.ones(1, 3))).any()


def test_wrong_arguments_are_refused() -> None:
    points = cloud(5)
    with pytest.raises(ValueError, match="neighbourhoods: radius must be positive, got nan"):
        neighbourhoods(points, k=3, radius=math.nan)
    with pytest.raises(ValueError, match="neighbourhoods: k must be at least 1, got 0"):
        neighbourhoods(points, k=0)
    with pytest.raises(ValueError, match=r"points must have shape \(P, 3\), got \(3, 5\)"):
        neighbourhoods(points.T, k=1)
    with pytest.raises(TypeError, match="neighbourhoods: points must be float32"):
        neighbourhoods(points.double(), k=1)
    with pytest.raises(ValueError, match="normals and neighbourhoods must be of 5 points, got 4"):
        fpfh(points, points[:4], around(points))
