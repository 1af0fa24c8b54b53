"""What stands between a backbone and a loss: projections, predictions and prototypes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._checks import check_choice, check_count
from pyfeat.ssl.parts.batch_norm import BatchNorm

Norm = Literal["batch", "layer", "none"]
Activation = Literal["relu", "gelu"]


class MLP(nn.Sequential):
    """Linear layers with a normalisation and an activation after each but the last.

    Args:
        dims: Features of the input, of every hidden layer and of the output; at least two.
        norm: Of hidden layers; "batch" takes the statistics of all processes together.
        activation: Of all hidden layers, or of each.
        last_norm: A normalisation of the output too, without anything to learn.
        last_bias: A bias of the last layer; with ``last_norm`` there is none, for it would have no
            effect.

    Raises:
        ValueError: If ``dims`` are fewer than two or below 1, or activations not as many as hidden
            layers.

    Examples:
        >>> MLP((8, 16, 4))(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        norm: Norm = "batch",
        activation: Activation | Sequence[Activation] = "relu",
        last_norm: bool = False,
        last_bias: bool = True,
    ) -> None:
        if len(dims) < 2:
            message = f"MLP: dims must have at least two numbers, got {tuple(dims)}"
            raise ValueError(message)
        for i, dim in enumerate(dims):
            check_count("MLP", f"dims[{i}]", dim)
        check_choice("MLP", "norm", norm, ("batch", "layer", "none"))
        num_hidden = len(dims) - 2
        chosen = [activation] * num_hidden if isinstance(activation, str) else list(activation)
        if len(chosen) != num_hidden:
            message = f"MLP: activation must be one, or {num_hidden}, got {len(chosen)}"
            raise ValueError(message)
        for each in [activation] if isinstance(activation, str) else chosen:
            check_choice("MLP", "activation", each, ("relu", "gelu"))
        layers: list[nn.Module] = []
        for i in range(1, len(dims) - 1):
            # A normalisation subtracts the bias of a layer before it.
            layers.append(nn.Linear(dims[i - 1], dims[i], bias=norm != "batch"))
            layers += _norm_layers(norm, dims[i], learned=True)
            layers.append(nn.ReLU(inplace=True) if chosen[i - 1] == "relu" else nn.GELU())
        layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias and not last_norm))
        if last_norm:
            layers += _norm_layers(norm, dims[-1], learned=False)
        super().__init__(*layers)
        self.out_dim = dims[-1]


def _norm_layers(norm: Norm, dim: int, *, learned: bool) -> list[nn.Module]:
    if norm == "batch":
        return [BatchNorm(dim, affine=learned)]
    if norm == "layer":
        return [nn.LayerNorm(dim, elementwise_affine=learned)]
    return []


class Prototypes(nn.Module):
    """K learned directions, the weight of a last linear layer that a loss multiplies with itself.

    Args:
        num_prototypes: K.
        dim: D, of the features.
        frozen_steps: Steps in the beginning through which they stay as they were drawn, so that
            features settle first: ``freeze(step)`` drops their gradients.

    Source: Caron et al., SwAV, 2020, arXiv:2006.09882; Caron et al., DINO, 2021, arXiv:2104.14294,
    where it is the last layer of a head, with weight norm.

    Examples:
        >>> Prototypes(3, 2)(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, num_prototypes: int, dim: int, *, frozen_steps: int = 0) -> None:
        super().__init__()
        check_count("Prototypes", "num_prototypes", num_prototypes)
        check_count("Prototypes", "dim", dim)
        if frozen_steps < 0:
            message = f"Prototypes: frozen_steps must be at least 0, got {frozen_steps}"
            raise ValueError(message)
        self.frozen_steps = frozen_steps
        self.weight = nn.Parameter(functional.normalize(torch.randn(num_prototypes, dim)))

    @torch.no_grad()
    def normalize(self) -> None:
        """Bring all to length 1 again, as after an optimiser's step."""
        self.weight.copy_(functional.normalize(self.weight))

    def freeze(self, step: int) -> None:
        """Drop the gradient in the steps 0 to ``frozen_steps - 1``; call it before the optimiser's."""
        if step < self.frozen_steps:
            self.weight.grad = None

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``features @ weight.T``, (B, K); the losses take ``weight`` and store none."""
        return functional.linear(features, self.weight)

    def extra_repr(self) -> str:
        """As in ``3000, 128``."""
        return ", ".join(map(str, self.weight.shape))
