"""Helpers shared by the tests of backbones."""

import torch
from torch import Tensor

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise_imagenet(images: Tensor) -> Tensor:
    return (images - IMAGENET_MEAN) / IMAGENET_STD


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
