"""SiT: groups of lost pixels are filled in, and a view finds the other as a teacher sees it whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyfeat.losses import InfoNCELoss
from pyfeat.ssl.networks.vit import ViT, pool_tokens
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import (
    SHARE,
    ViewObjective,
    ViewOptions,
    augmentation,
    samples_of,
)
from pyfeat.ssl.optimisers import scale_weight_decay
from pyfeat.ssl.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, POSITIVE, Range
from pyfeat.ssl.parts import MLP, Corruption, Schedule, Teacher, Views, group_corruption
from pyfeat.ssl.registry import OBJECTIVES

_PART = Range(above=0, below=1)


@dataclass(frozen=True)
class SiTOptions(ViewOptions):
    """Options of ``SiT``; the second view is blurred a tenth as often, and may be solarised."""

    flip: Annotated[float, "Probability of a horizontal flip.", FRACTION] = 0.5
    blur: Annotated[float, "Probability of a blurred view.", FRACTION] = 1.0
    drop: Annotated[Literal["zeros", "noise", "copy"], "What lost pixels become."] = "zeros"
    drop_ratio: Annotated[float, "Share of pixels that are lost.", _PART] = 0.5
    alien_ratio: Annotated[float, "Share of pixels that another image takes over.", _PART] = 0.3
    alien_probability: Annotated[
        float, "Share of images with pixels of others in place of lost ones.", FRACTION
    ] = 0.5
    largest_block: Annotated[float, "Longest side of a lost block, of the image's.", SHARE] = 0.3
    align: Annotated[int, "Pixels of the grid that blocks lie on.", AT_LEAST_ONE] = 1
    temperature: Annotated[float, "Of the similarities.", POSITIVE] = 0.2
    hidden_dim: Annotated[int, "Hidden features of the contrastive head.", AT_LEAST_ONE] = 4096
    out_dim: Annotated[int, "Features that are compared.", AT_LEAST_ONE] = 256
    momentum: Annotated[float, "Of the teacher, rising to 1 along a cosine.", FRACTION] = 0.996
    contrast_weight: Annotated[float, "Of the contrastive loss.", NOT_NEGATIVE] = 1.0
    reconstruction_weight: Annotated[
        float, "Of the loss of lost pixels; about 5 for small data sets.", NOT_NEGATIVE
    ] = 1.0
    final_weight_decay: Annotated[
        float, "At the end, times that of the optimiser; a cosine between.", NOT_NEGATIVE
    ] = 2.5
    clip_each: Annotated[
        float | None, "Longest gradient of each tensor of weights by itself.", POSITIVE
    ] = 3.0

    def __post_init__(self) -> None:
        if self.contrast_weight == self.reconstruction_weight == 0.0:
            message = "contrast_weight or reconstruction_weight must be above 0, got 0 and 0"
            raise ValueError(message)


@OBJECTIVES.register("sit", SiTOptions)
class SiT(ViewObjective):
    """Group masked model learning and contrast, the final form of SiT.

    Two views are corrupted, each its own way; the student sees them so, the teacher whole. The loss
    is ``2 t (InfoNCE(q1, k2) + InfoNCE(q2, k1))`` of class tokens, keys of all processes, and the
    mean absolute error of lost pixels, as the network takes them, of the augmented views. Published
    runs have ``network.drop_path`` 0.1, which the teacher has not.

    Args:
        backbone: A ``ViT`` of images. With ``network.pool`` "both" its features are what SiT is
            fine-tuned on: class token and mean of patches, side by side.
        options: As ``SiTOptions``.
        plan: As in ``Objective``.

    Attributes:
        head: Class token to what is compared.
        reconstruction: Tokens of patches to pixels.
        teacher: Backbone and contrastive head, running means; it fills in nothing.

    Raises:
        TypeError: If the backbone is no ``ViT`` of images.

    Source: Atito et al., SiT: Self-supervised vision transformer, 2021, arXiv:2104.03602, in the
    form of its code of 2022.
    """

    backbone: ViT

    def __init__(self, backbone: nn.Module, options: SiTOptions, plan: Plan) -> None:
        if not isinstance(backbone, ViT) or backbone.options.ndim != 2:
            message = f"SiT: backbone must be a ViT of images, got {type(backbone).__name__}"
            raise TypeError(message)
        first = augmentation(options, plan, flip=options.flip)
        second = augmentation(
            options, plan, flip=options.flip, blur=options.blur / 10, solarize=0.2
        )
        super().__init__(backbone, options, plan, Views([first, second]))
        vit = backbone.options
        dims = (vit.width, options.hidden_dim, options.hidden_dim, options.out_dim)
        self.head = MLP(dims, activation=("relu", "gelu"), last_norm=True)
        self.reconstruction = PixelHead(vit.width, vit.in_channels, vit.patch_size)
        # What a weight of 0 leaves unused: processes would wait for its gradient.
        self.head.requires_grad_(options.contrast_weight > 0)
        self.reconstruction.requires_grad_(options.reconstruction_weight > 0)
        self.teacher = Teacher(self._student())
        self.loss = InfoNCELoss(options.temperature, normalize=True)
        self.momentum = Schedule(options.momentum, 1.0, total=plan.total_steps)
        self.decay = Schedule(1.0, options.final_weight_decay, total=plan.total_steps)

    def _student(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone, self.head])

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss of two views of a batch of images."""
        options = self.options
        views = self.augment(samples_of(batch))
        clean, lost = torch.cat(views), [self.corrupt(view) for view in views]
        tokens = self.backbone.tokens(torch.cat([each.images for each in lost]))
        losses: dict[str, Tensor] = {}
        total = clean.new_zeros(())
        if options.contrast_weight:
            losses["contrast"] = self._contrast(tokens[:, 0], clean)
            total = total + options.contrast_weight * losses["contrast"]
        if options.reconstruction_weight:
            mask = torch.cat([each.mask for each in lost])
            grid = [side // self.backbone.options.patch_size for side in clean.shape[2:]]
            filled = self.reconstruction(tokens[:, 1:], grid)
            wanted = self.backbone.intensities(clean.float())
            losses["reconstruction"] = masked_error(filled, wanted, mask, group=self.group)
            total = total + options.reconstruction_weight * losses["reconstruction"]
        return {"loss": total, **losses}

    def corrupt(self, images: Tensor) -> Corruption:
        """Corrupt images (B, C, H, W) in [0, 1], some by pixels of others."""
        options, intensities = self.options, self.backbone.intensities
        blocks = {"largest": options.largest_block, "align": options.align}
        lost = group_corruption(
            images,
            options.drop_ratio,
            fill=options.drop,
            mean=intensities.mean,
            std=intensities.std,
            **blocks,
        )
        if len(images) < 2 or not options.alien_probability:
            return lost
        alien = group_corruption(images, options.alien_ratio, fill="alien", **blocks)
        chosen = torch.rand(len(images), device=images.device) < options.alien_probability
        return Corruption(
            torch.where(chosen[:, None, None, None], alien.images, lost.images),
            torch.where(chosen[:, None, None], alien.mask, lost.mask),
        )

    def fill_in(self, images: Tensor) -> Tensor:
        """Return what the network makes of corrupted images, (B, C, H, W), in [0, 1] as they are."""
        patch = self.backbone.options.patch_size
        grid = [side // patch for side in images.shape[2:]]
        filled = self.reconstruction(self.backbone.tokens(images)[:, 1:], grid)
        intensities = self.backbone.intensities
        shape = (-1, 1, 1)
        pixels: Tensor = filled * intensities.std.view(shape) + intensities.mean.view(shape)
        return pixels

    def embed(self, batch: Batch) -> Tensor:
        """Return the class token and the mean of patches, side by side, (B, 2 D)."""
        return pool_tokens(self.backbone.tokens(samples_of(batch)), "both")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Set the weight decay, and shorten gradients tensor by tensor; Lightning calls it."""
        scale_weight_decay(optimizer, self.decay(self.steps_done))
        if self.options.clip_each is not None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    nn.utils.clip_grad_norm_([parameter], self.options.clip_each)

    def after_step(self) -> None:
        """Let the teacher follow."""
        self.teacher.update(self._student(), self.momentum(max(0, self.steps_done - 1)))

    def _contrast(self, tokens: Tensor, clean: Tensor) -> Tensor:
        q1, q2 = self.head(tokens).chunk(2)
        backbone, head = cast("nn.ModuleList", self.teacher.module)
        with torch.no_grad():
            k1, k2 = head(cast("ViT", backbone).tokens(clean)[:, 0]).chunk(2)
        losses = [self.loss(q, k, group=self.group) for q, k in ((q1, k2), (q2, k1))]
        contrast: Tensor = 2.0 * self.options.temperature * torch.stack(losses).sum()
        return contrast


class PixelHead(nn.Module):
    """Tokens of patches to the pixels of each.

    Args:
        width: Features of a token.
        channels: Of the image.
        patch: Side of a patch in pixels.
    """

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.pixels = nn.ConvTranspose2d(width, channels, patch, stride=patch)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, T, D) of a grid, row by row, to (B, C, H, W)."""
        maps = self.layers(tokens).mT.unflatten(2, tuple(grid))
        pixels: Tensor = self.pixels(maps)
        return pixels


def masked_error(
    filled: Tensor, wanted: Tensor, mask: Tensor, *, group: "dist.ProcessGroup | None" = None
) -> Tensor:
    """Return the mean absolute error of pixels under the mask, of all processes.

    Args:
        filled: (B, C, H, W).
        wanted: Likewise.
        mask: (B, H, W) bool, with one True at least.
        group: Processes, whose mean of losses is the error over all their pixels.
    """
    errors = ((filled.float() - wanted).abs() * mask[:, None]).sum()
    count = mask.sum().double() * filled.shape[1]
    size = 1
    if group is not None:
        dist.all_reduce(count, group=group)
        size = dist.get_world_size(group)
    return errors * (size / count).to(errors.dtype)
