"""DreamLIP: each sentence of a long caption is a positive of the image, and of its own patches."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses import CLIPLoss
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.clip import CLIP, CLIPOptions
from pyfeat.ssl.objectives.views import samples_of
from pyfeat.ssl.options import AT_LEAST_ONE, NOT_NEGATIVE
from pyfeat.ssl.parts import (
    caption_ids,
    caption_pool,
    draw_captions,
    grouped_patches,
    grouping_weights,
)
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class DreamLIPOptions(CLIPOptions):
    """Options of ``DreamLIP``; the first caption of an image is its own, others are split."""

    sub_captions: Annotated[
        int, "Sentences drawn beside the first caption of an image.", NOT_NEGATIVE
    ] = 5
    merge: Annotated[int, "Sentences in a row that are joined to one text.", AT_LEAST_ONE] = 1
    contrast_weight: Annotated[float, "Of the loss of images and texts.", NOT_NEGATIVE] = 1.0
    grouping_weight: Annotated[float, "Of the loss of grouped patches.", NOT_NEGATIVE] = 1.0
    grouping: Annotated[
        Literal["batch", "instance"],
        "What a group of patches is told from: all texts of the batch (the released code), or the "
        "others of its image (the paper's formula).",
    ] = "batch"
    pooling: Annotated[
        Literal["minmax", "softmax"], "What makes weights of the cosines of a text to patches."
    ] = "minmax"
    threshold: Annotated[
        float | None, "Weights below it are 0; null: 1 / patches.", NOT_NEGATIVE
    ] = 0.1
    detach_weights: Annotated[bool, "Let no gradient flow through the weights."] = False


@OBJECTIVES.register("dreamlip", DreamLIPOptions)
class DreamLIP(CLIP):
    """CLIP for each of several texts of an image, and a loss of each text and its patches.

    Texts are the first caption and sentences of the others (``data.captions: all``). In the j-th of
    the losses of CLIP, whose mean is taken, the j-th texts of images compete: those of one image
    never do. Patches are pooled by their likeness to a text, in the space of both, and the pooled
    finds its text.

    Args:
        backbone: Has ``features_and_patches``, as ``ResNet`` and ``ViT``.
        options: As ``DreamLIPOptions``.
        plan: As in ``Objective``.

    Attributes:
        grouping_loss: Holds the logarithm of the scale of grouped patches.

    Raises:
        TypeError: If the backbone has no ``features_and_patches``.
        ValueError: If patches are not of the width of features.

    Source: Zheng et al., DreamLIP: Language-image pre-training with long captions, ECCV 2024,
    arXiv:2403.17007.
    """

    options: DreamLIPOptions

    def __init__(self, backbone: nn.Module, options: DreamLIPOptions, plan: Plan) -> None:
        if not hasattr(backbone, "features_and_patches"):
            kind = type(backbone).__name__
            message = f"DreamLIP: backbone must have features_and_patches, got {kind} without"
            raise TypeError(message)
        super().__init__(backbone, options, plan)
        width = self.backbone.map_dims[-1]
        if width != self.backbone.feature_dim:
            message = (
                f"DreamLIP: features must be as wide as patches, {width}, got "
                f"{self.backbone.feature_dim}"
            )
            raise ValueError(message)
        self.grouping_loss = CLIPLoss(options.logit_scale, normalize=True)
        # Processes would wait for the gradient of what is not used.
        self.grouping_loss.requires_grad_(options.grouping_weight > 0)

    def check_data(self, batch: Batch) -> None:
        """Raise ValueError unless each image has a list of captions."""
        given = batch.get("texts")
        if given is None or not all(isinstance(texts, list) and texts for texts in given):
            got = "none" if given is None else "one; data.captions: all gives all of them"
            message = f"DreamLIP: data must have a list of captions for each image, got {got}"
            raise ValueError(message)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of images and captions, ``texts`` a list of B lists of strings.

        Raises:
            ValueError: As ``check_data``.
        """
        self.check_data(batch)
        options = self.options
        drawn = [
            draw_captions(captions, options.sub_captions, merge=options.merge)
            for captions in batch["texts"]
        ]
        (view,) = self.augment(samples_of(batch))
        features, patches = self.backbone.features_and_patches(view)
        images = self.image_projection(features)
        count = 1 + options.sub_captions  # K
        texts = self.encode_texts([text for row in drawn for text in row])
        texts = texts.view(len(drawn), count, -1)  # [B, K, D]
        contrast = self._contrast(images, texts, drawn)
        losses = {"loss": options.contrast_weight * contrast, "contrast": contrast}
        if options.grouping_weight:
            grouping = self._grouping(self.image_projection(patches), texts, drawn)
            losses["loss"] = losses["loss"] + options.grouping_weight * grouping
            losses["grouping"] = grouping
        return {**losses, "logit_scale": self.loss.scale.detach()}

    def encode_patches(self, images: Tensor) -> Tensor:
        """Return the features (B, P, D) of patches that are compared with those of texts."""
        features: Tensor = self.image_projection(self.backbone.features_and_patches(images)[1])
        return features

    def embed_pairs(self, batch: Batch) -> tuple[Tensor, list[list[str]]] | None:
        """Return features (B, D) of images, and their first captions and all sentences."""
        texts = [[captions[0], *caption_pool(captions)] for captions in batch["texts"]]
        return self.encode_images(samples_of(batch)), texts

    def _contrast(self, images: Tensor, texts: Tensor, drawn: list[list[str]]) -> Tensor:
        losses = [
            self.contrast(self.loss, images, each, [row[j] for row in drawn])
            for j, each in enumerate(texts.unbind(1))
        ]
        return torch.stack(losses).mean()

    def _grouping(self, patches: Tensor, texts: Tensor, drawn: list[list[str]]) -> Tensor:
        options, flat = self.options, [text for row in drawn for text in row]
        with without_autocast(texts):
            patches, texts = patches.float(), texts.float()
            weights = grouping_weights(
                patches, texts, pooling=options.pooling, threshold=options.threshold
            )
            weights = weights.detach() if options.detach_weights else weights
            groups = grouped_patches(patches, weights)  # [B, K, D]
            if options.grouping == "batch":
                loss = self.grouping_loss
                return self.contrast(loss, groups.flatten(0, 1), texts.flatten(0, 1), flat)
            ids = caption_ids(flat).view(texts.shape[:2]).to(texts.device)
            return _within_images(groups, texts, ids, self.grouping_loss.scale)


def _within_images(groups: Tensor, texts: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """Each group (B, K, D) among the texts of its own image, and the other way round.

    K x K for each image is less than its features: there are no pairs to be spared. A text drawn
    twice is no negative of itself.
    """
    rows, columns = (functional.normalize(x, dim=2) for x in (groups, texts))
    logits = scale * rows @ columns.mT  # [B, K, K]
    count = logits.shape[1]
    places = torch.arange(count, device=logits.device)
    again = (ids[:, :, None] == ids[:, None]) & (places[:, None] != places)
    logits = logits.masked_fill(again, -torch.inf)
    targets = places.expand(len(logits), -1)
    forward = functional.cross_entropy(logits.mT, targets)  # classes along dim 1
    backward = functional.cross_entropy(logits, targets)
    return (forward + backward) / 2
