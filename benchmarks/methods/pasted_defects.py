"""Defects pasted into good pictures of solar cells: what configurations are chosen by, without a label.

Under current a cell glows; where it is broken it stays dark. Three kinds follow from that alone, the
fourth is the cut and paste of Li et al., CutPaste, CVPR 2021, arXiv:2104.04015.
"""

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("crack", "dead area", "broken finger", "foreign patch")


def pasted(image: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paste one defect.

    Args:
        image: (3, H, W) float32 in [0, 1].
        kind: One of ``KINDS``.
        generator: Of place, size and depth.

    Returns:
        The picture, and where it changed by more than 1 / 255: (H, W) bool.
    """
    height, width = image.shape[1:]
    if kind == "foreign patch":
        changed = _foreign_patch(image, generator)
    else:
        draw = {"crack": _crack, "dead area": _dead_area, "broken finger": _broken_finger}[kind]
        depth = float(_between(0.25, 0.75, generator))  # share of the light that is lost
        changed = image * (1 - depth * draw(height, width, generator))
    mask = (changed - image).abs().amax(dim=0) > 1 / 255
    return changed, mask


def _crack(height: int, width: int, generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: a line that turns a little at every step, 1 % of the side wide."""
    steps = int(_between(0.15, 0.6, generator) * max(height, width))
    turns = 0.25 * torch.randn(steps, generator=generator)
    angles = 6.2832 * torch.rand((), generator=generator) + turns.cumsum(0) * 0.5
    path = torch.stack([angles.sin(), angles.cos()]).cumsum(1)  # [2, steps]
    start = torch.rand(2, 1, generator=generator) * torch.tensor([[height], [width]])
    rows, columns = (path + start).round().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    line = torch.zeros(height, width)
    line[rows[inside], columns[inside]] = 1
    return _blurred(line, 0.004 * max(height, width)).div_(0.35).clamp_(max=1)


def _dead_area(height: int, width: int, generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: what smooth noise has above a level, 1 to 15 % of the picture."""
    cells = int(torch.randint(2, 5, (), generator=generator))
    noise = torch.rand(1, 1, cells + 2, cells + 2, generator=generator)
    field = functional.interpolate(noise, size=(height, width), mode="bicubic")[0, 0]
    level = field.flatten().quantile(1 - float(_between(0.01, 0.15, generator)))
    return _blurred((field > level).float(), 0.006 * max(height, width))


def _broken_finger(height: int, width: int, generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: an upright bar, 2 to 6 % wide and 5 to 30 % high."""
    sides = [
        max(1, round(float(_between(low, high, generator)) * side))
        for low, high, side in ((0.05, 0.3, height), (0.02, 0.06, width))
    ]
    top, left = (
        int(torch.randint(0, side - size + 1, (), generator=generator))
        for side, size in zip((height, width), sides, strict=True)
    )
    bar = torch.zeros(height, width)
    bar[top : top + sides[0], left : left + sides[1]] = 1
    return _blurred(bar, 0.004 * max(height, width))


def _foreign_patch(image: Tensor, generator: torch.Generator) -> Tensor:
    """A piece of the picture, 5 to 20 % high and wide, laid elsewhere in it."""
    height, width = image.shape[1:]
    shares = _between(0.05, 0.2, generator, count=2)
    rows, columns = (max(1, round(float(s) * side)) for s, side in zip(shares, (height, width)))  # noqa: B905
    places = torch.rand(2, 2, generator=generator) * torch.tensor([height - rows, width - columns])
    (top, left), (to_top, to_left) = places.long().tolist()
    changed = image.clone()
    piece = image[:, top : top + rows, left : left + columns]
    changed[:, to_top : to_top + rows, to_left : to_left + columns] = piece
    return changed


def _blurred(values: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(sigma, 1e-3)) ** 2)
    taps = taps / taps.sum()
    padded = functional.pad(values[None, None], (reach,) * 4, mode="replicate")
    return functional.conv2d(
        functional.conv2d(padded, taps[None, None, None]), taps[None, None, :, None]
    )[0, 0]


def _between(low: float, high: float, generator: torch.Generator, *, count: int = 1) -> Tensor:
    values = low + (high - low) * torch.rand(count, generator=generator)
    return values if count > 1 else values[0]
