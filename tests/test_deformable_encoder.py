"""The encoder layer of deformable attention, and the references of its queries."""

from typing import Any

import pytest
import torch
from torch import nn

from pyfeat.attention import DeformableEncoderLayer, grid_points
from tests.support_attention_modules import (
    PYRAMIDS,
    SAME,
    expected_attention,
    num_cells,
    randomized,
)


def test_padding_that_is_masked_has_no_influence() -> None:
    layer = randomized(DeformableEncoderLayer(6, 2, 2, 2, ffn_dim=8)).eval()
    shapes = PYRAMIDS[2]
    features = torch.randn(1, num_cells(shapes), 6).double()
    mask = torch.zeros(1, num_cells(shapes), dtype=torch.bool)
    mask[0, 20:24] = True
    other = features.where(~mask[..., None], 100.0)
    outputs = [layer(x, shapes, padding_mask=mask)[~mask] for x in (features, other)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=SAME)
    unmasked = layer(other, shapes)[~mask]
    assert (unmasked - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_the_encoder_layer_is_attention_then_a_network_each_with_a_norm(
    ndim: int, activation: str
) -> None:
    shapes = PYRAMIDS[ndim]
    layer = randomized(DeformableEncoderLayer(6, 2, 2, 2, ndim, ffn_dim=8, activation=activation))
    assert isinstance(layer, DeformableEncoderLayer)
    layer.eval()
    features, position = torch.randn(2, 2, num_cells(shapes), 6).double()
    ratios = torch.rand(2, 2, ndim).double() / 2 + 0.5
    points = grid_points(shapes, ratios, dtype=torch.float64)
    output = layer(features, shapes, position=position, valid_ratios=ratios)
    x = features + expected_attention(
        layer.self_attn, features + position, points, features, shapes, None, ratios
    )
    x = layer.norm1(x)
    x = layer.norm2(
        x + layer.linear2(getattr(torch, activation, nn.functional.gelu)(layer.linear1(x)))
    )
    torch.testing.assert_close(output, x, rtol=0, atol=SAME)
    given = layer(features, shapes, position=position, reference_points=points, valid_ratios=ratios)
    torch.testing.assert_close(given, output, rtol=0, atol=0)


def test_dropout_of_the_encoder_layer_acts_in_training_only() -> None:
    layer = randomized(DeformableEncoderLayer(6, 2, 2, 2, ffn_dim=8, dropout=0.5))
    shapes = PYRAMIDS[2]
    features = torch.randn(1, num_cells(shapes), 6).double()
    assert (layer(features, shapes) - layer(features, shapes)).abs().max() > 1e-3
    layer.eval()
    torch.testing.assert_close(layer(features, shapes), layer(features, shapes), rtol=0, atol=0)


def test_grid_points_are_the_centres_of_cells() -> None:
    shapes = [(2, 3), (1, 2)]
    expected = [
        [(x + 0.5) / width, (y + 0.5) / height]
        for height, width in shapes
        for y in range(height)
        for x in range(width)
    ]
    points = grid_points(shapes, dtype=torch.float64)
    torch.testing.assert_close(
        points, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-15
    )
    ratios = torch.tensor([[[0.5, 1.0], [0.25, 1.0]], [[1.0, 1.0], [1.0, 0.5]]]).double()
    scaled = grid_points(torch.tensor(shapes), ratios, dtype=torch.float64)
    by_cell = ratios.repeat_interleave(torch.tensor([6, 2]), dim=1)
    torch.testing.assert_close(scaled * by_cell, points.expand(2, -1, -1), rtol=0, atol=1e-15)
    corners = grid_points([(2, 3), (1, 1)], align_corners=True)[0]
    assert corners.tolist() == [[0, 0], [0.5, 0], [1, 0], [0, 1], [0.5, 1], [1, 1], [0, 0]]
    assert grid_points([(2, 2, 2)])[0, 1].tolist() == [0.75, 0.25, 0.25]  # x is fastest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn_dim": 0}, "ffn_dim must be at least 1, got 0"),
        ({"activation": "tanh"}, "activation must be one of 'relu', 'gelu', got 'tanh'"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_the_encoder_layer_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^DeformableEncoderLayer: {message}$"):
        DeformableEncoderLayer(8, 2, **options)


def test_the_encoder_layer_refuses_inputs() -> None:
    layer = DeformableEncoderLayer(8, 2, 1, ffn_dim=8)
    with pytest.raises(ValueError, match=r"features must have shape \(B, S, 8\), got \(6, 8\)"):
        layer(torch.zeros(6, 8), [(2, 3)])
    with pytest.raises(
        ValueError, match=r"position must have shape \(1, 6, 8\) or .*, got \(1, 8\)"
    ):
        layer(torch.zeros(1, 6, 8), [(2, 3)], position=torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"spatial_shapes must be tuples of one length, got \["):
        layer(torch.zeros(1, 6, 8), [(2, 3), (1,)])
    with pytest.raises(ValueError, match=r"valid_ratios must have shape \(B, 1, 2\), got \(1, 2\)"):
        layer(torch.zeros(1, 6, 8), [(2, 3)], valid_ratios=torch.ones(1, 2))
