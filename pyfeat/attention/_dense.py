"""Dense attention over a deformed, down-sampled set of keys along one axis."""

import math

import torch
from torch import Tensor, nn

from pyfeat._checks import check_choice, check_count
from pyfeat.attention._module_arguments import check_tensor
from pyfeat.attention._op import deform_attn

_OP = "DeformableAttention1D"


class DeformableAttention1D(nn.Module):
    """Attention of all positions of an axis to samples of it at learned places.

    Of n positions, m = n // ``stride`` samples are taken by linear interpolation, 0 beyond the ends.
    Every group of features has its own: sample j lies at the j-th of m references plus
    ``offset_scale * tanh(...)`` of a small convolution of the group's queries. Keys and values are
    projections of the samples. The logits have a learned bias by signed distance,
    ``MLP(sign(d) log(1 + |d|))``, where d is the difference of coordinates in [-1, 1].

    References, distances and the sampler share one convention. With ``align_corners``, the m
    references span the axis from the first position to the last, and an offset of 1 is
    (n - 1) / (m - 1) positions. Without, reference j is the centre of the j-th of m equal parts,
    which is that of its convolution's window if ``stride`` divides n, and an offset of 1 is n / m
    positions. Other code mixes the two: it places samples by the first and reads by the second, up
    to half a position aside. Parameters have the names and shapes of that code.

    Args:
        embed_dim: Features C of a position, a multiple of ``num_groups``.
        num_heads: Heads H, a multiple of ``num_groups``.
        head_dim: Features of a head.
        num_groups: Groups G with places of their own; None for one to a head.
        stride: Positions to a sample, at least 1.
        kernel_size: Of the convolution that predicts offsets: ``stride`` plus an even number.
        offset_scale: Largest offset, in distances between references; None for ``stride``.
        axis: What is sampled in an input (B, N, D): "sequence", where N are positions of D = C
            features; or "features", where D are positions, of N = C features.
        align_corners: As above.
        dropout: Of attention weights, in training; in [0, 1).

    Raises:
        TypeError: If a count is no integer.
        ValueError: If an argument is out of its range, no multiple, or none of its choices.

    Precision: places are float32 at least.
    Memory: O(B H n m + B G n m C): the bias has hidden features for every pair.
    Source: Xia et al., Vision transformer with deformable attention, CVPR 2022, arXiv:2201.00520; over
    slices of volumes: Nguyen et al., Joint self-supervised image-volume representation learning with
    intra-inter contrastive clustering, AAAI 2023, arXiv:2212.01893; the bias: Liu et al., Swin
    transformer V2, CVPR 2022, arXiv:2111.09883.

    Examples:
        >>> attention = DeformableAttention1D(16, num_heads=2, head_dim=4)
        >>> attention(torch.zeros(1, 64, 16)).shape
        torch.Size([1, 64, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        *,
        head_dim: int = 64,
        num_groups: int | None = None,
        stride: int = 4,
        kernel_size: int = 6,
        offset_scale: float | None = None,
        axis: str = "sequence",
        align_corners: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        groups = num_heads if num_groups is None else num_groups
        counts = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_groups": groups,
            "stride": stride,
            "kernel_size": kernel_size,
        }
        for name, count in counts.items():
            check_count(_OP, name, count)
        for name in ("embed_dim", "num_heads"):
            if counts[name] % groups:
                message = (
                    f"{_OP}: {name} must be a multiple of num_groups = {groups}, got {counts[name]}"
                )
                raise ValueError(message)
        if kernel_size < stride or (kernel_size - stride) % 2:
            wanted = f"stride = {stride} plus an even number"
            message = f"{_OP}: kernel_size must be {wanted}, got {kernel_size}"
            raise ValueError(message)
        check_choice(_OP, "axis", axis, ("sequence", "features"))
        scale = float(stride if offset_scale is None else offset_scale)
        if not 0 <= scale < math.inf:
            message = f"{_OP}: offset_scale must be at least 0 and finite, got {offset_scale}"
            raise ValueError(message)
        if not 0 <= dropout < 1:
            message = f"{_OP}: dropout must be in [0, 1), got {dropout}"
            raise ValueError(message)
        self.embed_dim, self.num_heads, self.num_groups = embed_dim, num_heads, groups
        self.stride, self.offset_scale, self.axis = stride, scale, axis
        self.align_corners, self.dropout = align_corners, dropout
        width = num_heads * head_dim
        self.to_q = nn.Conv1d(embed_dim, width, 1, groups=groups, bias=False)
        self.to_k = nn.Conv1d(embed_dim, width, 1, groups=groups, bias=False)
        self.to_v = nn.Conv1d(embed_dim, width, 1, groups=groups, bias=False)
        self.to_out = nn.Conv1d(width, embed_dim, 1)
        group_width, padding = width // groups, (kernel_size - stride) // 2
        self.to_offsets = nn.Sequential(
            nn.Conv1d(group_width, group_width, kernel_size, stride, padding, groups=group_width),
            nn.GELU(),
            nn.Conv1d(group_width, 1, 1, bias=False),
        )
        self.rel_pos_bias = _DistanceBias(max(embed_dim // 4, 1), num_heads // groups)

    def extra_repr(self) -> str:
        """Of the repr, what stands between the brackets."""
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_groups={self.num_groups}, "
            f"stride={self.stride}, offset_scale={self.offset_scale}, axis={self.axis!r}, "
            f"align_corners={self.align_corners}, dropout={self.dropout}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend along the axis.

        Args:
            x: (B, N, D), of which ``axis`` says what are positions; at least ``stride`` of them.

        Returns:
            (B, N, D).

        Raises:
            TypeError: If ``x`` is no tensor.
            ValueError: If its shape does not fit, or there are too few positions.
        """
        over_features = self.axis == "features"
        shape = ("B", self.embed_dim, "D") if over_features else ("B", "N", self.embed_dim)
        check_tensor(_OP, "x", x, shape)
        x = x if over_features else x.transpose(1, 2)  # [B, C, n]
        if x.shape[2] < self.stride:
            message = f"{_OP}: x must have at least {self.stride} positions, got {x.shape[2]}"
            raise ValueError(message)
        query = self.to_q(x)  # [B, H d, n]
        places = self._places(query)  # [B, G, m]
        samples = self._sampled(x, places).transpose(1, 2)  # [B, C, m]
        bias = self._bias(x.shape[2], places)
        attended = nn.functional.scaled_dot_product_attention(
            self._heads(query),
            self._heads(self.to_k(samples)),
            self._heads(self.to_v(samples)),
            attn_mask=bias.to(query.dtype),
            dropout_p=self.dropout if self.training else 0.0,
        )  # [B, H, n, d]
        output: Tensor = self.to_out(attended.transpose(2, 3).flatten(1, 2))
        return output if over_features else output.transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 1, (self.num_heads, -1)).transpose(2, 3)  # [B, H, n or m, d]

    def _places(self, query: Tensor) -> Tensor:
        """(B, G, m): places of the samples, in [0, 1] on the axis."""
        groups = torch.unflatten(query, 1, (self.num_groups, -1)).flatten(0, 1)  # [B G, H d / G, n]
        offsets = self.to_offsets(groups).view(query.shape[0], self.num_groups, -1)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        offsets = self.offset_scale * offsets.tanh()
        return self._normalized(
            torch.arange(offsets.shape[-1], device=query.device) + offsets, offsets.shape[-1]
        )

    def _sampled(self, x: Tensor, places: Tensor) -> Tensor:
        """(B, m, C): every group of features at its places."""
        value = torch.unflatten(x.transpose(1, 2), -1, (self.num_groups, -1))  # [B, n, G, C / G]
        locations = places.transpose(1, 2)[..., None, None, None]  # [B, m, G, 1, 1, 1]
        return deform_attn(
            value,
            [(x.shape[2],)],
            locations,
            value.new_ones(locations.shape[:5]),
            align_corners=self.align_corners,
        )

    def _bias(self, length: int, places: Tensor) -> Tensor:
        """(B, H, n, m): of the logits."""
        own = self._normalized(
            torch.arange(length, device=places.device, dtype=places.dtype), length
        )
        distances = 2 * (own[:, None] - places[:, :, None, :])  # [B, G, n, m]
        bias: Tensor = self.rel_pos_bias(distances)  # [B, G, n, m, H / G]
        return bias.movedim(-1, 2).flatten(1, 2)

    def _normalized(self, index: Tensor, count: int) -> Tensor:
        """In [0, 1] on the axis, the places of indices of ``count`` positions or references."""
        if self.align_corners:
            return index / max(count - 1, 1)
        return (index + 0.5) / count


class _DistanceBias(nn.Module):
    """The bias of logits by signed distance, a multi-layer perceptron of its logarithm."""

    def __init__(self, hidden: int, num_outputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Sequential(nn.Linear(1, hidden), nn.ReLU()),
            nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, num_outputs),
        )

    def forward(self, distances: Tensor) -> Tensor:
        # Not by sign and absolute value, of which torch's derivative at 0 is 0 and not 1.
        logs = distances.clamp(min=0).log1p() - distances.neg().relu().log1p()
        bias: Tensor = self.mlp(logs[..., None].to(next(self.parameters()).dtype))
        return bias
