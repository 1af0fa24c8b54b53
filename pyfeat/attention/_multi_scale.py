"""Multi-scale deformable attention as a module, over one, two or three spatial axes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyfeat._checks import check_choice, dtype_name
from pyfeat.attention._module_arguments import check_heads, check_tensor, points_of_levels
from pyfeat.attention._op import Padding, Sampling, deform_attn

_OP = "MultiScaleDeformAttn"


class MultiScaleDeformAttn(nn.Module):
    """Attention of queries to a few learned points of every level of a pyramid.

    With ``r`` the reference of a query, every head has T points at ``r + offset`` and weights them by
    a softmax over all T; offsets and logits are linear in the query. Offsets are in cells of the
    level; those from a box are in ``offset_scale * size / P`` of it, P the points of the level.

    Parameters have the names and shapes of Deformable DETR, so that its weights load. To begin with,
    the heads look in different directions, point k of a level k + 1 cells away, with equal weights.

    Args:
        embed_dim: Features C of queries, of value and of the result; a multiple of ``num_heads``.
        num_heads: Heads H.
        num_levels: Levels L.
        num_points: Points P of a head at every level, or a list with the points of each level.
        ndim: Spatial axes n: 1, 2 or 3.
        bias: Of the projections of value and result; offsets and logits always have one.
        padding: As in ``deform_attn``.
        align_corners: As in ``deform_attn``.
        sampling: As in ``deform_attn``; with "discrete" no gradient comes to offsets and references.
        offset_scale: Of the offsets from a box; > 0 and finite.

    Raises:
        TypeError: If a count is no integer.
        ValueError: If a count is below 1, ``embed_dim`` no multiple of ``num_heads``, ``num_points``
            not of ``num_levels`` counts, ``ndim``, ``padding`` or ``sampling`` none of its choices,
            or ``offset_scale`` not positive.

    Precision: locations are float32 at least, under autocast and for modules of 16 bits too.
    Memory: forward, O(B S C + B Q H T n): no sampled features are stored.
    Source: Zhu et al., Deformable DETR: deformable transformers for end-to-end object detection, ICLR
    2021, arXiv:2010.04159; points by level and "discrete": Lv et al., RT-DETRv2, 2024,
    arXiv:2407.17140.

    Examples:
        >>> attention = MultiScaleDeformAttn(8, num_heads=2, num_levels=2, num_points=[4, 2])
        >>> shapes = [(4, 6), (2, 3)]
        >>> query, value = torch.zeros(1, 5, 8), torch.zeros(1, 4 * 6 + 2 * 3, 8)
        >>> attention(query, torch.full((1, 5, 2), 0.5), value, shapes).shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        ndim: int = 2,
        *,
        bias: bool = True,
        padding: Padding = "zeros",
        align_corners: bool = False,
        sampling: Sampling = "linear",
        offset_scale: float = 0.5,
    ) -> None:
        super().__init__()
        check_heads(_OP, embed_dim, num_heads)
        check_choice(_OP, "ndim", ndim, (1, 2, 3))
        check_choice(_OP, "padding", padding, ("zeros", "border"))
        check_choice(_OP, "sampling", sampling, ("linear", "discrete"))
        if not 0 < offset_scale < math.inf:
            message = f"{_OP}: offset_scale must be positive and finite, got {offset_scale}"
            raise ValueError(message)
        self.num_points = points_of_levels(_OP, num_points, num_levels)
        self.embed_dim, self.num_heads, self.ndim = embed_dim, num_heads, ndim
        self.padding, self.align_corners, self.sampling = padding, align_corners, sampling
        self.offset_scale = offset_scale
        total = sum(self.num_points)
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * total * ndim)
        self.attention_weights = nn.Linear(embed_dim, num_heads * total)
        self.value_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.output_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew and turn the heads to their first directions."""
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        steps = torch.cat([torch.arange(1.0, count + 1) for count in self.num_points])  # [T]
        directions = head_directions(self.num_heads, self.ndim)  # [H, n]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        """Of the repr, what stands between the brackets."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_points={self.num_points}, "
            f"ndim={self.ndim}, padding={self.padding!r}, align_corners={self.align_corners}, "
            f"sampling={self.sampling!r}, offset_scale={self.offset_scale}"
        )

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[Sequence[int]] | Tensor,
        *,
        padding_mask: Tensor | None = None,
        valid_ratios: Tensor | None = None,
    ) -> Tensor:
        """Attend from every query to the points around its reference.

        Args:
            query: (B, Q, C), positional embedding included.
            reference_points: (B, Q, n) or (B, Q, L, n) points, last axis x, y, z, in [0, 1] over the
                level; or (B, Q, 2n) or (B, Q, L, 2n) boxes: centre, then size.
            value: (B, S, C), S the cells of all levels, level by level.
            spatial_shapes: L tuples of n sizes, in the order of value's axes (depth, height, width),
                or an (L, n) integer tensor.
            padding_mask: (B, S) bool, True at cells that are padding: they contribute 0.
            valid_ratios: (B, L, n), last axis x, y, z: the part of each level that is not padding.
                References are then relative to that part.

        Returns:
            (B, Q, C).

        Raises:
            TypeError: If an argument is no tensor, or the mask not bool.
            ValueError: If the shapes disagree.
        """
        sizes = self._sizes(spatial_shapes)
        self._check(query, reference_points, value, padding_mask, valid_ratios)
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        total = sum(self.num_points)
        offsets = self.sampling_offsets(query)
        offsets = torch.unflatten(offsets, -1, (self.num_heads, total, self.ndim))
        logits = torch.unflatten(self.attention_weights(query), -1, (self.num_heads, total))
        output = deform_attn(
            torch.unflatten(value, -1, (self.num_heads, -1)),
            sizes,
            self._locations(reference_points, offsets, sizes, valid_ratios),
            logits,
            num_points=self.num_points,
            padding=self.padding,
            align_corners=self.align_corners,
            sampling=self.sampling,
            softmax=True,
        )
        projected: Tensor = self.output_proj(output)
        return projected

    def _locations(
        self,
        reference_points: Tensor,
        offsets: Tensor,
        sizes: Sequence[Sequence[int]],
        valid_ratios: Tensor | None,
    ) -> Tensor:
        """(B, Q, H, T, n): where the points of every query and head are, in float32 at least."""
        ndim, counts = self.ndim, self.num_points
        dtype = torch.promote_types(reference_points.dtype, torch.float32)
        references = reference_points.to(dtype)
        if references.ndim == 3:
            references = references[:, :, None].expand(-1, -1, len(counts), -1)
        if valid_ratios is not None:
            repeats = references.shape[-1] // ndim
            references = references * valid_ratios.to(dtype).repeat(1, 1, repeats)[:, None]
        of_points = [
            references[:, :, level, None].expand(-1, -1, count, -1)
            for level, count in enumerate(counts)
        ]
        references = torch.cat(of_points, dim=2)[:, :, None]  # [B, Q, 1, T, n or 2n]
        offsets = offsets.to(torch.promote_types(offsets.dtype, dtype))
        if references.shape[-1] == ndim:
            last = 1 if self.align_corners else 0
            cells = [[max(size - last, 1) for size in reversed(shape)] for shape in sizes]
            return references + offsets / self._of_points(cells, offsets)
        scales = self._of_points([[self.offset_scale / count] for count in counts], offsets)
        return references[..., :ndim] + offsets * (references[..., ndim:] * scales)

    def _of_points(self, numbers: Sequence[Sequence[float]], like: Tensor) -> Tensor:
        """(T, n): for every point, those of its level.

        Filled in on the device: a copy from the host could not be captured in a CUDA graph.
        """
        levels = [torch.stack([like.new_full((), x) for x in level]) for level in numbers]
        return torch.cat(
            [x.expand(count, -1) for x, count in zip(levels, self.num_points, strict=True)]
        )

    def _sizes(self, spatial_shapes: Sequence[Sequence[int]] | Tensor) -> list[tuple[int, ...]]:
        if isinstance(spatial_shapes, Tensor):
            spatial_shapes = spatial_shapes.tolist()
        sizes = [tuple(shape) for shape in spatial_shapes]
        if len(sizes) != len(self.num_points) or any(len(size) != self.ndim for size in sizes):
            wanted = f"{len(self.num_points)} tuples of {self.ndim} sizes"
            message = f"{_OP}: spatial_shapes must be {wanted}, got {sizes}"
            raise ValueError(message)
        return sizes

    def _check(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        padding_mask: Tensor | None,
        valid_ratios: Tensor | None,
    ) -> None:
        levels, ndim = len(self.num_points), self.ndim
        check_tensor(_OP, "query", query, ("B", "Q", self.embed_dim))
        batch, queries = query.shape[:2]
        check_tensor(_OP, "value", value, (batch, "S", self.embed_dim))
        check_tensor(
            _OP,
            "reference_points",
            reference_points,
            (batch, queries, ndim),
            (batch, queries, levels, ndim),
            (batch, queries, 2 * ndim),
            (batch, queries, levels, 2 * ndim),
        )
        if padding_mask is not None:
            check_tensor(_OP, "padding_mask", padding_mask, (batch, value.shape[1]))
            if padding_mask.dtype != torch.bool:
                message = f"{_OP}: padding_mask must be bool, got {dtype_name(padding_mask.dtype)}"
                raise TypeError(message)
        if valid_ratios is not None:
            check_tensor(_OP, "valid_ratios", valid_ratios, (batch, levels, ndim))


def head_directions(num_heads: int, ndim: int) -> Tensor:
    """(H, n) float32: directions of the heads, with a largest coordinate of magnitude 1.

    Spread evenly over the circle for n = 2 and, as a Fibonacci lattice, over the sphere for n = 3;
    alternating for n = 1.
    """
    head = torch.arange(num_heads, dtype=torch.float64)
    if ndim == 1:
        directions = (1 - 2 * (head % 2))[:, None]
    elif ndim == 2:
        angle = head * (2 * math.pi / num_heads)
        directions = torch.stack([angle.cos(), angle.sin()], dim=1)
    else:
        angle, z = head * (math.pi * (3 - math.sqrt(5))), 1 - (2 * head + 1) / num_heads
        radius = (1 - z * z).sqrt()
        directions = torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=1)
    return (directions / directions.abs().amax(dim=1, keepdim=True)).float()
