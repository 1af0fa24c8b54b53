"""SeasonContrast: three spaces, each blind to other changes of a place."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses import FeatureQueue, info_nce
from pyfeat.ssl.objectives.base import Batch, Objective, Plan
from pyfeat.ssl.objectives.views import ViewOptions, augmentation
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, POSITIVE
from pyfeat.ssl.parts import MLP, Teacher
from pyfeat.ssl.registry import OBJECTIVES

NUM_DATES = 3
SPACES = ("common", "augmentation", "season")


@dataclass(frozen=True)
class SeasonContrastOptions(ViewOptions):
    """Options of ``SeasonContrast``; the colours are those of keys, a query has its own."""

    spaces: Annotated[
        Literal["three", "one"],
        "three spaces, or one that is blind to seasons and augmentations (MoCo over seasons).",
    ] = "three"
    temperature: Annotated[float, "Of the similarities.", POSITIVE] = 0.07
    queue_size: Annotated[int, "Earlier keys of each space.", AT_LEAST_ONE] = 4096
    momentum: Annotated[float, "Of the teacher.", FRACTION] = 0.999
    hidden_dim: Annotated[
        int | None, "Hidden features of a head; null takes those of the network.", AT_LEAST_ONE
    ] = None
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 128


@OBJECTIVES.register("season_contrast", SeasonContrastOptions)
class SeasonContrast(Objective):
    """A view of a place finds one key in each of three spaces, of a slow teacher.

    Of three dates t0, t1, t2 of a place, the query is a crop of t0 in its own colours, and the keys are
    k0, an augmented crop of t1; k1, a crop of t2; and k2, an augmented crop of t0. In space i, with a
    head and a queue of its own, key i is the positive. The negatives are the queue and, in spaces 1
    and 2, the two other keys of all places of the batch, the place's own among them; keys of its own
    kind in the batch are none. So

    - space 0 ("common") is blind to season and augmentation;
    - space 1 ("augmentation") is blind to season and tells augmentations apart;
    - space 2 ("season") is blind to augmentation and tells seasons apart.

    The loss is the sum over spaces. The queues begin empty and take a step's keys after it. A batch
    normalisation of the network lets a query know its key by their common statistics: take one of
    groups (``network.norm``). Of data with fewer dates than three, the last may be repeated: t2 = t1.

    Args:
        backbone: As in ``Objective``.
        options: As ``SeasonContrastOptions``.
        plan: As in ``Objective``.

    Attributes:
        heads: Of each space, left behind after training.
        teacher: Backbone and heads, running means.
        queues: Keys of each space, the same on all processes.

    Source: Manas et al., Seasonal contrast, ICCV 2021, arXiv:2103.16607, with dates drawn without
    repetition as in Plekhanova et al., SSL4Eco, CVPR workshops 2025, arXiv:2504.18256; momentum and
    queue: He et al., MoCo v2, arXiv:2003.04297.
    """

    def __init__(self, backbone: nn.Module, options: SeasonContrastOptions, plan: Plan) -> None:
        super().__init__(backbone, options, plan)
        plain: dict[str, Any] = {"jitter": (0.0,) * 4, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
        self.crop = augmentation(options, plan, flip=0.0, vertical_flip=0.0, **plain)
        self.augment = augmentation(options, plan)
        width = self.backbone.feature_dim
        dims = (width, options.hidden_dim or width, options.out_dim)
        count = 1 if options.spaces == "one" else len(SPACES)
        self.heads = nn.ModuleList(MLP(dims, norm="none") for _ in range(count))
        self.teacher = Teacher(self._student())
        self.queues = nn.ModuleList(
            FeatureQueue(options.queue_size, options.out_dim) for _ in range(count)
        )
        self._waiting: list[Tensor] = []  # keys for the queues, until the step is taken

    def _student(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone, *self.heads])

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of all spaces.

        Raises:
            ValueError: If there are fewer than three dates of a place.
        """
        dates: Tensor = batch["images"]
        if dates.ndim != 5 or dates.shape[1] < NUM_DATES:
            got = tuple(dates.shape)
            message = f"SeasonContrast: images must have shape (B, 3 or more, C, H, W), got {got}"
            raise ValueError(message)
        query, keys = self.views(dates)
        features = self.backbone(query)
        queries = [functional.normalize(head(features).float(), dim=1) for head in self.heads]
        with torch.no_grad():
            all_keys = self._keys(keys)
        with without_autocast(features):
            losses = [
                self._loss(i, z, kinds)
                for i, (z, kinds) in enumerate(zip(queries, all_keys, strict=True))
            ]
        self._waiting = [kinds[i] for i, kinds in enumerate(all_keys)]
        total = torch.stack(losses).sum()
        named = zip(SPACES, losses, strict=False)
        return {"loss": total, **(dict(named) if len(losses) > 1 else {})}

    def views(self, dates: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Make the query and the keys of each space, from dates (B, V, C, H, W)."""
        first, second, third = dates[:, 0], dates[:, 1], dates[:, 2]
        query, keys = self.crop(first), [self.augment(second)]
        if len(self.heads) > 1:
            keys += [self.crop(third), self.augment(first)]
        return query, keys

    def _keys(self, views: list[Tensor]) -> list[list[Tensor]]:
        """Of each space, the keys (B, D) of all kinds, of length 1."""
        modules: Any = self.teacher.module
        backbone, *heads = modules
        features = backbone(torch.cat(views))
        return [
            list(functional.normalize(head(features).float(), dim=1).chunk(len(views)))
            for head in heads
        ]

    def _loss(self, space: int, queries: Tensor, kinds: list[Tensor]) -> Tensor:
        others = [kind for i, kind in enumerate(kinds) if i != space and space > 0]
        extra = torch.cat([*others, self._own_rows(space)])
        same = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
        # One id for queries and the keys of their kind: those of other places are left out.
        key_ids = torch.cat([same, torch.ones_like(same[:1]).expand(len(extra))])
        loss: Tensor = info_nce(
            queries,
            kinds[space],
            temperature=self.options.temperature,
            extra_keys=extra,
            query_ids=same,
            key_ids=key_ids,
            group=self.group,
        )
        return loss

    def _own_rows(self, space: int) -> Tensor:
        """Own rows of a queue: those of all processes together are the queue."""
        queue = self.queues[space]
        rank, count = (0, 1) if self.group is None else (dist.get_rank(), dist.get_world_size())
        rows: Tensor = queue.features  # type: ignore[assignment]
        return rows[rank::count]

    def after_step(self) -> None:
        """Let the teacher follow, and remember the keys of the step."""
        self.teacher.update(self._student(), self.options.momentum)
        for queue, keys in zip(self.queues, self._waiting, strict=False):
            queue.enqueue(keys, group=self.group)  # type: ignore[operator]
        self._waiting = []

    def embed(self, batch: Batch) -> Tensor:
        """Return the features (B, D) of the first date of each place."""
        features: Tensor = self.backbone(batch["images"][:, 0])
        return features

    def two_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the features of a query and of the key that space 0 wants near it."""
        query, keys = self.views(batch["images"])
        return self.backbone(query), self.backbone(keys[0])
