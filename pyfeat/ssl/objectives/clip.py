"""CLIP: an image and its caption are closer than to all others of the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from pyfeat.losses import CLIPLoss, InfoNCELoss
from pyfeat.ssl.networks.pretrained_text import PretrainedText
from pyfeat.ssl.networks.text import TextEncoder, TextOptions
from pyfeat.ssl.networks.vit import Activation
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import CropOptions, ViewObjective, augmentation, samples_of
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, Range
from pyfeat.ssl.parts import Views, caption_ids
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
        Literal["positive", "ignore"],
        "What images with the very same caption are to each other: equally right, or left out.",
    ] = "positive"
    text_width: Annotated[int, "Features of a token of text.", AT_LEAST_ONE] = 128
    text_depth: Annotated[int, "Blocks of the text encoder.", AT_LEAST_ONE] = 3
    text_heads: Annotated[int, "Heads of the text encoder.", AT_LEAST_ONE] = 4
    text_length: Annotated[
        int, "Longest caption in bytes, of text_model in tokens; the rest is cut off.", Range(low=3)
    ] = 96
    text_activation: Annotated[
        Activation, "In a block of the text encoder; the published one has quick_gelu."
    ] = "gelu"
    text_model: Annotated[
        str | None, "Folder or name of a transformers model in place of the text encoder."
    ] = None
    train_text: Annotated[bool, "Let the weights of text_model learn; else projections alone."] = (
        False
    )


@OBJECTIVES.register("clip", CLIPOptions)
class CLIP(ViewObjective):
    """Symmetric cross-entropy of images and captions over all processes, with a learned scale.

    The published networks are those with ``pre_norm`` and ``quick_gelu``.

    Args:
        backbone: As in ``Objective``.
        options: As ``CLIPOptions``.
        plan: As in ``Objective``.

    Attributes:
        text: Captions to features: byte-wise, which needs no vocabulary, or ``PretrainedText``.
        image_projection: Linear, without a bias.
        text_projection: Likewise.
        loss: Holds the logarithm of the scale.

    Source: Radford et al., Learning transferable visual models from natural language supervision,
    ICML 2021, arXiv:2103.00020.
    """

    def __init__(self, backbone: nn.Module, options: CLIPOptions, plan: Plan) -> None:
        crop = augmentation(options, plan, flip=options.flip)
        super().__init__(backbone, options, plan, Views([crop]))
        self.text = _text_encoder(options)
        self.image_projection = nn.Linear(self.backbone.feature_dim, options.out_dim, bias=False)
        self.text_projection = nn.Linear(self.text.feature_dim, options.out_dim, bias=False)
        for layer in (self.image_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.loss = CLIPLoss(options.logit_scale, normalize=True)
        self._without_equal = InfoNCELoss(symmetric=True, normalize=True)

    def check_data(self, batch: Batch) -> None:
        """Raise ValueError unless each image has one caption."""
        given = batch.get("texts")
        if given is None or not all(isinstance(text, str) for text in given):
            got = "none" if given is None else "a list; data.captions: one draws one of them"
            message = f"CLIP: data must have one caption for each image, got {got}"
            raise ValueError(message)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch of images and captions, ``texts`` of B strings.

        Raises:
            ValueError: As ``check_data``.
        """
        self.check_data(batch)
        texts: Sequence[str] = batch["texts"]
        (view,) = self.augment(samples_of(batch))
        images, captions = self.encode_images(view), self.encode_texts(texts)
        loss = self.contrast(self.loss, images, captions, texts)
        return {"loss": loss, "logit_scale": self.loss.scale.detach()}

    def contrast(
        self, loss: CLIPLoss, images: Tensor, captions: Tensor, texts: Sequence[str]
    ) -> Tensor:
        """Compute the loss of features (N, D) of images and of their captions, equal ones by option.

        Args:
            loss: Its scale is used.
            images: Features of images, or of what stands for them.
            captions: Of the texts, one for each image.
            texts: N.
        """
        value: Tensor
        if self.options.duplicates == "positive":
            # Equal texts have equal features: targets spread evenly over them give the same value.
            value = loss(images, captions, group=self.group)
            return value
        ids = caption_ids(texts).to(captions.device)
        value = self._without_equal(
            images,
            captions,
            temperature=1.0 / loss.scale,
            query_ids=ids,
            key_ids=ids,
            group=self.group,
        )
        return value

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the features (B, D) that are compared with those of captions, not normalised."""
        features: Tensor = self.image_projection(self.backbone(images))
        return features

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the features (B, D) that are compared with those of images, not normalised."""
        features: Tensor = self.text_projection(self.text.encode(texts))
        return features

    def embed_pairs(self, batch: Batch) -> tuple[Tensor, list[list[str]]] | None:
        """Return features (B, D) of images, and their captions."""
        return self.encode_images(samples_of(batch)), [[text] for text in batch["texts"]]


def _text_encoder(options: CLIPOptions) -> Any:
    if options.text_model is not None:
        return PretrainedText(
            options.text_model, length=options.text_length, trained=options.train_text
        )
    return TextEncoder(
        TextOptions(
            width=options.text_width,
            depth=options.text_depth,
            heads=options.text_heads,
            length=options.text_length,
            activation=options.text_activation,
        )
    )
