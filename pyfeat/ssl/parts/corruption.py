"""Images of which connected groups of pixels are lost, to be filled in."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfeat._checks import check_choice, check_count

Fill = Literal["zeros", "noise", "copy", "alien"]


class Corruption(NamedTuple):
    """Images and what of them was lost."""

    images: Tensor  # (B, C, H, W)
    mask: Tensor  # (B, H, W) bool, True where corrupted


class _Blocks(NamedTuple):
    """Along one axis: where a rectangle of each image begins, (B,), and its pixels, (B, length)."""

    start: Tensor
    side: Tensor
    inside: Tensor


def group_corruption(
    images: Tensor,
    ratio: float = 0.5,
    *,
    fill: Fill = "zeros",
    largest: float = 0.3,
    align: int = 1,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
) -> Corruption:
    """Corrupt rectangles of each image until enough of its pixels are.

    Of each image at least the share ``ratio`` is corrupted, or above a half a share drawn between
    that and ``ratio``, and at most by one rectangle more: pixels are counted, however rectangles
    overlap. Their places are drawn on a grid, their sides from one cell of it to ``largest``; what
    lies beyond the edge is cut off. Draws from torch's generator of the device.

    Args:
        images: (B, C, H, W) float.
        ratio: In (0, 1).
        fill: What pixels become: "zeros", the mean; "noise", normal with mean and deviation; "copy",
            a rectangle of the same image; "alien", the same rectangle of another image of the batch.
        largest: Longest side of a rectangle, as a share of the image's, in (0, 1].
        align: Pixels of a cell of the grid; 1 for any place.
        mean: Of each channel (C,), or of all.
        std: Likewise.

    Raises:
        ValueError: If an argument is out of range, or there is no other image to take pixels from.

    Source: Atito et al., GMML is all you need, 2022, arXiv:2205.14986; SiT, 2021, arXiv:2104.03602.

    Examples:
        >>> found = group_corruption(torch.ones(2, 3, 32, 32), 0.5)
        >>> found.mask.flatten(1).double().mean(dim=1) >= 0.5
        tensor([True, True])
    """
    op = "group_corruption"
    _check(op, images, ratio, fill, largest, align)
    batch, _, height, width = images.shape
    device = images.device
    low = min(0.5, ratio)
    wanted = height * width * (low + (ratio - low) * torch.rand(batch, device=device))
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
    source = torch.arange(height * width, device=device).view(height, width).expand(batch, -1, -1)
    while bool((short := mask.sum(dim=(1, 2)) < wanted).any()):
        rows = _blocks(batch, height, largest, align, device)
        columns = _blocks(batch, width, largest, align, device)
        inside = rows.inside[:, :, None] & columns.inside[:, None] & short[:, None, None]
        if fill == "copy":
            places = _elsewhere(rows, height)[:, :, None] * width
            source = source.where(~inside, places + _elsewhere(columns, width)[:, None])
        mask |= inside
    shape = (-1, 1, 1)
    if fill == "copy":
        index = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        filled = images.flatten(2).gather(2, index).view_as(images)
    elif fill == "alien":
        steps = torch.randint(1, batch, (batch,), device=device)
        filled = images[(torch.arange(batch, device=device) + steps) % batch]
    else:
        filled = torch.as_tensor(mean).to(images).view(shape).expand_as(images)
        if fill == "noise":
            filled = filled + torch.as_tensor(std).to(images).view(shape) * torch.randn_like(images)
    return Corruption(torch.where(mask[:, None], filled, images), mask)


def _check(op: str, images: Tensor, ratio: float, fill: str, largest: float, align: int) -> None:
    check_choice(op, "fill", fill, ("zeros", "noise", "copy", "alien"))
    check_count(op, "align", align)
    if images.ndim != 4 or 0 in images.shape[2:]:
        message = f"{op}: images must have shape (B, C, H, W), got {tuple(images.shape)}"
        raise ValueError(message)
    if not 0.0 < ratio < 1.0:
        message = f"{op}: ratio must be in (0, 1), got {ratio}"
        raise ValueError(message)
    if not 0.0 < largest <= 1.0:
        message = f"{op}: largest must be in (0, 1], got {largest}"
        raise ValueError(message)
    if fill == "alien" and len(images) < 2:
        message = f"{op}: images must be at least two for fill 'alien', got {len(images)}"
        raise ValueError(message)


def _blocks(batch: int, length: int, largest: float, align: int, device: torch.device) -> _Blocks:
    cells = -(-length // align)
    most = max(1, int(largest * length) // align)
    start = align * torch.randint(cells, (batch,), device=device)
    side = align * torch.randint(1, most + 1, (batch,), device=device)
    side = torch.minimum(side, length - start)
    places = torch.arange(length, device=device)
    inside = (places >= start[:, None]) & (places < (start + side)[:, None])
    return _Blocks(start, side, inside)


def _elsewhere(blocks: _Blocks, length: int) -> Tensor:
    """(B, length): for places of a rectangle, those of one as large that lies anywhere."""
    room = length - blocks.side + 1
    other = (torch.rand(len(room), device=room.device) * room).long()
    places = torch.arange(length, device=room.device) + (other - blocks.start)[:, None]
    return places.clamp(0, length - 1)
