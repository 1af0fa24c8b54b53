"""Cutting out what stands out: masks of a fixed area, and what is shown in their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pyfeat._checks import check_choice

Hint = Literal["mosaic", "empty", "none"]
HINTS: tuple[Hint, ...] = ("mosaic", "empty", "none")


@dataclass(frozen=True)
class Excision:
    """What of an image is hidden, and how.

    Attributes:
        area: Share of the pixels that are cut out where they stand out most, in (0, 1).
        dilation: Cells of the saliency's grid by which the cut then grows on all sides, >= 0.
        hint: What is shown in the cut: "mosaic", its means over blocks; "empty", zeros; "none" leaves
            the image as it is, which makes the network a plain autoencoder.
        block: Side in pixels of a block of the mosaic; None takes a sixteenth of the image's height.

    Raises:
        ValueError: If a field is out of range.
    """

    area: float = 0.3
    dilation: int = 0
    hint: Hint = "mosaic"
    block: int | None = None

    def __post_init__(self) -> None:
        check_choice("EAR", "hint", self.hint, HINTS)
        for name, holds, expected in (
            ("area", 0 < self.area < 1, "be in (0, 1)"),
            ("dilation", self.dilation >= 0, "be at least 0"),
            ("block", self.block is None or self.block >= 1, "be at least 1"),
        ):
            if not holds:
                message = f"EAR: {name} must {expected}, got {getattr(self, name)!r}"
                raise ValueError(message)

    def masks(self, saliency: Tensor, size: tuple[int, int]) -> Tensor:
        """Cut out where the saliency (B, h, w) is highest: (B, H, W) bool, True is cut out."""
        up = functional.interpolate(
            saliency[:, None].float(), size, mode="bilinear", align_corners=False
        )[:, 0]
        cells = [-(-pixels // n) for pixels, n in zip(size, saliency.shape[1:], strict=True)]
        return dilate(quantile_masks(up, self.area), [self.dilation * side for side in cells])

    def shown(self, images: Tensor, masks: Tensor) -> Tensor:
        """What is left of images (B, 3, H, W) once masks (B, H, W) are cut out, with the hint."""
        if self.hint == "none":
            return images
        if self.hint == "empty":
            return images * ~masks[:, None]
        block = max(1, images.shape[2] // 16) if self.block is None else self.block
        return torch.where(masks[:, None], mosaic(images, block), images)


def quantile_masks(saliency: Tensor, area: float) -> Tensor:
    """Mark the most salient pixels of each image, always equally many.

    Among equal ones the earlier in row order are marked, so that maps without a peak, even constant
    ones, give masks of the same area, and equal maps equal masks.

    Args:
        saliency: (B, H, W) float.
        area: Share of the pixels, in (0, 1); at least one is marked.

    Returns:
        (B, H, W) bool with ``max(1, round(area H W))`` True for each image.

    Examples:
        >>> quantile_masks(torch.tensor([[[0.0, 3.0], [1.0, 2.0]]]), 0.5).int()
        tensor([[[0, 1],
                 [0, 1]]], dtype=torch.int32)
    """
    flat = saliency.flatten(1)
    count = max(1, round(area * flat.shape[1]))
    order = flat.argsort(dim=1, descending=True, stable=True)
    marked = torch.zeros_like(flat, dtype=torch.bool)
    return marked.scatter_(1, order[:, :count], True).view_as(saliency)


def dilate(masks: Tensor, radius: Sequence[int]) -> Tensor:
    """Grow masks (B, H, W) by ``radius`` pixels, up and down and to both sides."""
    if not any(radius):
        return masks
    up, side = radius
    grown = functional.max_pool2d(
        masks[:, None].float(), (2 * up + 1, 2 * side + 1), stride=1, padding=(up, side)
    )
    return grown[:, 0] > 0.5


def mosaic(images: Tensor, block: int) -> Tensor:
    """Replace pixels by the mean of their block, on a grid that begins at the upper left corner.

    The grid belongs to the image, not to a mask: two masks show the same mosaic where they meet.
    Blocks at the right and lower border are cut off there, and their means are of what is left.

    Args:
        images: (B, C, H, W) float.
        block: Side in pixels, at least 1; any size, also above the image's.

    Returns:
        (B, C, H, W).

    Examples:
        >>> mosaic(torch.tensor([[[[0.0, 2.0, 5.0]]]]), 2)
        tensor([[[[1., 1., 5.]]]])
    """
    height, width = images.shape[2:]
    down, right = (-pixels % block for pixels in (height, width))
    padded = functional.pad(images, (0, right, 0, down))
    inside = functional.pad(images.new_ones(1, 1, height, width), (0, right, 0, down))
    means = functional.avg_pool2d(padded, block) / functional.avg_pool2d(inside, block)
    whole = means.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3)
    return whole[:, :, :height, :width]


def coverage(masks: Tensor, defects: Tensor) -> float:
    """Return the share of defective pixels that were cut out; those that were not can be copied.

    Args:
        masks: (B, H, W) bool, True is cut out.
        defects: (B, H, W) bool, True is defective; at least one.

    Raises:
        ValueError: If the shapes differ, or no pixel is defective.
    """
    if masks.shape != defects.shape or not defects.any():
        message = (
            f"coverage: defects must have shape {tuple(masks.shape)} and hold a defective pixel, got "
            f"{tuple(defects.shape)} with {int(defects.sum())}"
        )
        raise ValueError(message)
    return float(masks.bool()[defects.bool()].float().mean())
