"""An encoder layer of multi-scale deformable attention, and the references of its queries."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyfeat._checks import check_choice, check_count
from pyfeat.attention._module_arguments import check_tensor
from pyfeat.attention._multi_scale import MultiScaleDeformAttn
from pyfeat.attention._op import Padding

_OP = "DeformableEncoderLayer"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
}


class DeformableEncoderLayer(nn.Module):
    """Self-attention of a pyramid by ``MultiScaleDeformAttn``, then a feed-forward network.

    ``x = norm1(x + dropout(self_attn(x + position)))``, then
    ``x = norm2(x + dropout(linear2(dropout(activation(linear1(x))))))``. Parameters have the names
    and shapes of a layer of Deformable DETR's encoder.

    Args:
        embed_dim: Features C, a multiple of ``num_heads``.
        num_heads: Heads.
        num_levels: Levels L.
        num_points: Points of a head at every level, or a list with the points of each level.
        ndim: Spatial axes n: 1, 2 or 3.
        ffn_dim: Features inside the feed-forward network.
        dropout: In [0, 1).
        activation: Of the feed-forward network: "relu" or "gelu".
        padding: As in ``deform_attn``.
        align_corners: As in ``deform_attn``.

    Raises:
        TypeError: If a count is no integer.
        ValueError: If an argument is out of its range or none of its choices.

    Precision: as ``MultiScaleDeformAttn``.
    Memory: O(B S (C + F + H T n)), F = ``ffn_dim``; T = L P.
    Source: Zhu et al., Deformable DETR: deformable transformers for end-to-end object detection, ICLR
    2021, arXiv:2010.04159.

    Examples:
        >>> layer = DeformableEncoderLayer(8, num_heads=2, num_levels=2, ndim=1, ffn_dim=16)
        >>> layer(torch.zeros(1, 12, 8), [(8,), (4,)]).shape
        torch.Size([1, 12, 8])
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        ndim: int = 2,
        *,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        activation: str = "relu",
        padding: Padding = "zeros",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_count(_OP, "ffn_dim", ffn_dim)
        check_choice(_OP, "activation", activation, _ACTIVATIONS)
        if not 0 <= dropout < 1:
            message = f"{_OP}: dropout must be in [0, 1), got {dropout}"
            raise ValueError(message)
        self.activation, self.dropout = activation, dropout
        self.self_attn = MultiScaleDeformAttn(
            embed_dim,
            num_heads,
            num_levels,
            num_points,
            ndim,
            padding=padding,
            align_corners=align_corners,
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        features: Tensor,
        spatial_shapes: Sequence[Sequence[int]] | Tensor,
        *,
        position: Tensor | None = None,
        reference_points: Tensor | None = None,
        padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """Encode a pyramid.

        Args:
            features: (B, S, C), S the cells of all levels, level by level.
            spatial_shapes: L tuples of n sizes in the order of the axes (depth, height, width), or an
                (L, n) integer tensor.
            position: (B, S, C) or (1, S, C), added to the queries and not to what they sample.
            reference_points: As in ``MultiScaleDeformAttn``, Q = S; None for ``grid_points``.
            padding_mask: (B, S) bool, True at cells that are padding.
            valid_ratios: (B, L, n), the part of each level that is not padding.

        Returns:
            (B, S, C).

        Raises:
            TypeError: If an argument is no tensor, or the mask not bool.
            ValueError: If the shapes disagree.
        """
        check_tensor(_OP, "features", features, ("B", "S", self.self_attn.embed_dim))
        query = features
        if position is not None:
            check_tensor(_OP, "position", position, features.shape, (1, *features.shape[1:]))
            query = features + position
        if reference_points is None:
            reference_points = grid_points(
                spatial_shapes,
                valid_ratios,
                align_corners=self.self_attn.align_corners,
                dtype=torch.promote_types(features.dtype, torch.float32),
                device=features.device,
            ).expand(features.shape[0], -1, -1)
        attended = self.self_attn(
            query,
            reference_points,
            features,
            spatial_shapes,
            padding_mask=padding_mask,
            valid_ratios=valid_ratios,
        )
        features = self.norm1(features + self._dropped(attended))
        hidden = self._dropped(_ACTIVATIONS[self.activation](self.linear1(features)))
        encoded: Tensor = self.norm2(features + self._dropped(self.linear2(hidden)))
        return encoded

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


def grid_points(
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    valid_ratios: Tensor | None = None,
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Find the centre of every cell of a pyramid, as reference points.

    Args:
        spatial_shapes: L tuples of n sizes in the order of the axes (depth, height, width), or an
            (L, n) integer tensor.
        valid_ratios: (B, L, n), last axis x, y, z: the part of each level that is not padding, which
            the points are then relative to.
        align_corners: Whether 0 and 1 are the centres of the first and last cells, or their ends.
        dtype: Of the points.
        device: Of the points; that of ``valid_ratios`` if these are given.

    Returns:
        (B, S, n), B = 1 without ratios; last axis x, y, z. In [0, 1], but above 1 in padding.

    Raises:
        ValueError: If the shapes disagree.

    Memory: O(B S n).

    Examples:
        >>> grid_points([(1, 2)])
        tensor([[[0.2500, 0.5000],
                 [0.7500, 0.5000]]])
    """
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    sizes = [tuple(shape) for shape in spatial_shapes]
    if not sizes or len({len(size) for size in sizes}) != 1:
        message = f"grid_points: spatial_shapes must be tuples of one length, got {sizes}"
        raise ValueError(message)
    if valid_ratios is not None:
        check_tensor("grid_points", "valid_ratios", valid_ratios, ("B", len(sizes), len(sizes[0])))
        device = valid_ratios.device
    levels = []
    for level, size in enumerate(sizes):
        axes = [_centres(count, align_corners, dtype, device) for count in size]
        grid = torch.meshgrid(*axes, indexing="ij")
        points = torch.stack([axis.flatten() for axis in reversed(grid)], dim=-1)[None]  # [1, N, n]
        if valid_ratios is not None:
            points = points / valid_ratios[:, None, level].to(dtype)
        levels.append(points)
    return torch.cat(levels, dim=1)


def _centres(
    count: int, align_corners: bool, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    index = torch.arange(count, dtype=dtype, device=device)
    return index / max(count - 1, 1) if align_corners else (index + 0.5) / count
