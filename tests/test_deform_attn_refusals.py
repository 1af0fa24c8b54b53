"""What deformable attention refuses, and that it says which argument it is."""

from typing import Any

import pytest
import torch

import pyfeat
from tests.support_attention import SHAPES, make_inputs


def _case(**changes: Any) -> dict[str, Any]:
    value, shapes, locations, weights, _ = make_inputs([(4, 6), (1, 3)], batch=1).to(torch.float32)
    arguments: dict[str, Any] = {
        "value": value,
        "spatial_shapes": shapes,
        "sampling_locations": locations.view(1, 5, 2, 2, 3, 2),
        "attention_weights": weights.view(1, 5, 2, 2, 3),
    }
    return arguments | changes


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cells that are not S": (
        {"spatial_shapes": [(4, 6), (1, 4)]},
        ValueError,
        r"spatial_shapes must .*27.*got .*28",
    ),
    "a negative size": ({"spatial_shapes": [(4, 6), (-1, -3)]}, ValueError, "spatial_shapes must"),
    "sizes of different dimensions": (
        {"spatial_shapes": [(4, 6), (3,)]},
        ValueError,
        "spatial_shapes must",
    ),
    "four dimensions": (
        {"spatial_shapes": [(2, 3, 2, 2), (1, 1, 1, 3)]},
        ValueError,
        "spatial_shapes must",
    ),
    "no level": ({"spatial_shapes": []}, ValueError, "spatial_shapes must"),
    "sizes that are no numbers": (
        {"spatial_shapes": [("4", "6"), (1, 3)]},
        TypeError,
        "spatial_shapes must",
    ),
    "sizes that are no integers": (
        {"spatial_shapes": [(4.0, 6.5), (1, 3)]},
        TypeError,
        "spatial_shapes must",
    ),
    "a tensor of floats for shapes": (
        {"spatial_shapes": torch.tensor([[4.0, 6.0], [1.0, 3.0]])},
        TypeError,
        "spatial_shapes must",
    ),
    "a number for shapes": ({"spatial_shapes": 27}, TypeError, "spatial_shapes must"),
    "shapes that overflow": (
        {"spatial_shapes": [(2**32, 2**32), (1, 27)]},
        ValueError,
        "spatial_shapes must",
    ),
    "value without heads": ({"value": torch.randn(1, 27, 8)}, ValueError, "value must"),
    "value that is no tensor": ({"value": [1.0]}, TypeError, "value must"),
    "value of integers": (
        {"value": torch.zeros(1, 27, 2, 4, dtype=torch.int64)},
        TypeError,
        "value must",
    ),
    "locations of other dimensions": (
        {"sampling_locations": torch.rand(1, 5, 2, 2, 3, 3)},
        ValueError,
        "spatial_shapes must hold 3 sizes",
    ),
    "locations of four coordinates": (
        {"sampling_locations": torch.rand(1, 5, 2, 2, 3, 4)},
        ValueError,
        "sampling_locations must",
    ),
    "locations of other levels": (
        {"sampling_locations": torch.rand(1, 5, 2, 3, 3, 2)},
        ValueError,
        "sampling_locations must",
    ),
    "locations of other heads": (
        {"sampling_locations": torch.rand(1, 5, 3, 2, 3, 2)},
        ValueError,
        "sampling_locations must",
    ),
    "locations of another batch": (
        {"sampling_locations": torch.rand(2, 5, 2, 2, 3, 2)},
        ValueError,
        "sampling_locations must",
    ),
    "locations of integers": (
        {"sampling_locations": torch.zeros(1, 5, 2, 2, 3, 2, dtype=torch.int64)},
        TypeError,
        "sampling_locations must",
    ),
    "weights of other points": (
        {"attention_weights": torch.rand(1, 5, 2, 2, 4)},
        ValueError,
        "attention_weights must",
    ),
    "weights of other queries": (
        {"attention_weights": torch.rand(1, 1, 2, 2, 3)},
        ValueError,
        "attention_weights must",
    ),
    "weights of integers": (
        {"attention_weights": torch.zeros(1, 5, 2, 2, 3, dtype=torch.int64)},
        TypeError,
        "attention_weights must",
    ),
    "weights on another device": (
        {"attention_weights": torch.empty(1, 5, 2, 2, 3, device="meta")},
        ValueError,
        "attention_weights must",
    ),
    "locations on another device": (
        {"sampling_locations": torch.empty(1, 5, 2, 2, 3, 2, device="meta")},
        ValueError,
        "sampling_locations must",
    ),
    "a padding of another name": ({"padding": "reflection"}, ValueError, "padding must be one of"),
    "a sampling of another name": ({"sampling": "cubic"}, ValueError, "sampling must be one of"),
    "a backend of another name": ({"backend": "gpu"}, ValueError, "backend must be one of"),
    "counts and an axis of levels": (
        {"num_points": [3, 3]},
        ValueError,
        "sampling_locations must",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(what: str) -> None:
    changes, kind, message = REFUSED[what]
    with pytest.raises(kind, match=rf"^deform_attn: {message}"):
        pyfeat.deform_attn(**_case(**changes))


@pytest.mark.parametrize(
    ("num_points", "kind", "message"),
    [
        ([3, 4], ValueError, "sampling_locations must have T = 7 points"),
        ([6], ValueError, "num_points must"),
        ([3, 2, 1], ValueError, "num_points must"),
        ([7, -1], ValueError, "num_points must"),
        ([3.0, 3.0], TypeError, "num_points must"),
        (6, TypeError, "num_points must"),
    ],
)
def test_counts_that_do_not_fit_are_refused_by_name(
    num_points: Any, kind: type[Exception], message: str
) -> None:
    inputs = make_inputs(SHAPES[2]).to(torch.float32)
    with pytest.raises(kind, match=f"^deform_attn: {message}"):
        pyfeat.deform_attn(*inputs[:4], num_points=num_points)


def test_the_case_that_is_changed_to_be_refused_is_accepted() -> None:
    assert pyfeat.deform_attn(**_case()).shape == (1, 5, 8)


def test_an_explicit_backend_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r"^deform_attn: backend 'triton' does not .*cpu"):
        pyfeat.deform_attn(**_case(), backend="triton")
