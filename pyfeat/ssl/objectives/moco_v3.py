"""MoCo v3: a prediction of each view finds the key that a slow teacher gives to the other view."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from pyfeat.losses import InfoNCELoss
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import (
    ViewObjective,
    ViewOptions,
    augmentation,
    samples_of,
)
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, POSITIVE
from pyfeat.ssl.parts import MLP, Schedule, Teacher, Views
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class MoCoV3Options(ViewOptions):
    """Options of ``MoCoV3``."""

    temperature: Annotated[float, "Of the similarities.", POSITIVE] = 0.2
    hidden_dim: Annotated[int, "Hidden features of both heads.", AT_LEAST_ONE] = 512
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 128
    head_layers: Annotated[int, "Linear layers of the projection.", AT_LEAST_ONE] = 2
    momentum: Annotated[float, "Of the teacher, rising to 1 along a cosine.", FRACTION] = 0.99


@OBJECTIVES.register("moco_v3", MoCoV3Options)
class MoCoV3(ViewObjective):
    """``2 t (InfoNCE(q1, k2) + InfoNCE(q2, k1))``, keys of all processes, none from a queue.

    The second view is blurred less and may be solarised, as with BYOL. A vision transformer is
    stable with ``network.freeze_patches``.

    Args:
        backbone: As in ``Objective``.
        options: As ``MoCoV3Options``.
        plan: As in ``Objective``.

    Attributes:
        head: Projection of the student.
        predictor: Prediction, which the teacher has not.
        teacher: Backbone and projection, a running mean.

    Source: Chen et al., An empirical study of training self-supervised vision transformers, ICCV
    2021, arXiv:2104.02057.
    """

    def __init__(self, backbone: nn.Module, options: MoCoV3Options, plan: Plan) -> None:
        first = augmentation(options, plan)
        second = augmentation(options, plan, blur=options.blur / 5, solarize=0.2)
        super().__init__(backbone, options, plan, Views([first, second]))
        hidden, out = options.hidden_dim, options.out_dim
        layers = (hidden,) * (options.head_layers - 1)
        self.head = MLP((self.backbone.feature_dim, *layers, out), last_norm=True)
        self.predictor = MLP((out, hidden, out), last_norm=True)
        self.teacher = Teacher(self._student())
        self.momentum = Schedule(options.momentum, 1.0, total=plan.total_steps)
        self.loss = InfoNCELoss(options.temperature, normalize=True)

    def _student(self) -> nn.Module:
        return nn.Sequential(self.backbone, self.head)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of two views of a batch, each predicting the other."""
        views = self.augment(samples_of(batch))
        student = nn.Sequential(self.backbone, self.head, self.predictor)
        q1, q2 = (student(view) for view in views)
        k1, k2 = (self.teacher(view) for view in views)
        losses = [self.loss(q, k, group=self.group) for q, k in ((q1, k2), (q2, k1))]
        return {"loss": 2.0 * self.options.temperature * (losses[0] + losses[1])}

    def after_step(self) -> None:
        """Let the teacher follow."""
        self.teacher.update(self._student(), self.momentum(max(0, self.steps_done - 1)))
