"""What objectives share that compare random views of the same samples."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pyfeat.ssl.objectives.base import Batch, Objective, Plan
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, Range
from pyfeat.ssl.parts.crops import Augmentation, Views, VolumeAugmentation

SHARE = Range(above=0, high=1)


@dataclass(frozen=True)
class ViewOptions:
    """How random views are made; of volumes only ``min_scale``, brightness and contrast count."""

    view_size: Annotated[
        int | None, "Side of a view in pixels; null takes the sides of a sample.", AT_LEAST_ONE
    ] = None
    min_scale: Annotated[float, "Least share of a sample that a view shows.", SHARE] = 0.2
    vertical_flip: Annotated[float, "Probability, for images without an up.", FRACTION] = 0.0
    brightness: Annotated[float, "Strength of its changes.", NOT_NEGATIVE] = 0.4
    contrast: Annotated[float, "Strength of its changes.", NOT_NEGATIVE] = 0.4
    saturation: Annotated[float, "Strength of its changes.", NOT_NEGATIVE] = 0.2
    hue: Annotated[float, "Strength of its changes.", Range(low=0, high=0.5)] = 0.1
    grey: Annotated[float, "Probability of a view without colours.", FRACTION] = 0.2
    blur: Annotated[float, "Probability of a blurred view.", FRACTION] = 0.5
    solarize: Annotated[float, "Probability of inverted bright pixels.", FRACTION] = 0.0


@dataclass(frozen=True)
class CropOptions(ViewOptions):
    """As ``ViewOptions``, for views whose colours stay unless changes are asked for."""

    brightness: Annotated[float, "Strength of its changes.", NOT_NEGATIVE] = 0.0
    contrast: Annotated[float, "Strength of its changes.", NOT_NEGATIVE] = 0.0
    saturation: Annotated[float, "Strength of its changes.", NOT_NEGATIVE] = 0.0
    hue: Annotated[float, "Strength of its changes.", Range(low=0, high=0.5)] = 0.0
    grey: Annotated[float, "Probability of a view without colours.", FRACTION] = 0.0
    blur: Annotated[float, "Probability of a blurred view.", FRACTION] = 0.0


def augmentation(
    options: ViewOptions,
    plan: Plan,
    *,
    size: int | None = None,
    scale: tuple[float, float] | None = None,
    **changes: Any,
) -> nn.Module:
    """Make the augmentation that options ask for.

    Args:
        options: Of the objective.
        plan: Of the run; its samples decide between images and volumes.
        size: Side of a view, in place of that of the options; volumes keep theirs.
        scale: Least and largest share of a sample, in place of that of the options.
        changes: Arguments of ``Augmentation`` in place of the options', such as ``blur``.

    Raises:
        ValueError: If neither the options nor the samples have a size.
    """
    shape = plan.sample_shape
    smallest, largest = (options.min_scale, 1.0) if scale is None else scale
    if len(shape) == 4:
        # A zoom by s shows the s-th part along each axis.
        zoom = (largest ** (-1 / 3), smallest ** (-1 / 3))
        return VolumeAugmentation(scale=zoom, jitter=(options.brightness, options.contrast))
    side = options.view_size if size is None else size
    if side is None and len(shape) != 3:
        message = "view_size must be given where samples have no size, got null"
        raise ValueError(message)
    sides = (side, side) if side is not None else (shape[1], shape[2])
    arguments: dict[str, Any] = {
        "vertical_flip": options.vertical_flip,
        "jitter": (options.brightness, options.contrast, options.saturation, options.hue),
        "grey": options.grey,
        "blur": options.blur,
        "solarize": options.solarize,
    }
    return Augmentation(sides, scale=(smallest, largest), **(arguments | changes))


def samples_of(batch: Batch) -> Tensor:
    """Return the volumes of a batch, or its images if there are none."""
    samples: Tensor = batch["volumes"] if "volumes" in batch else batch["images"]
    return samples


class ViewObjective(Objective):
    """An objective that makes random views of images or volumes.

    Args:
        backbone: As in ``Objective``.
        options: As in ``Objective``.
        plan: As in ``Objective``.
        views: Makes the views of a batch.

    Attributes:
        augment: The same.
    """

    def __init__(self, backbone: nn.Module, options: Any, plan: Plan, views: Views) -> None:
        super().__init__(backbone, options, plan)
        self.augment = views

    def embed(self, batch: Batch) -> Tensor:
        """Return the features (B, D) that probes look at."""
        features: Tensor = self.get_submodule(self.handed_over)(samples_of(batch))
        return features

    def two_views(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return such features of two views, of the first augmentation."""
        augment, samples = self.augment.augmentations[0], samples_of(batch)
        network = self.get_submodule(self.handed_over)
        return network(augment(samples)), network(augment(samples))


def encode(network: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """Pass views through a network, those of one size together.

    A batch normalisation takes the statistics of views of one size, as with SwAV and DINO.

    Args:
        network: Views to features (B, D).
        views: Each (B, ...), those of one size side by side.

    Returns:
        The features of each view.
    """
    features: list[Tensor] = []
    start = 0
    for i in range(1, len(views) + 1):
        if i == len(views) or views[i].shape != views[start].shape:
            together = network(torch.cat(views[start:i]))
            features += together.chunk(i - start)
            start = i
    return features
