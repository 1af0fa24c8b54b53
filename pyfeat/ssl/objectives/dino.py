"""DINO: a student that sees small views says what a slow teacher says of large ones."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn

from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses import DINOCenter, dino_loss, koleo
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.swav import MultiCropOptions, multi_crop
from pyfeat.ssl.objectives.views import ViewObjective, encode, samples_of
from pyfeat.ssl.optimisers import scale_weight_decay
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, POSITIVE
from pyfeat.ssl.parts import MLP, Prototypes, Schedule, Teacher
from pyfeat.ssl.parts.processes import rows_of_all_processes
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class DINOOptions(MultiCropOptions):
    """Options of ``DINO``."""

    num_prototypes: Annotated[int, "Outputs of the head.", AT_LEAST_ONE] = 1024
    hidden_dim: Annotated[int, "Hidden features of the head.", AT_LEAST_ONE] = 512
    out_dim: Annotated[int, "Features before the last layer.", AT_LEAST_ONE] = 128
    head_layers: Annotated[int, "Linear layers before the last one.", AT_LEAST_ONE] = 3
    student_temperature: Annotated[float, "Of the student's outputs.", POSITIVE] = 0.1
    teacher_temperature: Annotated[float, "Of the teacher's, after the warm-up.", POSITIVE] = 0.04
    warmup_temperature: Annotated[float, "Of the teacher's, at first.", POSITIVE] = 0.04
    warmup_epochs: Annotated[float, "Epochs from one to the other.", NOT_NEGATIVE] = 0.0
    momentum: Annotated[float, "Of the teacher, rising to 1 along a cosine.", FRACTION] = 0.99
    balance: Annotated[
        Literal["center", "sinkhorn"], "What keeps outputs of the teacher apart (DINOv2: sinkhorn)."
    ] = "center"
    center_momentum: Annotated[float, "Of the running mean of outputs.", FRACTION] = 0.9
    frozen_epochs: Annotated[float, "Epochs before the last layer moves.", NOT_NEGATIVE] = 1.0
    final_weight_decay: Annotated[
        float, "At the end, times that of the optimiser; a cosine between.", NOT_NEGATIVE
    ] = 10.0
    koleo_weight: Annotated[
        float, "Of a loss that spreads the features of each large view (DINOv2).", NOT_NEGATIVE
    ] = 0.0


@OBJECTIVES.register("dino", DINOOptions)
class DINO(ViewObjective):
    """Self-distillation without labels; the last layer of the head is part of the loss.

    Args:
        backbone: As in ``Objective``.
        options: As ``DINOOptions``.
        plan: As in ``Objective``.

    Attributes:
        head: Features to what enters the last layer.
        prototypes: The last layer; its rows count as if of length 1.
        teacher: Backbone, head and last layer, running means.
        center: Running mean of the teacher's outputs over all processes.

    As in the published evaluation, the teacher's backbone is what a run hands over.

    Source: Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021,
    arXiv:2104.14294; Sinkhorn-Knopp and KoLeo: Oquab et al., DINOv2, 2023, arXiv:2304.07193.
    """

    handed_over = "teacher.module.0"

    def __init__(self, backbone: nn.Module, options: DINOOptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan, multi_crop(options, plan))
        layers = (options.hidden_dim,) * (options.head_layers - 1)
        dims = (self.backbone.feature_dim, *layers, options.out_dim)
        self.head = MLP(dims, norm="none", activation="gelu")
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        steps = plan.steps_per_epoch
        frozen = round(options.frozen_epochs * steps)
        self.prototypes = Prototypes(options.num_prototypes, options.out_dim, frozen_steps=frozen)
        self.teacher = Teacher(self._student())
        self.center = DINOCenter(options.num_prototypes, options.center_momentum)
        self.momentum = Schedule(options.momentum, 1.0, total=plan.total_steps)
        self.decay = Schedule(1.0, options.final_weight_decay, total=plan.total_steps)
        self.temperature = Schedule(
            options.teacher_temperature,
            total=plan.total_steps,
            warmup=min(plan.total_steps, round(options.warmup_epochs * steps)),
            first=options.warmup_temperature,
        )

    def _student(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone, self.head, self.prototypes])

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of all views against those that the teacher sees, the two large ones."""
        options = self.options
        views = self.augment(samples_of(batch))
        features = encode(self.backbone, views)
        student = [self.head(each) for each in features]
        backbone, head, last = cast("nn.ModuleList", self.teacher.module)
        with torch.no_grad():
            teacher = [head(each) for each in encode(backbone, views[:2])]
        sinkhorn = options.balance == "sinkhorn"
        with without_autocast(student[0]):
            student, teacher = ([view.float() for view in each] for each in (student, teacher))
            loss = dino_loss(
                student,
                teacher,
                self.prototypes.weight,
                cast("Prototypes", last).weight,
                student_temperature=options.student_temperature,
                teacher_temperature=self.temperature(self.steps_done),
                center=None if sinkhorn else self.center.center.clone(),
                sinkhorn_iterations=3 if sinkhorn else None,
                normalize=True,
                group=self.group,
            )
            losses = {"loss": loss}
            if options.koleo_weight:
                large = [rows_of_all_processes(each.float()) for each in features[:2]]
                spread = sum(map(koleo, large)) / 2
                losses = {"loss": loss + options.koleo_weight * spread, "dino": loss.detach()}
                losses["koleo"] = torch.as_tensor(spread).detach()
            if not sinkhorn and self.training:
                self.center.update(
                    teacher, cast("Prototypes", last).weight, normalize=True, group=self.group
                )
        return losses

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the last layer as it is at first, and set the weight decay; Lightning calls it."""
        self.prototypes.freeze(self.steps_done)
        scale_weight_decay(optimizer, self.decay(self.steps_done))

    def after_step(self) -> None:
        """Let the teacher follow."""
        self.teacher.update(self._student(), self.momentum(max(0, self.steps_done - 1)))
