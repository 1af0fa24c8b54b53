"""Random views of images and volumes: kornia's augmentations, a batch at a time on its device.

Every sample of a batch is drawn for itself, from torch's global generators.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._checks import check_count
from pyfeat._extras import require


def _kornia(op: str) -> Any:
    return require("kornia.augmentation", extra="train", op=op)


class Augmentation(nn.Module):
    """One random view of each image: crop, flips, colours, grey, blur, solarisation.

    What changes hue or saturation is left out for images of other than three channels.

    Args:
        size: Pixels (height, width) of a view.
        scale: Least and largest share of an image's area that a crop has.
        ratio: Least and largest width / height of a crop.
        flip: Probability of a horizontal flip.
        vertical_flip: Probability of a vertical one, for images without an up.
        jitter: Strengths of changes of brightness, contrast, saturation and hue; 0 for none.
        jitter_probability: Of changes of colour.
        grey: Probability of a view without colours.
        blur: Probability of a Gaussian blur of 0.1 to 2 pixels.
        solarize: Probability that bright pixels are inverted.

    Raises:
        ImportError: If kornia is not installed.

    Source: Chen et al., SimCLR, ICML 2020, arXiv:2002.05709; solarisation: Grill et al., BYOL,
    NeurIPS 2020, arXiv:2006.07733.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        blur: float = 0.5,
        solarize: float = 0.0,
    ) -> None:
        super().__init__()
        k = _kornia("Augmentation")
        shape = [k.RandomResizedCrop(size, scale=scale, ratio=ratio)]
        shape += [k.RandomHorizontalFlip(p=flip)] if flip else []
        shape += [k.RandomVerticalFlip(p=vertical_flip)] if vertical_flip else []
        self.shape = nn.ModuleList(shape)

        brightness, contrast, saturation, hue = jitter
        p = jitter_probability
        light: list[nn.Module] = []
        if brightness:
            light.append(k.RandomBrightness((max(0.0, 1 - brightness), 1 + brightness), p=p))
        if contrast:
            light.append(k.RandomContrast((max(0.0, 1 - contrast), 1 + contrast), p=p))
        colour = light
        if saturation or hue:  # all four in random order, through another space of colours
            colour = [k.ColorJitter(brightness, contrast, saturation, hue, p=p)]
        colour = colour + ([k.RandomGrayscale(p=grey)] if grey else [])
        self.light, self.colour = nn.ModuleList(light), nn.ModuleList(colour)

        side = max(3, min(size) // 10 // 2 * 2 + 1)
        last = [k.RandomGaussianBlur((side, side), (0.1, 2.0), p=blur)] if blur else []
        last += [k.RandomSolarize(p=solarize)] if solarize else []
        self.last = nn.ModuleList(last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] to (B, C, *size), in [0, 1]."""
        if images.ndim != 4 or 0 in images.shape[1:]:
            got = tuple(images.shape)
            message = f"Augmentation: images must have shape (B, C, H, W), none 0, got {got}"
            raise ValueError(message)
        colour = self.colour if images.shape[1] == 3 else self.light
        for step in (*self.shape, *colour, *self.last):
            images = step(images)
        return images.clamp(0.0, 1.0)


class VolumeAugmentation(nn.Module):
    """One random view of each volume: turn, zoom, shift, flips, then changes of intensities.

    Every sample is drawn for itself, and every change has its own strength; at 0 it is left out.

    Args:
        degrees: Largest turn about each axis.
        scale: Least and largest zoom.
        shift: Largest shift along each axis, as a share of its length.
        flip: Probability of a flip, of each axis.
        depth_flip: That of the first axis, along which slices lie; None: ``flip``.
        bias: Strength of a smooth factor, ``exp(bias f)`` with f of variance 1 at 3 x 3 x 3 places
            and linear between, as an uneven receiver leaves.
        gamma: Largest size of the logarithm of the power that intensities, clamped to [0, 1], are
            raised to.
        jitter: Strengths of changes of brightness and contrast.
        blur: Probability of a Gaussian blur of 0.1 to 2 cells within slices.
        noise: Largest standard deviation of added noise.

    Raises:
        ImportError: If kornia is not installed.
    """

    def __init__(
        self,
        *,
        degrees: float = 15.0,
        scale: tuple[float, float] = (0.9, 1.4),
        shift: float = 0.1,
        flip: float = 0.5,
        depth_flip: float | None = None,
        bias: float = 0.0,
        gamma: float = 0.0,
        jitter: tuple[float, float] = (0.3, 0.3),
        blur: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        k = _kornia("VolumeAugmentation")
        steps = [
            k.RandomAffine3D(degrees, translate=(shift,) * 3, scale=scale, shears=None, p=1.0),
        ]
        depth_flip = flip if depth_flip is None else depth_flip
        steps += [k.RandomHorizontalFlip3D(p=flip), k.RandomVerticalFlip3D(p=flip)] if flip else []
        steps += [k.RandomDepthicalFlip3D(p=depth_flip)] if depth_flip else []
        self.steps = nn.ModuleList(steps)
        self.blur = k.RandomGaussianBlur((5, 5), (0.1, 2.0), p=blur) if blur else nn.Identity()
        self.bias, self.gamma, self.jitter, self.noise = bias, gamma, jitter, noise

    @torch.no_grad()
    def forward(self, volumes: Tensor) -> Tensor:
        """(B, C, D, H, W) float to the same; what comes in from outside is 0."""
        if volumes.ndim != 5 or 0 in volumes.shape[1:]:
            got = tuple(volumes.shape)
            message = f"VolumeAugmentation: volumes must have shape (B, C, D, H, W), got {got}"
            raise ValueError(message)
        for step in self.steps:
            volumes = step(volumes)
        if self.bias:
            places = torch.randn_like(volumes[:, :1, :1, :1, :1].expand(-1, -1, 3, 3, 3))
            field = functional.interpolate(
                places, volumes.shape[2:], mode="trilinear", align_corners=True
            )
            volumes = volumes * (self.bias * field).exp()
        if self.gamma:
            volumes = volumes.clamp(0.0, 1.0) ** (self.gamma * _signed(volumes)).exp()
        brightness, contrast = (1.0 + strength * _signed(volumes) for strength in self.jitter)
        mean = volumes.mean(dim=(1, 2, 3, 4), keepdim=True)
        volumes = (mean + contrast * (volumes - mean)) * brightness
        volumes = self.blur(volumes.flatten(1, 2)).view(volumes.shape)
        if self.noise:
            strength = self.noise * torch.rand_like(volumes[:, :1, :1, :1, :1])
            volumes = volumes + strength * torch.randn_like(volumes)
        return volumes


def _signed(volumes: Tensor) -> Tensor:
    """(B, 1, 1, 1, 1), one number of each sample, uniform in [-1, 1]."""
    return 2.0 * torch.rand_like(volumes[:, :1, :1, :1, :1]) - 1.0


class Views(nn.Module):
    """Several views of each sample of a batch.

    Args:
        augmentations: How each view is made; one may come more than once.
        counts: Views that each makes, 1 of each by default.

    Examples:
        >>> views = Views([nn.Identity(), nn.Flatten()], counts=[2, 1])
        >>> [tuple(view.shape) for view in views(torch.ones(5, 3, 8, 8))]
        [(5, 3, 8, 8), (5, 3, 8, 8), (5, 192)]
    """

    def __init__(self, augmentations: list[nn.Module], counts: list[int] | None = None) -> None:
        super().__init__()
        self.counts = [1] * len(augmentations) if counts is None else counts
        if len(self.counts) != len(augmentations):
            message = (
                f"Views: counts must be as many as augmentations, {len(augmentations)}, "
                f"got {len(self.counts)}"
            )
            raise ValueError(message)
        for i, count in enumerate(self.counts):
            check_count("Views", f"counts[{i}]", count)
        self.augmentations = nn.ModuleList(augmentations)

    def forward(self, samples: Tensor) -> list[Tensor]:
        """Make the views, those of the first augmentation first."""
        pairs = zip(self.augmentations, self.counts, strict=True)
        return [augment(samples) for augment, count in pairs for _ in range(count)]
