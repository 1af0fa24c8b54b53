"""SwAV: from one view, the prototypes are predicted that another view is assigned to."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses import FeatureQueue, swav_loss
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import (
    SHARE,
    ViewObjective,
    ViewOptions,
    augmentation,
    encode,
    samples_of,
)
from pyfeat.ssl.options import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE
from pyfeat.ssl.parts import MLP, Prototypes, Views
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class MultiCropOptions(ViewOptions):
    """Two large views and several small ones, which only predict."""

    small_views: Annotated[int, "Small views beside the two large ones.", NOT_NEGATIVE] = 4
    small_size: Annotated[
        int | None, "Side of a small view in pixels; null takes half of a large one.", AT_LEAST_ONE
    ] = None
    small_scale: Annotated[
        float, "Largest share that a small view shows, and least that a large one does.", SHARE
    ] = 0.3
    min_scale: Annotated[float, "Least share that a small view shows.", SHARE] = 0.1


def multi_crop(options: MultiCropOptions, plan: Plan) -> Views:
    """Make the views that options ask for, the two large ones first."""
    share = max(options.small_scale, options.min_scale)
    large = augmentation(options, plan, scale=(share, 1.0))
    if not options.small_views:
        return Views([large], [2])
    side = options.small_size
    if side is None and len(plan.sample_shape) != 4:
        side = max(1, (options.view_size or min(plan.sample_shape[1:])) // 2)
    small = augmentation(options, plan, size=side, scale=(options.min_scale, share))
    return Views([large, small], [2, options.small_views])


@dataclass(frozen=True)
class SwAVOptions(MultiCropOptions):
    """Options of ``SwAV``."""

    num_prototypes: Annotated[int, "Directions to assign to.", AT_LEAST_ONE] = 300
    temperature: Annotated[float, "Of predictions.", POSITIVE] = 0.1
    epsilon: Annotated[float, "Temperature of assignments.", POSITIVE] = 0.05
    iterations: Annotated[int, "Of Sinkhorn-Knopp.", AT_LEAST_ONE] = 3
    hidden_dim: Annotated[int, "Hidden features of the projection.", AT_LEAST_ONE] = 512
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 128
    frozen_epochs: Annotated[float, "Epochs before prototypes move.", NOT_NEGATIVE] = 1.0
    queue_size: Annotated[
        int, "Earlier features that take part in the balance, for small batches; 0 for none.",
        NOT_NEGATIVE,
    ] = 0  # fmt: skip
    queue_from: Annotated[float, "Epochs before the queue is used.", NOT_NEGATIVE] = 15.0


@OBJECTIVES.register("swav", SwAVOptions)
class SwAV(ViewObjective):
    """Swapped predictions of assignments that Sinkhorn-Knopp balances over all processes.

    Args:
        backbone: As in ``Objective``.
        options: As ``SwAVOptions``.
        plan: As in ``Objective``.

    Attributes:
        head: The projection.
        prototypes: The directions, of length 1.
        queues: Earlier features of each large view, the same on all processes.

    Source: Caron et al., Unsupervised learning of visual features by contrasting cluster
    assignments, NeurIPS 2020, arXiv:2006.09882.
    """

    def __init__(self, backbone: nn.Module, options: SwAVOptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan, multi_crop(options, plan))
        out = options.out_dim
        self.head = MLP((self.backbone.feature_dim, options.hidden_dim, out))
        frozen = round(options.frozen_epochs * plan.steps_per_epoch)
        self.prototypes = Prototypes(options.num_prototypes, out, frozen_steps=frozen)
        size = options.queue_size
        queues = [FeatureQueue(size, out) for _ in range(2)] if size else []
        self.queues = nn.ModuleList(queues)
        self._waiting: list[Tensor] = []  # features for the queues, until the step is taken

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of all views, of which the two large ones are assigned."""
        options, network = self.options, nn.Sequential(self.backbone, self.head)
        views = encode(network, self.augment(samples_of(batch)))
        with without_autocast(views[0]):
            features = [functional.normalize(view.float(), dim=1) for view in views]
            loss = swav_loss(
                features,
                self.prototypes.weight,
                assigned=(0, 1),
                temperature=options.temperature,
                epsilon=options.epsilon,
                iterations=options.iterations,
                queues=self._queues(),
                group=self.group,
            )
        self._waiting = [view.detach() for view in features[:2]]
        return {"loss": loss}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave the prototypes as they are at first; Lightning calls it."""
        self.prototypes.freeze(self.steps_done)

    def after_step(self) -> None:
        """Bring prototypes to length 1 and remember the features of the step."""
        self.prototypes.normalize()
        for queue, features in zip(self._all_queues, self._waiting, strict=False):
            queue.enqueue(features, group=self.group)
        self._waiting = []

    @property
    def _all_queues(self) -> list[FeatureQueue]:
        return [queue for queue in self.queues if isinstance(queue, FeatureQueue)]

    def _queues(self) -> list[Tensor] | None:
        """Own rows of the queues: those of all processes together are the queues."""
        begin = self.options.queue_from * self.plan.steps_per_epoch
        if not self.queues or self.steps_done < begin:
            return None
        rank, count = (0, 1) if self.group is None else (dist.get_rank(), dist.get_world_size())
        return [queue.features[rank::count].contiguous() for queue in self._all_queues]
