"""Volumes as sequences of slices: a network of images, and a deformable encoder over its features."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.attention import DeformableAttention1D
from pyfeat.ssl.options import AT_LEAST_ONE, NOT_NEGATIVE, Range


@dataclass(frozen=True)
class SliceOptions:
    """Options of ``SliceEncoder``; of the paper 640, 4, 8, 64, 4, 6, 2 and 720."""

    dim: Annotated[int, "Features of a slice and of a volume; heads divide them.", AT_LEAST_ONE] = (
        128
    )
    layers: Annotated[int, "Of the encoder over slices.", AT_LEAST_ONE] = 4
    heads: Annotated[int, "Of attention, each with places of its own.", AT_LEAST_ONE] = 4
    head_dim: Annotated[int, "Features of a head.", AT_LEAST_ONE] = 32
    stride: Annotated[int, "Slices to a place that is attended to.", AT_LEAST_ONE] = 4
    kernel_size: Annotated[
        int, "Slices that a place is chosen by: stride plus an even number.", AT_LEAST_ONE
    ] = 6
    offset_scale: Annotated[
        float, "Farthest that a place moves, in distances between places.", NOT_NEGATIVE
    ] = 2.0
    ffn_dim: Annotated[int, "Hidden features of a layer.", AT_LEAST_ONE] = 144
    axis: Annotated[
        Literal["slices", "features"], "What places move along; the paper means slices."
    ] = "slices"
    dropout: Annotated[float, "In the layers.", Range(low=0, below=1)] = 0.1


class SliceEncoder(nn.Module):
    """Pooled stages of slices to features of slices, and of whole volumes.

    A slice is described by the mean of every stage's map, each of length 1, side by side, and
    projected. The paper's code adds the mean of the last stage once more, which makes no difference
    before a linear layer. Layers over slices are ``x = norm1(x + attention(x))``, then ``x = norm2(x +
    ffn(x))``, with dropout after each; nothing but the bias of attention by signed distance says
    where a slice lies.

    Args:
        map_dims: Channels of every stage.
        num_slices: N; any other number may be encoded too unless ``axis`` is "features".
        options: As ``SliceOptions``.

    Attributes:
        projection: Pooled stages to a slice's features.
        mask_token: (D,), in place of a hidden slice.
        layers: Of the encoder.
        predictor: What the features of a hidden slice are guessed with.

    Raises:
        ValueError: If the options do not go together.

    Source: Nguyen et al., Joint self-supervised image-volume representation learning with intra-inter
    contrastive clustering, AAAI 2023, arXiv:2212.01893. Its code lets places move along the features;
    the paper's text is about slices.
    """

    def __init__(
        self, map_dims: list[int], num_slices: int, options: SliceOptions | None = None
    ) -> None:
        super().__init__()
        self.options = options = SliceOptions() if options is None else options
        self.projection = nn.Linear(sum(map_dims), options.dim)
        self.mask_token = nn.Parameter(torch.randn(options.dim))
        self.layers = nn.Sequential(*(_Layer(num_slices, options) for _ in range(options.layers)))
        self.predictor = nn.Linear(options.dim, options.dim)

    def project(self, maps: list[Tensor]) -> Tensor:
        """Describe slices (S, D) by the maps (S, C, h, w) of all stages."""
        pooled = [functional.normalize(x.flatten(2).mean(dim=2), dim=1) for x in maps]
        projected: Tensor = self.projection(torch.cat(pooled, dim=1))
        return projected

    def forward(self, slices: Tensor) -> Tensor:
        """Encode slices (B, N, D) in the light of all others, to (B, N, D)."""
        encoded: Tensor = self.layers(slices)
        return encoded

    def volumes(self, slices: Tensor) -> Tensor:
        """Describe volumes (B, D), of length 1, by their slices (B, N, D)."""
        return functional.normalize(self(slices).mean(dim=1), dim=1)

    def fill_in(self, slices: Tensor, hidden: Tensor) -> Tensor:
        """Guess the features of all slices, of which some are hidden.

        Args:
            slices: (B, N, D); those that are hidden are not looked at.
            hidden: (B, N) bool.

        Returns:
            (B, N, D).
        """
        token = self.mask_token.to(slices.dtype)
        guessed: Tensor = self.predictor(self(torch.where(hidden[..., None], token, slices)))
        return guessed


class VolumeEncoder(nn.Module):
    """A network of images and an encoder over slices: volumes to features.

    Args:
        backbone: Images (B, C, H, W) in [0, 1] to maps, by its method ``maps``.
        slices: The encoder.

    Attributes:
        feature_dim: D.

    Source: as ``SliceEncoder``.

    Examples:
        >>> from pyfeat.ssl.networks import build
        >>> network = build("resnet", width=4, blocks=(1, 1), in_channels=1)
        >>> encoder = VolumeEncoder(network, SliceEncoder(network.map_dims, 8))
        >>> encoder.eval()(torch.zeros(2, 1, 8, 16, 16)).shape
        torch.Size([2, 128])
    """

    def __init__(self, backbone: nn.Module, slices: SliceEncoder) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.slices = slices
        self.feature_dim = slices.options.dim

    def images(self, images: Tensor) -> Tensor:
        """Describe single images (B, C, H, W), or slices, as (B, D)."""
        return self.slices.project(self.backbone.maps(images))

    def each_slice(self, volumes: Tensor) -> Tensor:
        """Describe the slices of volumes (B, C, N, H, W), each by itself, as (B, N, D).

        Raises:
            ValueError: If the shape is another.
        """
        if volumes.ndim != 5:
            got = tuple(volumes.shape)
            message = f"VolumeEncoder: volumes must have shape (B, C, N, H, W), got {got}"
            raise ValueError(message)
        features = self.images(volumes.transpose(1, 2).flatten(0, 1))
        return features.view(len(volumes), volumes.shape[2], -1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Describe volumes (B, C, N, H, W) in [0, 1] as (B, D), of length 1."""
        return self.slices.volumes(self.each_slice(volumes))


class _Layer(nn.Module):
    """Deformable attention and a feed-forward network, normalised after each."""

    def __init__(self, num_slices: int, options: SliceOptions) -> None:
        super().__init__()
        over_slices = options.axis == "slices"
        self.attention = DeformableAttention1D(
            options.dim if over_slices else num_slices,
            options.heads,
            head_dim=options.head_dim,
            stride=options.stride,
            kernel_size=options.kernel_size,
            offset_scale=options.offset_scale,
            axis="sequence" if over_slices else "features",
        )
        self.norm1, self.norm2 = nn.LayerNorm(options.dim), nn.LayerNorm(options.dim)
        self.ffn = nn.Sequential(
            nn.Linear(options.dim, options.ffn_dim),
            nn.GELU(),
            nn.Linear(options.ffn_dim, options.dim),
        )
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm1(x + self.attention(x)))
        y: Tensor = self.dropout(self.norm2(x + self.ffn(x)))
        return y
