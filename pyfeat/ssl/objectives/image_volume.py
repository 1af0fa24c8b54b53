"""ImageVolume: slices cluster, volumes cluster, and a volume's hidden slices are guessed."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.ssl.networks.slices import SliceEncoder, SliceOptions, VolumeEncoder
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import SHARE, ViewObjective, ViewOptions, augmentation
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, POSITIVE
from pyfeat.ssl.parts import (
    MLP,
    BalancedClusters,
    BankClusters,
    Clusters,
    Views,
    VolumeAugmentation,
    random_masking,
)
from pyfeat.ssl.registry import OBJECTIVES

Form = Literal["swav", "deepcluster", "none"]
_LOSSES = ("intra", "masked", "inter")


@dataclass(frozen=True)
class ImageVolumeOptions(ViewOptions, SliceOptions):
    """Options of ``ImageVolume``."""

    intra: Annotated[Form, "How images and slices are clustered."] = "swav"
    inter: Annotated[Form, "How volumes are clustered."] = "swav"
    intra_clusters: Annotated[
        tuple[int, ...], "Clusters of images and slices, of each head.", AT_LEAST_ONE
    ] = (300,)
    inter_clusters: Annotated[
        tuple[int, ...], "Clusters of volumes, of each head.", AT_LEAST_ONE
    ] = (4, 4, 4)
    masked_weight: Annotated[
        float, "Of the loss of hidden slices; the clusterings have 1.", NOT_NEGATIVE
    ] = 1.0
    mask_ratio: Annotated[float, "Share of slices hidden, rounded up.", SHARE] = 0.1
    stages: Annotated[
        tuple[float, float, float] | None,
        "Shares of the run for intra clustering, hidden slices and inter clustering, one after the "
        "other as in the paper's code; null minimises all at once.",
        NOT_NEGATIVE,
    ] = None
    slices: Annotated[int, "Slices of a volume that a step clusters.", AT_LEAST_ONE] = 8
    temperature: Annotated[float, "Of predictions.", POSITIVE] = 0.1
    epsilon: Annotated[float, "Temperature of assignments by swav.", POSITIVE] = 0.05
    iterations: Annotated[int, "Of Sinkhorn-Knopp, by swav.", AT_LEAST_ONE] = 3
    kmeans_iterations: Annotated[int, "Of k-means, by deepcluster.", NOT_NEGATIVE] = 10
    frozen_epochs: Annotated[float, "Epochs before clusters are learned.", NOT_NEGATIVE] = 1.0
    hidden_dim: Annotated[int, "Hidden features of the head of slices.", AT_LEAST_ONE] = 512
    out_dim: Annotated[int, "Features of slices that are clustered.", AT_LEAST_ONE] = 128
    degrees: Annotated[float, "Largest turn of a volume about each axis.", NOT_NEGATIVE] = 10.0
    shift: Annotated[float, "Largest shift of a volume, of its length.", FRACTION] = 0.1
    flip: Annotated[float, "Probability of a flip of each axis within slices.", FRACTION] = 0.5
    slice_flip: Annotated[
        float, "Probability that slices come in reverse, after which order tells less.", FRACTION
    ] = 0.0
    bias: Annotated[float, "Strength of a smooth factor of a volume.", NOT_NEGATIVE] = 0.2
    gamma: Annotated[float, "Largest logarithm of a power of intensities.", NOT_NEGATIVE] = 0.3
    noise: Annotated[float, "Largest standard deviation of noise.", NOT_NEGATIVE] = 0.05

    def __post_init__(self) -> None:
        for name in ("intra_clusters", "inter_clusters"):
            if not getattr(self, name):
                message = f"{name} must be given for one head at least, got none"
                raise ValueError(message)
        if not self.used():
            message = "intra, inter or masked_weight must be used, got 'none', 'none' and 0"
            raise ValueError(message)
        if self.stages is not None:
            wanted = {name for name, x in zip(_LOSSES, self.stages, strict=True) if x}
            if wanted != set(self.used()):
                message = (
                    f"stages must have a share for each loss that is used ({', '.join(self.used())}) "
                    f"and no other, got {list(self.stages)}"
                )
                raise ValueError(message)

    def used(self) -> tuple[str, ...]:
        """The losses that there are, in the order of ``stages``."""
        used = (self.intra != "none", self.masked_weight > 0, self.inter != "none")
        return tuple(itertools.compress(_LOSSES, used))


@OBJECTIVES.register("image_volume", ImageVolumeOptions)
class ImageVolume(ViewObjective):
    """One network of images for images and volumes, with a deformable encoder over slices.

    - intra: two views of slices, and of images that come beside the volumes, agree on clusters;
    - masked: some slices of a volume are hidden from the encoder, the same in both views, and it
      guesses the features that all slices have by themselves, from which no gradient flows;
    - inter: two views of volumes agree on clusters.

    The loss is the sum, or one after the other (``stages``). In the stage of masked slices the
    network and the projection stay as they are. The network reads slices as images of as many
    channels; data of volumes have one, or three alike.

    Args:
        backbone: As in ``Objective``, of images, with ``map_dims``, the channels of its maps.
        options: As ``ImageVolumeOptions``.
        plan: As in ``Objective``.

    Attributes:
        slices: The encoder over slices with its projection; ``pyfeat.features.load_volumes`` gives
            it back, ``pyfeat.features.load`` the network of images alone.
        head: Features of a slice to what is clustered, left behind after training.
        intra: Clusters of images and slices, None without.
        inter: Clusters of volumes, None without.

    Raises:
        ValueError: If the samples are no volumes, or a head has more clusters than samples.

    Source: Nguyen et al., Joint self-supervised image-volume representation learning with intra-inter
    contrastive clustering, AAAI 2023, arXiv:2212.01893.
    """

    def __init__(self, backbone: nn.Module, options: ImageVolumeOptions, plan: Plan) -> None:
        if len(plan.sample_shape) != 4:
            got = plan.sample_shape
            message = f"ImageVolume: data must be volumes (C, D, H, W), got samples of shape {got}"
            raise ValueError(message)
        super().__init__(backbone, options, plan, Views([volume_augmentation(options)], [2]))
        channels, num_slices, height, width = plan.sample_shape
        self.slices = SliceEncoder(list(self.backbone.map_dims), num_slices, options)
        self.head = MLP((options.dim, options.hidden_dim, options.out_dim))
        flat = replace(plan, sample_shape=(channels, height, width))
        self.augment_slices = Views([augmentation(options, flat)], [2])
        num_flat = plan.num_samples * num_slices + plan.num_images
        self.intra = _clusters(
            options.intra, num_flat, options.intra_clusters, options.out_dim, options, plan
        )
        self.inter = _clusters(
            options.inter, plan.num_samples, options.inter_clusters, options.dim, options, plan
        )

    @property
    def encoder(self) -> VolumeEncoder:
        """Network and encoder together."""
        return VolumeEncoder(self.backbone, self.slices)

    @property
    def active(self) -> tuple[str, ...]:
        """Which of the losses "intra", "masked" and "inter" this step has."""
        used: tuple[str, ...] = self.options.used()
        shares = self.options.stages
        if shares is None:
            return used
        ends = [end / sum(shares) for end in itertools.accumulate(shares)]
        stages = (name for name, end in zip(_LOSSES, ends, strict=True) if self.progress < end)
        return (next(stages, used[-1]),)

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of this step, two views each."""
        losses: dict[str, Tensor] = {}
        active = self.active
        if "intra" in active:
            losses["intra"] = self._intra_loss(batch)
        if active != ("intra",):
            views = torch.cat(self.augment(batch["volumes"]))
            if "inter" in active:
                slices = self.encoder.each_slice(views)
            else:
                with torch.no_grad(), _evaluated(self.backbone, self.options.stages is not None):
                    slices = self.encoder.each_slice(views)
            if "masked" in active:
                losses["masked"] = self.options.masked_weight * self._masked_loss(slices.detach())
            if self.inter is not None and "inter" in active:
                volumes = self.slices.volumes(slices).chunk(2)
                losses["inter"] = self.inter(volumes, batch["index"], self.group)
        total = torch.stack(list(losses.values())).sum()
        if self.group is not None:  # where every parameter must have a gradient
            total = total + sum(0.0 * x.sum() for x in self.parameters() if x.requires_grad)
        return {"loss": total, **losses}

    def _intra_loss(self, batch: Batch) -> Tensor:
        volumes: Tensor = batch["volumes"]
        num_slices = volumes.shape[2]
        chosen = torch.rand(volumes.shape[0], num_slices, device=volumes.device).argsort(dim=1)
        chosen = chosen[:, : self.options.slices]
        rows = torch.arange(len(volumes), device=volumes.device)[:, None]
        samples = volumes.transpose(1, 2)[rows, chosen].flatten(0, 1)
        index = (batch["index"][:, None] * num_slices + chosen).flatten()
        if "images" in batch:
            samples = torch.cat([samples, batch["images"].flatten(0, 1)])
            beyond = self.plan.num_samples * num_slices
            index = torch.cat([index, beyond + batch["image_index"].flatten()])
        views = torch.cat(self.augment_slices(samples))
        features = functional.normalize(self.head(self.encoder.images(views)), dim=1)
        clusters: Any = self.intra
        loss: Tensor = clusters(features.chunk(2), index, self.group)
        return loss

    def _masked_loss(self, slices: Tensor) -> Tensor:
        """The squared error of all slices (2B, N, D), first views before second, over hidden ones."""
        batch, num_slices = len(slices) // 2, slices.shape[1]
        num_hidden = math.ceil(self.options.mask_ratio * num_slices)
        masking = random_masking(batch, num_slices, num_hidden / num_slices, device=slices.device)
        guessed = self.slices.fill_in(slices, masking.mask().repeat(2, 1))
        loss: Tensor = 2.0 * functional.mse_loss(guessed, slices) / num_hidden
        return loss

    def embed(self, batch: Batch) -> Tensor:
        """Return the features (B, D) of volumes."""
        features: Tensor = self.encoder(batch["volumes"])
        return features

    def two_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the features of two views of volumes."""
        first, second = self.augment(batch["volumes"])
        return self.encoder(first), self.encoder(second)

    def start_epoch(self, epoch: int) -> None:
        """Cluster the banks anew."""
        for clusters in self._all_clusters:
            clusters.start_epoch(epoch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave clusters as they are at first, and what no loss trains; Lightning calls it."""
        for clusters in self._all_clusters:
            clusters.freeze(self.steps_done)
        encoder, layers = [self.backbone, self.slices.projection], self.slices.layers
        guess = [self.slices.predictor, nn.ParameterList([self.slices.mask_token])]
        trained = {
            "intra": [*encoder, self.head, self.intra],
            "masked": [layers, *guess],
            "inter": [*encoder, layers, self.inter],
        }
        parts = [part for name in self.active for part in trained[name] if part is not None]
        kept = {id(parameter) for part in parts for parameter in part.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in kept:
                parameter.grad = None

    def after_step(self) -> None:
        """Let the clusters remember the step."""
        for clusters in self._all_clusters:
            clusters.after_step(self.group)

    @property
    def _all_clusters(self) -> list[Clusters]:
        return [part for part in (self.intra, self.inter) if part is not None]


def volume_augmentation(options: ImageVolumeOptions) -> VolumeAugmentation:
    """Make the views of volumes that options ask for."""
    # A zoom by s shows the s-th part along each axis.
    return VolumeAugmentation(
        degrees=options.degrees,
        scale=(1.0, options.min_scale ** (-1 / 3)),
        shift=options.shift,
        flip=options.flip,
        depth_flip=options.slice_flip,
        bias=options.bias,
        gamma=options.gamma,
        jitter=(options.brightness, options.contrast),
        blur=options.blur,
        noise=options.noise,
    )


def _clusters(
    form: Form,
    num_samples: int,
    counts: tuple[int, ...],
    dim: int,
    options: ImageVolumeOptions,
    plan: Plan,
) -> Clusters | None:
    frozen = round(options.frozen_epochs * plan.steps_per_epoch)
    shared: dict[str, Any] = {"temperature": options.temperature, "frozen_steps": frozen}
    if form == "swav":
        balance: dict[str, Any] = {"epsilon": options.epsilon, "iterations": options.iterations}
        return BalancedClusters(counts, dim, **shared, **balance)
    if form == "deepcluster":
        return BankClusters(
            num_samples, counts, dim, **shared, iterations=options.kmeans_iterations
        )
    return None


@contextmanager
def _evaluated(module: nn.Module, wanted: bool) -> Iterator[None]:
    """With running statistics in place of those of the batch, if wanted."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.train(module.training and not wanted)
        yield
    finally:
        for part, training in modes:
            part.training = training
