"""SupCon: views of samples with the same label are close, all others far."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from pyfeat.losses import SupConLoss
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import (
    ViewObjective,
    ViewOptions,
    augmentation,
    encode,
    samples_of,
)
from pyfeat.ssl.options import AT_LEAST_ONE, POSITIVE
from pyfeat.ssl.parts import MLP, Views
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class SupConOptions(ViewOptions):
    """Options of ``SupCon``."""

    temperature: Annotated[float, "Of the similarities.", POSITIVE] = 0.1
    average: Annotated[
        Literal["out", "in"], "Where positives are averaged: out of the logarithm, or in it."
    ] = "out"
    hidden_dim: Annotated[int, "Hidden features of the projection.", AT_LEAST_ONE] = 512
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 128


@OBJECTIVES.register("supcon", SupConOptions)
class SupCon(ViewObjective):
    """The supervised contrastive loss of two views, over all processes.

    A sample whose label is -1 has none: its two views are positives of each other alone, as in
    SimCLR.

    Args:
        backbone: As in ``Objective``.
        options: As ``SupConOptions``.
        plan: As in ``Objective``.

    Attributes:
        head: The projection, which is left behind after training.

    Source: Khosla et al., Supervised contrastive learning, NeurIPS 2020, arXiv:2004.11362.
    """

    def __init__(self, backbone: nn.Module, options: SupConOptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan, Views([augmentation(options, plan)], [2]))
        self.head = MLP((self.backbone.feature_dim, options.hidden_dim, options.out_dim))
        self.loss = SupConLoss(options.temperature, average=options.average, normalize=True)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of two views of a batch.

        Raises:
            ValueError: If the data has no labels.
        """
        if "labels" not in batch:
            message = "SupCon: data must have labels, got none"
            raise ValueError(message)
        labels: Tensor = batch["labels"]
        labels = torch.where(labels < 0, -1 - batch["index"], labels)
        views = self.augment(samples_of(batch))
        features = torch.cat(encode(nn.Sequential(self.backbone, self.head), views))
        return {"loss": self.loss(features, labels.repeat(2), group=self.group)}
