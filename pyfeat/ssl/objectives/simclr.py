"""SimCLR: two views of a sample are closer to each other than to all other views."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from pyfeat.losses import NTXentLoss
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
class SimCLROptions(ViewOptions):
    """Options of ``SimCLR``."""

    temperature: Annotated[float, "Of the similarities.", POSITIVE] = 0.2
    hidden_dim: Annotated[int, "Hidden features of the projection.", AT_LEAST_ONE] = 512
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 128
    head_layers: Annotated[int, "Linear layers of the projection.", AT_LEAST_ONE] = 2


@OBJECTIVES.register("simclr", SimCLROptions)
class SimCLR(ViewObjective):
    """Cross-entropy of each view to its partner among all views of all processes.

    Args:
        backbone: As in ``Objective``.
        options: As ``SimCLROptions``.
        plan: As in ``Objective``.

    Attributes:
        head: The projection, which is left behind after training.

    Source: Chen et al., A simple framework for contrastive learning of visual representations, ICML
    2020, arXiv:2002.05709; deeper projections: SimCLR v2, arXiv:2006.10029.
    """

    def __init__(self, backbone: nn.Module, options: SimCLROptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan, Views([augmentation(options, plan)], [2]))
        hidden = (options.hidden_dim,) * (options.head_layers - 1)
        self.head = MLP((self.backbone.feature_dim, *hidden, options.out_dim), last_norm=True)
        self.loss = NTXentLoss(options.temperature, normalize=True)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of two views of a batch."""
        views = self.augment(samples_of(batch))
        z1, z2 = encode(nn.Sequential(self.backbone, self.head), views)
        return {"loss": self.loss(z1, z2, group=self.group)}
