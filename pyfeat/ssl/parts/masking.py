"""Which patches of an image are hidden."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Patches of each image, divided into those that are seen and those that are hidden."""

    seen: Tensor  # (B, T - m) int64, patches of the grid row by row, ascending
    hidden: Tensor  # (B, m) int64, ascending

    def mask(self) -> Tensor:
        """(B, T) bool, True where hidden."""
        batch, num_hidden = self.hidden.shape
        flags = torch.zeros(
            batch, self.seen.shape[1] + num_hidden, dtype=torch.bool, device=self.hidden.device
        )
        return flags.scatter_(1, self.hidden, True)


def random_masking(
    batch: int, num_patches: int, ratio: float, *, device: torch.device | str = "cpu"
) -> Masking:
    """Hide ``round(ratio * num_patches)`` patches of every image, each set equally likely.

    Draws from torch's generator of the device.

    Args:
        batch: B.
        num_patches: T.
        ratio: In (0, 1), such that at least one patch is hidden and one seen.
        device: Of the result.

    Raises:
        ValueError: If the ratio leaves nothing to see or to hide.

    Source: He et al., Masked autoencoders, CVPR 2022, arXiv:2111.06377.
    """
    num_hidden = _num_hidden("random_masking", num_patches, ratio)
    order = torch.rand(batch, num_patches, device=device).argsort(dim=1)
    hidden, seen = order[:, :num_hidden], order[:, num_hidden:]
    return Masking(seen.sort(dim=1).values, hidden.sort(dim=1).values)


def block_masking(
    batch: int,
    grid: Sequence[int],
    ratio: float,
    *,
    min_aspect: float = 0.3,
    min_patches: int = 4,
    device: torch.device | str = "cpu",
) -> Masking:
    """Hide ``round(ratio * T)`` patches of every image, in rectangles.

    Rectangles of random size, side ratio and place are laid until enough is hidden; of the last,
    patches drawn at random fit the number exactly, so that a batch stays a tensor. Draws from
    torch's generator of the CPU.

    Args:
        batch: B.
        grid: Patches along each axis, rows and columns; T is their product.
        ratio: As in ``random_masking``.
        min_aspect: In (0, 1], the least ratio of sides; the largest is its inverse.
        min_patches: Of a rectangle, at least 1.
        device: Of the result.

    Raises:
        ValueError: If an argument is out of range.

    Source: Bao et al., BEiT, ICLR 2022, arXiv:2106.08254.
    """
    op = "block_masking"
    if len(grid) != 2 or min(grid) < 1:
        message = f"{op}: grid must be rows and columns, got {tuple(grid)}"
        raise ValueError(message)
    if not 0.0 < min_aspect <= 1.0:
        message = f"{op}: min_aspect must be in (0, 1], got {min_aspect}"
        raise ValueError(message)
    if min_patches < 1:
        message = f"{op}: min_patches must be at least 1, got {min_patches}"
        raise ValueError(message)
    rows, columns = grid
    num_hidden = _num_hidden(op, rows * columns, ratio)
    masks = torch.stack(
        [_blocks(rows, columns, num_hidden, min_aspect, min_patches) for _ in range(batch)]
        or [torch.zeros(0, rows * columns, dtype=torch.bool)[:0].reshape(0)]
    ).reshape(batch, rows * columns)
    order = masks.long().argsort(dim=1, stable=True).to(device)  # seen first, each ascending
    return Masking(order[:, :-num_hidden], order[:, -num_hidden:])


def _blocks(
    rows: int, columns: int, num_hidden: int, min_aspect: float, min_patches: int
) -> Tensor:
    """(rows * columns,) bool, of which ``num_hidden`` are True."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    while (missing := num_hidden - int(mask.sum())) > 0:
        area, slant, top, left = torch.rand(4).tolist()
        wanted = min_patches + area * max(0, missing - min_patches)
        aspect = math.exp((2.0 * slant - 1.0) * math.log(1.0 / min_aspect))
        height = min(rows, max(1, round(math.sqrt(wanted * aspect))))
        width = min(columns, max(1, round(math.sqrt(wanted / aspect))))
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        block = torch.zeros_like(mask)
        block[top : top + height, left : left + width] = True
        added = (block & ~mask).flatten().nonzero().squeeze(1)
        if len(added) > missing:
            added = added[torch.randperm(len(added))[:missing]]
        mask.view(-1)[added] = True
    return mask.flatten()


def _num_hidden(op: str, num_patches: int, ratio: float) -> int:
    num_hidden = round(ratio * num_patches)
    if not 0 < num_hidden < num_patches:
        message = f"{op}: ratio must hide at least one of {num_patches} patches and leave one, got {ratio}"
        raise ValueError(message)
    return num_hidden
