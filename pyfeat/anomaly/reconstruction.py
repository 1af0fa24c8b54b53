"""Rebuilding images: how far a rebuilt image is from its original, and how a network learns it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._checks import check_choice
from pyfeat._extras import require

ResidualName = Literal["msgms", "absolute"]
RESIDUALS: tuple[ResidualName, ...] = ("msgms", "absolute")
# c of the similarity of gradient magnitudes: 170 of its source, for pixels in [0, 1] (170 / 255^2).
_GMS_CONSTANT = 0.0026
_SCALES = 4
# Below a quarter of one grey level of 256, what differs between normal images is rounding.
_LEAST_SPREAD = 1e-3
_FEWEST = 16  # images from which a spread at each pixel is worth more than none


@dataclass(frozen=True)
class RebuildOptions:
    """How a network learns to rebuild images.

    Attributes:
        steps: Changes of the weights, at least 1.
        batch_size: Images a step, at least 1.
        lr: Learning rate of Adam at first, above 0; it falls to 0 along a cosine.
        l2: Weight of the mean squared error, >= 0.
        ssim: Weight of 1 less the structural similarity, >= 0.
        msgms: Weight of 1 less the similarity of gradient magnitudes on four scales, >= 0.
        flip: Mirror images at random, both ways.
        zoom: Largest share of the sides that a random crop leaves out, in [0, 1).
        brightness: Largest relative change of brightness, in [0, 1).

    Raises:
        ValueError: If a field is out of range.
    """

    steps: int = 2000
    batch_size: int = 16
    lr: float = 1e-3
    l2: float = 1.0
    ssim: float = 1.0
    msgms: float = 1.0
    flip: bool = True
    zoom: float = 0.1
    brightness: float = 0.1

    def __post_init__(self) -> None:
        weights = (self.l2, self.ssim, self.msgms)
        for name, holds, expected in (
            ("steps", self.steps >= 1, "be at least 1"),
            ("batch_size", self.batch_size >= 1, "be at least 1"),
            ("lr", self.lr > 0, "be above 0"),
            (
                "l2",
                min(weights) >= 0 < max(weights),
                "be at least 0, like ssim and msgms, not all 0",
            ),
            ("zoom", 0 <= self.zoom < 1, "be in [0, 1)"),
            ("brightness", 0 <= self.brightness < 1, "be in [0, 1)"),
        ):
            if not holds:
                message = f"EAR: {name} must {expected}, got {getattr(self, name)!r}"
                raise ValueError(message)


@dataclass(frozen=True, eq=False)
class RebuiltImage:
    """One image as it was cut, rebuilt and judged, at the size of the model's input."""

    name: str
    shape: tuple[int, int]  # height and width in pixels before it was resized
    pixels: Tensor  # (3, H, W) float32 in [0, 1]
    mask: Tensor  # (H, W) bool, True was cut out
    shown: Tensor  # (3, H, W) what the network saw
    rebuilt: Tensor  # (3, H, W) what it made of that
    plain_map: Tensor  # (H, W) smoothed residual, relative to normal ones where the model has them
    masked_map: Tensor  # (H, W) the same of what was cut out; the rest counts as 0
    plain_score: float  # highest of plain_map
    masked_score: float  # highest of masked_map


def gradient_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Compare the magnitudes of gradients of the mean of the channels, (B, H, W) in (0, 1].

    Args:
        a: (B, C, H, W) in [0, 1].
        b: The same shape.

    Source: Xue et al., Gradient magnitude similarity deviation, 2014, arXiv:1308.3052.
    """
    first, second = (_gradient_magnitude(x) for x in (a, b))
    same = 2 * first * second + _GMS_CONSTANT
    return same / (first.square() + second.square() + _GMS_CONSTANT)


def _gradient_magnitude(x: Tensor) -> Tensor:
    grey = functional.pad(x.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    prewitt = x.new_tensor([1.0, 0.0, -1.0]).expand(3, 3) / 3
    kernels = torch.stack([prewitt, prewitt.mT])[:, None]  # [2, 1, 3, 3]
    # The root has no gradient at 0.
    return (functional.conv2d(grey, kernels).square().sum(dim=1) + 1e-12).sqrt()


def gradient_scales(a: Tensor, b: Tensor) -> list[Tensor]:
    """Return the similarities of gradient magnitudes, (B, h, w) each, on up to four scales.

    Each scale halves the sides, by means, as long as they are at least 8.

    Source: Zavrtanik et al., Reconstruction by inpainting (RIAD), Pattern Recognition 2021.
    """
    found = [gradient_similarity(a, b)]
    while len(found) < _SCALES and min(a.shape[2:]) >= 8:
        a, b = (functional.avg_pool2d(x, 2) for x in (a, b))
        found.append(gradient_similarity(a, b))
    return found


def residual_maps(images: Tensor, rebuilt: Tensor, kind: ResidualName) -> Tensor:
    """Say pixel by pixel how far rebuilt images are from the images.

    Args:
        images: (B, C, H, W) in [0, 1].
        rebuilt: The same shape.
        kind: "absolute", the mean of the channels' absolute differences; "msgms", the mean over
            scales of 1 less the similarity of gradient magnitudes, brought to the finest scale.

    Returns:
        (B, H, W) in [0, 1].

    Raises:
        ValueError: If ``kind`` is another.
    """
    check_choice("EAR", "residual", kind, RESIDUALS)
    if kind == "absolute":
        return (images - rebuilt).abs().mean(dim=1)
    size = images.shape[2:]
    maps = [
        functional.interpolate(s[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        for s in gradient_scales(images, rebuilt)
    ]
    return 1 - torch.stack(maps).mean(dim=0)


@dataclass(frozen=True, eq=False)
class NormalResiduals:
    """What is left over of normal images, pixel by pixel.

    Structure that no network rebuilds, such as an edge that lies elsewhere in every image, leaves
    more than a defect does where all images are alike.

    Attributes:
        mean: (H, W) float32, of residuals.
        spread: (H, W) float32, their standard deviation.
    """

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "NormalResiduals | None":
        """Take residuals (B, H, W) of normal images, batch by batch; None if there are under 16."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for residuals in batches:
            doubles = residuals.double()
            count += len(doubles)
            total, squares = total + doubles.sum(dim=0), squares + doubles.square().sum(dim=0)
        if count < _FEWEST:
            return None
        mean = total / count
        variance = (squares - count * mean.square()) / (count - 1)
        return cls(mean.float(), variance.clamp_min(0).sqrt().float())

    def __call__(self, residuals: Tensor) -> Tensor:
        """Say how many spreads residuals (B, H, W) are above the mean; below it, negative."""
        return (residuals - self.mean) / (self.spread + _LEAST_SPREAD)


def smooth(maps: Tensor, window: int) -> Tensor:
    """Take the mean of maps (B, H, W) over squares of an odd side, cut off at the borders."""
    return functional.avg_pool2d(
        maps[:, None], window, stride=1, padding=window // 2, count_include_pad=False
    )[:, 0]


def rebuild_loss(images: Tensor, rebuilt: Tensor, options: RebuildOptions) -> Tensor:
    """Compute the weighted sum of the three losses over whole images (B, C, H, W).

    Raises:
        ImportError: If ``options.ssim`` is above 0 and kornia is not installed.
    """
    loss: Tensor = options.l2 * functional.mse_loss(rebuilt, images)
    if options.ssim:
        metrics = require("kornia.metrics", extra="train", op="EAR.fit")
        loss = loss + options.ssim * (1 - metrics.ssim(images, rebuilt, 11).mean())
    if options.msgms:
        scales = gradient_scales(images, rebuilt)
        loss = loss + options.msgms * sum(1 - s.mean() for s in scales) / len(scales)
    return loss


def augment(images: Tensor, options: RebuildOptions, generator: torch.Generator) -> Tensor:
    """Draw a mirror image, a crop and a brightness, one for the batch each, so that masks move.

    Args:
        images: (B, C, H, W) in [0, 1].
        options: Their ranges.
        generator: Of the draws.

    Returns:
        The same shape, in [0, 1].
    """
    height, width = images.shape[2:]
    draws = torch.rand(6, generator=generator).tolist()
    if options.flip:
        images = images.flip([axis for axis, draw in ((2, draws[0]), (3, draws[1])) if draw < 0.5])
    share = 1 - options.zoom * draws[2]
    h, w = max(1, round(share * height)), max(1, round(share * width))
    if (h, w) != (height, width):
        top, left = int(draws[3] * (height - h + 1)), int(draws[4] * (width - w + 1))
        part = images[:, :, top : top + h, left : left + w]
        images = functional.interpolate(
            part, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
    factor: float = 1 + options.brightness * (2 * draws[5] - 1)
    return (images * factor).clamp(0, 1)


def train_to_rebuild(
    network: nn.Module,
    images: Tensor,
    shown: Callable[[Tensor, torch.Generator], Tensor],
    options: RebuildOptions,
    *,
    seed: int,
    after_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Train a network to rebuild images from what it is shown of them.

    Args:
        network: (B, 3, H, W) to the same; it is left in evaluation mode.
        images: (N, 3, H, W) of any float dtype, in [0, 1], on the CPU.
        shown: Of augmented images (B, 3, H, W), what the network sees; with the generator of all
            draws.
        options: How it learns.
        seed: Of the order of images and of all draws.
        after_step: Called after each step.

    Returns:
        The losses of all steps.

    Raises:
        ValueError: If a loss is NaN or infinite.
        ImportError: If the SSIM is asked for and kornia is not installed.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    losses: list[float] = []
    left = torch.empty(0, dtype=torch.int64)
    network.train()
    for step in range(options.steps):
        if not len(left):
            left = torch.randperm(len(images), generator=generator)
        batch, left = left[: options.batch_size], left[options.batch_size :]
        whole = augment(images[batch].float(), options, generator).to(device)
        optimiser.zero_grad()
        loss = rebuild_loss(whole, network(shown(whole, generator)), options)
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss.detach()):
            message = f"EAR.fit: loss must be finite, got {losses[-1]} in step {step + 1}"
            raise ValueError(message)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        after_step()
    network.eval()
    return losses
