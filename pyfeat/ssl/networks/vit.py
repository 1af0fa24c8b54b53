"""Vision transformers of images and volumes, with a class token and masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.ssl.networks.intensities import Intensities
from pyfeat.ssl.options import AT_LEAST_ONE, POSITIVE, Range
from pyfeat.ssl.parts.stochastic_depth import StochasticDepth
from pyfeat.ssl.registry import NETWORKS

Activation = Literal["gelu", "quick_gelu"]


@dataclass(frozen=True)
class ViTOptions:
    """Options of ``ViT``; as they stand, a network for minutes on a CPU."""

    image_size: Annotated[
        int,
        "Side in pixels of images whose positions are kept; others are interpolated.",
        AT_LEAST_ONE,
    ] = 64
    patch_size: Annotated[int, "Side of a patch in pixels.", AT_LEAST_ONE] = 8
    width: Annotated[int, "Features of a token.", AT_LEAST_ONE] = 192
    depth: Annotated[int, "Blocks.", AT_LEAST_ONE] = 6
    heads: Annotated[int, "Heads of the attention; they divide width.", AT_LEAST_ONE] = 3
    mlp_ratio: Annotated[float, "Hidden features of a block, times width.", POSITIVE] = 4.0
    in_channels: Annotated[int, "Channels of the input.", AT_LEAST_ONE] = 3
    ndim: Annotated[Literal[2, 3], "2 for images, 3 for volumes."] = 2
    learn_positions: Annotated[bool, "Learn the positions; else they stay sines."] = True
    freeze_patches: Annotated[
        bool, "Leave the projection of patches as it was drawn, against instability (MoCo v3)."
    ] = False
    drop_path: Annotated[
        float,
        "Share of samples that skip the last block in training; it rises from 0 along the blocks.",
        Range(low=0, below=1),
    ] = 0.0
    pool: Annotated[
        Literal["class", "mean", "both"],
        "What the features are: the class token, the mean of the rest, or both side by side (SiT).",
    ] = "class"
    pre_norm: Annotated[
        bool, "Normalise tokens before the first block; patches then have no bias (CLIP)."
    ] = False
    activation: Annotated[Activation, "In a block; quick_gelu, x sigmoid(1.702 x), is CLIP's."] = (
        "gelu"
    )

    def __post_init__(self) -> None:
        if self.width % self.heads:
            message = f"width must be a multiple of heads, got {self.width} and {self.heads}"
            raise ValueError(message)
        if self.image_size % self.patch_size:
            message = (
                f"image_size must be a multiple of patch_size, got {self.image_size} and "
                f"{self.patch_size}"
            )
            raise ValueError(message)
        if self.width % (2 * self.ndim):
            message = f"width must be a multiple of {2 * self.ndim}, got {self.width}"
            raise ValueError(message)


def sine_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Return sines and cosines of the places of a grid, row by row.

    Args:
        grid: Patches along each axis.
        dim: Features, a multiple of twice the axes.

    Returns:
        (T, dim) float32; each axis has an equal share of features.

    Source: Vaswani et al., Attention is all you need, 2017, arXiv:1706.03762; in two dimensions as
    in He et al., Masked autoencoders, CVPR 2022, arXiv:2111.06377.
    """
    share = dim // len(grid)
    frequencies = 10000.0 ** -(torch.arange(share // 2, dtype=torch.float64) / (share / 2))
    axes = [torch.arange(n, dtype=torch.float64) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [..., n]
    angles = places.reshape(-1, len(grid), 1) * frequencies  # [T, n, share / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()


@NETWORKS.register("vit", ViTOptions)
class ViT(nn.Module):
    """A vision transformer, with the parameter names of timm's.

    Args:
        options: As ``ViTOptions``.

    Attributes:
        feature_dim: Width of a token, or twice that.
        map_dims: Width of a token for each map.
        grid: Patches along each axis of an image of the size that is kept.

    Source: Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, arXiv:2010.11929; frozen
    patches: Chen et al., MoCo v3, ICCV 2021, arXiv:2104.02057; pre_norm and quick_gelu: Radford et al.,
    CLIP, ICML 2021, arXiv:2103.00020.

    Examples:
        >>> network = ViT(ViTOptions(width=32, heads=2, depth=2))
        >>> network(torch.ones(2, 3, 64, 64)).shape
        torch.Size([2, 32])
        >>> network.tokens(torch.ones(2, 3, 32, 48)).shape
        torch.Size([2, 25, 32])
    """

    def __init__(self, options: ViTOptions | None = None) -> None:
        super().__init__()
        options = ViTOptions() if options is None else options
        self.options = options
        width = options.width
        self.grid = (options.image_size // options.patch_size,) * options.ndim
        self.feature_dim = 2 * width if options.pool == "both" else width
        self.intensities = Intensities(options.in_channels)
        self.patch_embed = _Patches(options)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sine_positions(self.grid, width)
        self.pos_embed = nn.Parameter(
            torch.cat([torch.zeros(1, width), positions])[None],
            requires_grad=options.learn_positions,
        )
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    options.heads,
                    options.mlp_ratio,
                    drop_path=rate,
                    activation=options.activation,
                )
                for rate in torch.linspace(0, options.drop_path, options.depth).tolist()
            )
        )
        self.norm_pre = nn.LayerNorm(width, eps=1e-6) if options.pre_norm else nn.Identity()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.map_dims = [width] * len(self._map_blocks)
        nn.init.normal_(self.cls_token, std=0.02)
        initialize(self.blocks)
        if options.freeze_patches:
            self.patch_embed.requires_grad_(False)

    def patches(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Project patches and add their positions.

        Args:
            images: (B, C, H, W), or (B, C, D, H, W) if ``ndim`` is 3, in [0, 1]; sides are multiples
                of a patch's.

        Returns:
            (B, T, D), the grid row by row, and the grid.

        Raises:
            ValueError: If the shape does not suit.
        """
        options = self.options
        if (
            images.ndim != options.ndim + 2
            or images.shape[1] != options.in_channels
            or any(side % options.patch_size or not side for side in images.shape[2:])
        ):
            axes = "H, W" if options.ndim == 2 else "D, H, W"
            message = (
                f"ViT: images must have shape (B, {options.in_channels}, {axes}) with sides that are "
                f"multiples of {options.patch_size}, got {tuple(images.shape)}"
            )
            raise ValueError(message)
        maps: Tensor = self.patch_embed.proj(self.intensities(images))
        grid = tuple(maps.shape[2:])
        return maps.flatten(2).mT + self.positions(grid), grid

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """Return the positions of patches, (1, T, D), interpolated where the grid is another."""
        positions = self.pos_embed[:, 1:]
        if grid == self.grid:
            return positions
        maps = positions.mT.reshape(1, -1, *self.grid)
        mode = "bicubic" if len(grid) == 2 else "trilinear"
        resized = functional.interpolate(maps, size=grid, mode=mode, align_corners=False)
        return resized.flatten(2).mT

    def tokens(
        self,
        images: Tensor,
        *,
        seen: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Compute all tokens of the last block, normalised; the class token is the first.

        Args:
            images: As in ``patches``.
            seen: (B, t) int64, the only patches that are encoded, in this order (MAE).
            hidden: (B, T) bool, patches that ``mask_token`` stands for (iBOT, SimMIM).
            mask_token: (D,), with ``hidden``.

        Returns:
            (B, 1 + T, D), or (B, 1 + t, D).

        Raises:
            ValueError: If ``hidden`` and ``mask_token`` are not given together.
        """
        tokens: Tensor = self.norm(self.blocks(self._embed(images, seen, hidden, mask_token)[0]))
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Compute the class token, or the mean of the patches', (B, D), or both, (B, 2 D)."""
        return pool_tokens(self.tokens(images), self.options.pool)

    def features_and_patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features (B, D), and the patches (B, P, D) of the last block, row by row."""
        tokens = self.tokens(images)
        return pool_tokens(tokens, self.options.pool), tokens[:, 1:]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Compute the patches of four blocks evenly spread, as maps (B, D, h, w); the last normalised."""
        x, grid = self._embed(images, None, None, None)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self._map_blocks:
                y = self.norm(x) if i == len(self.blocks) - 1 else x
                maps.append(y[:, 1:].mT.reshape(len(x), -1, *grid))
        return maps

    def class_attention(self, images: Tensor) -> Tensor:
        """Compute where the class token of the last block looks, (B, heads, h, w); each head sums to 1.

        Shares are among the patches: what the class token pays to itself is left out.

        Args:
            images: As in ``patches``; ``ndim`` is 2.
        """
        x, grid = self._embed(images, None, None, None)
        blocks: list[Any] = list(self.blocks)
        last = blocks.pop()
        for block in blocks:
            x = block(x)
        shares: Tensor = last.attn.class_shares(last.norm1(x))
        return shares.view(*shares.shape[:2], *grid)

    @property
    def _map_blocks(self) -> list[int]:
        """The blocks whose patches are maps."""
        depth = len(self.blocks)
        return sorted({math.ceil(depth * (i + 1) / 4) - 1 for i in range(4)})

    def _embed(
        self, images: Tensor, seen: Tensor | None, hidden: Tensor | None, mask_token: Tensor | None
    ) -> tuple[Tensor, tuple[int, ...]]:
        if (hidden is None) != (mask_token is None):
            message = "ViT.tokens: hidden and mask_token must be given together, got one"
            raise ValueError(message)
        x, grid = self.patches(images)
        if hidden is not None and mask_token is not None:
            x = torch.where(hidden[..., None], mask_token.to(x.dtype) + self.positions(grid), x)
        if seen is not None:
            x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[2]))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm_pre(torch.cat([first, x], dim=1)), grid


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """Return the class token of (B, 1 + T, D), the mean of the others, or both, (B, 2 D)."""
    mean = tokens[:, 1:].mean(dim=1)
    if pool == "both":
        return torch.cat([tokens[:, 0], mean], dim=1)
    return tokens[:, 0] if pool == "class" else mean


class Block(nn.Module):
    """Attention and two layers, each beside a short cut and after a normalisation.

    Args:
        width: Features of a token.
        heads: Of the attention; they divide ``width``.
        mlp_ratio: Hidden features, times ``width``.
        causal: Each token sees itself and those before it.
        drop_path: Share of samples that skip each half of the block in training.
        activation: Between the two layers.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        causal: bool = False,
        drop_path: float = 0.0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _MLP(width, hidden, activation)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class _Patches(nn.Module):
    """The projection of patches, each of its own."""

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        convolution: Any = nn.Conv2d if options.ndim == 2 else nn.Conv3d
        side, width = options.patch_size, options.width
        bias = not options.pre_norm
        self.proj = convolution(options.in_channels, width, side, stride=side, bias=bias)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        if bias:
            nn.init.zeros_(self.proj.bias)


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = functional.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)
        y: Tensor = self.fc2(x)
        return y


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def class_shares(self, x: Tensor) -> Tensor:
        """(B, heads, T): the attention of the first of 1 + T tokens to the others."""
        q, k, _ = self._projected(x)
        logits = (q[:, :, :1] @ k[:, :, 1:].mT)[:, :, 0] / q.shape[-1] ** 0.5
        shares: Tensor = logits.softmax(dim=-1)
        return shares

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (B, heads, T, D / heads)."""
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads)
        return tuple(qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self._projected(x)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        projected: Tensor = self.proj(y.transpose(1, 2).reshape(batch, count, width))
        return projected


def initialize(module: nn.Module) -> None:
    """Draw the weights of linear layers evenly in Xavier's range; biases are 0."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.xavier_uniform_(each.weight)
            if each.bias is not None:
                nn.init.zeros_(each.bias)
