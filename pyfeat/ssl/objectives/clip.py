"""CLIP: an image and its caption are closer than to all others of the batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from pyfeat.losses import CLIPLoss
from pyfeat.ssl.networks.text import TextEncoder, TextOptions
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import CropOptions, ViewObjective, augmentation, samples_of
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, Range
from pyfeat.ssl.parts import Views
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class CLIPOptions(CropOptions):
    """Options of ``CLIP``; views are crops alone unless more is asked for."""

    min_scale: Annotated[
        float, "Least share of a sample that a view shows.", Range(above=0, high=1)
    ] = 0.5
    flip: Annotated[float, "Probability of a horizontal flip.", FRACTION] = 0.0
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 128
    logit_scale: Annotated[
        float, "Of similarities at first; it is learned, up to 100.", Range(above=0, high=100)
    ] = 1 / 0.07
    duplicates: Annotated[
        Literal["positive", "negative"], "What images with the very same caption are to each other."
    ] = "positive"
    text_width: Annotated[int, "Features of a token of text.", AT_LEAST_ONE] = 128
    text_depth: Annotated[int, "Blocks of the text encoder.", AT_LEAST_ONE] = 3
    text_heads: Annotated[int, "Heads of the text encoder.", AT_LEAST_ONE] = 4
    text_length: Annotated[int, "Longest caption in bytes; the rest is cut off.", Range(low=3)] = 96


@OBJECTIVES.register("clip", CLIPOptions)
class CLIP(ViewObjective):
    """Symmetric cross-entropy of images and captions over all processes, with a learned scale.

    Args:
        backbone: As in ``Objective``.
        options: As ``CLIPOptions``.
        plan: As in ``Objective``.

    Attributes:
        text: Captions to features; its byte-wise reading needs no vocabulary.
        image_projection: Linear, without a bias.
        text_projection: Likewise.
        loss: Holds the logarithm of the scale.

    Source: Radford et al., Learning transferable visual models from natural language supervision,
    ICML 2021, arXiv:2103.00020.
    """

    def __init__(self, backbone: nn.Module, options: CLIPOptions, plan: Plan) -> None:
        crop = augmentation(options, plan, flip=options.flip)
        super().__init__(backbone, options, plan, Views([crop]))
        self.text = TextEncoder(
            TextOptions(
                width=options.text_width,
                depth=options.text_depth,
                heads=options.text_heads,
                length=options.text_length,
            )
        )
        self.image_projection = nn.Linear(self.backbone.feature_dim, options.out_dim, bias=False)
        self.text_projection = nn.Linear(self.text.feature_dim, options.out_dim, bias=False)
        for layer in (self.image_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.loss = CLIPLoss(options.logit_scale, normalize=True)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch of images and captions, ``texts`` of B strings.

        Raises:
            ValueError: If the batch has no captions.
        """
        if "texts" not in batch:
            message = "CLIP: data must have captions, got none"
            raise ValueError(message)
        texts: Sequence[str] = batch["texts"]
        (view,) = self.augment(samples_of(batch))
        arguments = {}
        if self.options.duplicates == "positive":
            ids = caption_ids(texts).to(view.device)
            arguments = {"image_ids": ids, "text_ids": ids}
        images, captions = self.encode_images(view), self.encode_texts(texts)
        loss = self.loss(images, captions, group=self.group, **arguments)
        return {"loss": loss, "logit_scale": self.loss.scale.detach()}

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the features (B, D) that are compared with those of captions, not normalised."""
        features: Tensor = self.image_projection(self.backbone(images))
        return features

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the features (B, D) that are compared with those of images, not normalised."""
        features: Tensor = self.text_projection(self.text(self.text.tokens(texts)))
        return features


def caption_ids(texts: Sequence[str]) -> Tensor:
    """Return a number for each caption, equal for equal ones, also in other processes.

    Returns:
        (B,) int64 on the CPU.
    """
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in digests]).long()
