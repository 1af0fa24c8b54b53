"""A small text encoder that reads bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyfeat.ssl.networks.vit import Activation, Block

_START, _END, _PAD = 256, 257, 258


@dataclass(frozen=True)
class TextOptions:
    """Options of ``TextEncoder``.

    Attributes:
        width: Features of a token, a multiple of ``heads``.
        depth: Blocks.
        heads: Heads of the attention.
        length: Tokens of the longest text, start and end included, >= 3.
        activation: In a block; the published encoder has "quick_gelu".
    """

    width: int = 128
    depth: int = 3
    heads: int = 4
    length: int = 96
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            message = f"width must be a multiple of heads, got {self.width} and {self.heads}"
            raise ValueError(message)
        if self.length < 3:
            message = f"length must be at least 3, got {self.length}"
            raise ValueError(message)


class TextEncoder(nn.Module):
    """A transformer over UTF-8 bytes in which each sees those before it; the end token is read.

    Args:
        options: As ``TextOptions``.

    Attributes:
        feature_dim: D.

    Source: as Radford et al., CLIP, ICML 2021, arXiv:2103.00020, but for its vocabulary.

    Examples:
        >>> encoder = TextEncoder()
        >>> encoder(encoder.tokens(["a cell", "another cell"])).shape
        torch.Size([2, 128])
    """

    def __init__(self, options: TextOptions | None = None) -> None:
        super().__init__()
        self.options = options = TextOptions() if options is None else options
        width = options.width
        self.feature_dim = width
        self.token_embedding = nn.Embedding(_PAD + 1, width)
        self.positions = nn.Parameter(torch.empty(options.length, width))
        self.blocks = nn.Sequential(
            *(
                Block(width, options.heads, causal=True, activation=options.activation)
                for _ in range(options.depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        for block in self.blocks:
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear):
                    last = name in ("attn.proj", "mlp.fc2")
                    scale = (2 * options.depth) ** -0.5 if last else 1.0
                    nn.init.normal_(layer.weight, std=scale * width**-0.5)
                    nn.init.zeros_(layer.bias)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens of texts, (B, L) int64, L that of the longest, on the module's device.

        What is longer than ``length`` is cut off before the end token.
        """
        room = self.options.length - 2
        rows = [[_START, *text.encode()[:room], _END] for text in texts]
        longest = max(map(len, rows), default=1)
        padded = [row + [_PAD] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, device=self.positions.device).long().view(len(rows), longest)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Compute the features (B, D) of texts."""
        features: Tensor = self(self.tokens(texts))
        return features

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the features (B, D) of tokens (B, L).

        Raises:
            ValueError: If a row has no end token, or is longer than ``length``.
        """
        ends = tokens == _END
        if tokens.shape[1] > self.options.length or not bool(ends.any(dim=1).all()):
            message = (
                f"TextEncoder: tokens must have an end and at most {self.options.length} columns, "
                f"got {tuple(tokens.shape)}"
            )
            raise ValueError(message)
        x = self.token_embedding(tokens) + self.positions[: tokens.shape[1]]
        # Causal: no token before the end sees the padding after it.
        x = self.norm(self.blocks(x))
        rows = torch.arange(len(x), device=x.device)
        features: Tensor = x[rows, ends.int().argmax(dim=1)]
        return features
