"""What every objective is: a LightningModule around a backbone, with one loss and a few hooks."""

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pyfeat.ssl.config import Optimiser
from pyfeat.ssl.optimisers import learning_rate, make_optimiser

Batch = dict[str, Any]


class Features(Protocol):
    """A backbone, which is an ``nn.Module`` too.

    Attributes:
        feature_dim: D.
    """

    feature_dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, C, H, W) or volumes, in [0, 1]."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps (B, C, h, w) of all stages, from fine to coarse."""


@dataclass(frozen=True)
class Plan:
    """What an objective may know of the run that it serves.

    Attributes:
        optimiser: How weights are changed.
        steps_per_epoch: Steps of one pass over the data.
        epochs: Passes over the data.
        num_samples: Samples of the data set.
        batch_size: Samples a step, over all processes together.
        sample_shape: Of one image or volume, (C, H, W) or (C, D, H, W); empty if there is none.
        num_images: Images that the data have beside their volumes.
    """

    optimiser: Optimiser
    steps_per_epoch: int = 1
    epochs: int = 1
    num_samples: int = 1
    batch_size: int = 1
    sample_shape: tuple[int, ...] = ()
    num_images: int = 0

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.steps_per_epoch * self.epochs


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite.

    Attributes:
        step: Counted from 1.
        indices: Samples of the batch of this process; empty if its own loss is finite.
    """

    def __init__(self, step: int, indices: list[int]) -> None:
        super().__init__(f"pyfeat train: loss must be finite, got NaN or infinity in step {step}")
        self.step, self.indices = step, indices


class Objective(LightningModule, abc.ABC):
    """A loss on batches, and what has to be done beside it.

    A subclass is entered with ``OBJECTIVES.register(name, Options)`` and is made by
    ``make(backbone, options, plan)``. What must survive a checkpoint (teacher, queue, centre,
    step counts) is a parameter or a persistent buffer. Random numbers come from torch's global
    generators, whose states a checkpoint keeps. Losses over several processes take
    ``group=self.group`` and ``reduce="ddp_mean"``.

    Args:
        backbone: Images to features, as ``Features``.
        options: An instance of the options dataclass it is registered with.
        plan: What may be known of the run.

    Attributes:
        backbone: As given.
        options: As given.
        plan: As given.
        mean_loss: Of the latest step, over all processes.
        stop_asked: Set to True to end the run after a step.
        stop_agreed: Whether a process had been asked to before the latest step.
        handed_over: Name of the part that a run gives as its backbone, one like ``backbone``.
    """

    backbone: Any  # nn.Module and Features
    handed_over: ClassVar[str] = "backbone"

    def __init__(self, backbone: nn.Module, options: Any, plan: Plan) -> None:
        super().__init__()
        self.backbone, self.options, self.plan = backbone, options, plan
        self.stop_asked = self.stop_agreed = False
        self.mean_loss = math.nan

    @abc.abstractmethod
    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of a batch, views made inside.

        Args:
            batch: ``images`` (B, C, H, W) float32 in [0, 1], or what else the data has
                (``volumes``, ``texts`` ...), ``index`` (B,) int64, and ``labels`` (B,) int64 where
                the data has labels; -1 where a sample has none.

        Returns:
            Scalars by name; "loss" is minimised, the others are logged.
        """

    def embed(self, batch: Batch) -> Tensor:
        """Return the features (B, D) that probes look at; without gradient, in evaluation mode."""
        features: Tensor = self.get_submodule(self.handed_over)(batch["images"])
        return features

    def two_views(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return embeddings (B, D) of two views, for the alignment; None where there are none."""
        return None

    def check_data(self, batch: Batch) -> None:
        """Raise ValueError if data lack what the loss takes; called before the first step.

        Args:
            batch: Of one sample.
        """

    def embed_pairs(self, batch: Batch) -> tuple[Tensor, list[list[str]]] | None:
        """Return features (B, D) of images and the texts of each; None where there are no texts.

        An objective that returns some has ``encode_texts``: texts to features (M, D) of that space.
        """
        return None

    def start_epoch(self, epoch: int) -> None:
        """Do what is due before the first step of an epoch, counted from 0."""

    def after_step(self) -> None:
        """Do what is due after the weights have changed: teachers, queues, normalised rows."""

    @property
    def group(self) -> "dist.ProcessGroup | None":
        """The processes that train together, None for one alone."""
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    @property
    def progress(self) -> float:
        """Fraction of all steps that are done, in [0, 1]; 0 outside a run."""
        return min(1.0, self.steps_done / self.plan.total_steps)

    @property
    def steps_done(self) -> int:
        """Steps that have changed the weights; 0 outside a run."""
        return int(self.global_step) if self._trainer is not None else 0

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        """Compute the losses of one step; Lightning calls it.

        Raises:
            NonFiniteLossError: On all processes, if the loss of one is NaN or infinite. The weights
                are still those of the step before.
        """
        losses = self.training_loss(batch)
        loss = losses["loss"].detach().double()
        # One message between processes a step, or one wait for the device.
        told = torch.stack([loss, (~loss.isfinite()).double(), loss.new_tensor(self.stop_asked)])
        if self.group is not None:
            dist.all_reduce(told, group=self.group)
        total, num_bad, num_asked = told.tolist()
        if num_bad:
            own = math.isfinite(float(loss))
            raise NonFiniteLossError(self.steps_done + 1, [] if own else batch["index"].tolist())
        self.mean_loss = total / (dist.get_world_size(self.group) if self.group is not None else 1)
        self.stop_agreed = num_asked > 0
        return {name: x if name == "loss" else x.detach() for name, x in losses.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimiser of the plan, with a warm-up and a cosine; Lightning calls it."""
        plan = self.plan
        optimiser = make_optimiser(self.named_parameters(), plan.optimiser)
        factor = learning_rate(
            plan.optimiser, steps_per_epoch=plan.steps_per_epoch, total=plan.total_steps
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
