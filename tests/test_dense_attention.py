"""Dense attention to deformed keys against its definition, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.attention import DeformableAttention1D
from tests.support_attention_modules import SAME, randomized


def expected_dense(
    module: DeformableAttention1D, x: Tensor, samples: Tensor, places: Tensor
) -> Tensor:
    """Attention of x (B, C, n) to samples (B, C, m) at coordinates (B, G, m) in [-1, 1]."""
    heads, n = module.num_heads, x.shape[2]
    q, k, v = (
        linear(y).unflatten(1, (heads, -1))
        for linear, y in ((module.to_q, x), (module.to_k, samples), (module.to_v, samples))
    )  # [B, H, d, n or m]
    logits = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])
    own = torch.arange(n).double()
    own = 2 * own / (n - 1) - 1 if module.align_corners else (2 * own + 1) / n - 1
    distance = own[:, None] - places[:, :, None]  # [B, G, n, m]
    logs = distance.sign() * (1 + distance.abs()).log()
    bias = module.rel_pos_bias.mlp(logs[..., None]).movedim(-1, 2)  # [B, G, H / G, n, m]
    weights = (logits + bias.reshape(logits.shape)).softmax(-1)
    output: Tensor = module.to_out(torch.einsum("bhij,bhdj->bhdi", weights, v).flatten(1, 2))
    return output


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_offsets_dense_attention_is_over_strided_linear_samples(
    groups: int, align_corners: bool
) -> None:
    n, stride = 16, 4
    module = DeformableAttention1D(
        8, 4, head_dim=3, num_groups=groups, stride=stride, align_corners=align_corners
    )
    randomized(module)
    nn.init.zeros_(module.get_parameter("to_offsets.2.weight"))
    x = torch.randn(2, n, 8).double().transpose(1, 2)
    m = n // stride
    # Either end to end, or the centres of m equal parts: positions 1.5, 5.5, 9.5 and 13.5.
    where = torch.arange(m).double()
    where = where * ((n - 1) / (m - 1)) if align_corners else where * 4 + 1.5
    low = where.floor().long()
    part = where - low
    samples = x[..., low] * (1 - part) + x[..., (low + 1).clamp(max=n - 1)] * part
    places = (2 * where / (n - 1) if align_corners else (2 * where + 1) / n) - 1
    expected = expected_dense(module, x, samples, places.expand(2, groups, m))
    output = module(x.transpose(1, 2))
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=0, atol=SAME)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("n", [16, 18])
def test_dense_attention_samples_where_the_convolution_says(n: int, align_corners: bool) -> None:
    groups, stride, scale = 2, 4, 2.0
    module = DeformableAttention1D(
        8, 4, head_dim=3, num_groups=groups, offset_scale=scale, align_corners=align_corners
    )
    randomized(module)
    nn.init.normal_(module.get_parameter("to_offsets.2.weight"), std=3.0)
    x = torch.randn(2, 8, n).double()
    m = n // stride
    queries = module.to_q(x).view(2 * groups, -1, n)
    offsets = scale * module.to_offsets(queries).view(2, groups, m).tanh()
    places = torch.arange(m) + offsets  # in references
    places = 2 * places / (m - 1) - 1 if align_corners else (2 * places + 1) / m - 1
    assert (places.abs() > 1).any()  # beyond the ends, where zeros are
    grid = torch.stack([places.flatten(0, 1), torch.zeros(2 * groups, m).double()], -1)
    samples = nn.functional.grid_sample(
        x.view(2 * groups, -1, 1, n), grid[:, None], align_corners=align_corners
    ).reshape(2, 8, m)
    expected = expected_dense(module, x, samples, places)
    output = module(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=0, atol=SAME)
    over_features = DeformableAttention1D(
        8,
        4,
        head_dim=3,
        num_groups=groups,
        offset_scale=scale,
        align_corners=align_corners,
        axis="features",
    ).double()
    over_features.load_state_dict(module.state_dict())
    torch.testing.assert_close(over_features(x), expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("align_corners", [True, False])
def test_dense_attention_has_the_gradients_of_finite_differences(align_corners: bool) -> None:
    module = DeformableAttention1D(
        2, 2, head_dim=1, stride=2, kernel_size=4, align_corners=align_corners
    )
    randomized(module)
    names = [name for name, _ in module.named_parameters()]

    def attention(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    arguments = [torch.randn(1, 4, 2).double(), *(p.detach().clone() for p in module.parameters())]
    for argument in arguments:
        argument.requires_grad_()
    attention(*arguments).square().sum().backward()
    for name, weight in zip(names, arguments[1:], strict=True):
        if "to_offsets" in name:
            assert weight.grad is not None
            assert weight.grad.abs().max() > 1e-6
    assert torch.autograd.gradcheck(attention, arguments)


def test_the_bias_has_its_right_derivative_at_distance_0() -> None:
    module = DeformableAttention1D(4, 1, head_dim=2).double()
    for layer, bias in (("0.0", 1.0), ("1.0", 0.0), ("2", 0.0)):
        nn.init.eye_(module.get_parameter(f"rel_pos_bias.mlp.{layer}.weight"))
        # 1 at first, on the slope of ReLU.
        nn.init.constant_(module.get_parameter(f"rel_pos_bias.mlp.{layer}.bias"), bias)
    distances = torch.tensor([-2.0, 0.0, 0.5]).double().requires_grad_()
    output = module.rel_pos_bias(distances)
    (gradient,) = torch.autograd.grad(output.sum(), distances)
    expected = [1 - math.log(3), 1.0, 1 + math.log(1.5)]
    torch.testing.assert_close(
        output[:, 0].clamp(min=0), torch.tensor(expected).double().clamp(min=0)
    )
    assert gradient.tolist() == pytest.approx([0.0, 1.0, 1 / 1.5])


def test_parameters_of_dense_attention_have_the_usual_names() -> None:
    module = DeformableAttention1D(16, 4, head_dim=5, num_groups=2, kernel_size=8)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "to_q.weight": (20, 8, 1),
        "to_k.weight": (20, 8, 1),
        "to_v.weight": (20, 8, 1),
        "to_out.weight": (16, 20, 1),
        "to_out.bias": (16,),
        "to_offsets.0.weight": (10, 1, 8),
        "to_offsets.0.bias": (10,),
        "to_offsets.2.weight": (1, 10, 1),
        "rel_pos_bias.mlp.0.0.weight": (4, 1),
        "rel_pos_bias.mlp.0.0.bias": (4,),
        "rel_pos_bias.mlp.1.0.weight": (4, 4),
        "rel_pos_bias.mlp.1.0.bias": (4,),
        "rel_pos_bias.mlp.2.weight": (2, 4),
        "rel_pos_bias.mlp.2.bias": (2,),
    }


def test_dropout_of_dense_attention_acts_in_training_only() -> None:
    module = DeformableAttention1D(8, 2, head_dim=4, dropout=0.5)
    x = torch.randn(1, 8, 8)
    assert (module(x) - module(x)).abs().max() > 1e-4
    module.eval()
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 9}, "embed_dim must be a multiple of num_groups = 2, got 9"),
        (
            {"num_groups": 3, "embed_dim": 9},
            "num_heads must be a multiple of num_groups = 3, got 2",
        ),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"kernel_size": 5}, r"kernel_size must be stride = 4 plus an even number, got 5"),
        ({"kernel_size": 2}, r"kernel_size must be stride = 4 plus an even number, got 2"),
        ({"axis": "slices"}, "axis must be one of 'sequence', 'features', got 'slices'"),
        ({"offset_scale": -1.0}, "offset_scale must be at least 0 and finite, got -1.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_dense_attention_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^DeformableAttention1D: {message}$"):
        DeformableAttention1D(**{"embed_dim": 8, "num_heads": 2, **options})


def test_dense_attention_refuses_inputs() -> None:
    module = DeformableAttention1D(8, 2, head_dim=4)
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, 8\), got \(1, 8, 7\)"):
        module(torch.zeros(1, 8, 7))
    with pytest.raises(ValueError, match="x must have at least 4 positions, got 3"):
        module(torch.zeros(1, 3, 8))
