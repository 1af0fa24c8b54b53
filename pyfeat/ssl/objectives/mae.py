"""MAE: from a quarter of the patches, the pixels of all others are filled in."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from pyfeat.ssl.networks.vit import Block, ViT, initialize, sine_positions
from pyfeat.ssl.objectives.base import Batch, Plan
from pyfeat.ssl.objectives.views import CropOptions, ViewObjective, augmentation, samples_of
from pyfeat.ssl.options import AT_LEAST_ONE, Range
from pyfeat.ssl.parts import Masking, Views, random_masking
from pyfeat.ssl.registry import OBJECTIVES


@dataclass(frozen=True)
class MAEOptions(CropOptions):
    """Options of ``MAE``; views are crops and flips, and colours stay unless asked for."""

    mask_ratio: Annotated[float, "Share of patches that are hidden.", Range(above=0, below=1)] = (
        0.75
    )
    normalize_patches: Annotated[bool, "Fill in pixels less their patch's mean, over its std."] = (
        True
    )
    decoder_width: Annotated[int, "Features of a token of the decoder.", AT_LEAST_ONE] = 96
    decoder_depth: Annotated[int, "Blocks of the decoder.", AT_LEAST_ONE] = 2
    decoder_heads: Annotated[int, "Heads of the decoder.", AT_LEAST_ONE] = 3


@OBJECTIVES.register("mae", MAEOptions)
class MAE(ViewObjective):
    """The mean squared error of hidden pixels; only what is seen is encoded.

    Args:
        backbone: A ``ViT``.
        options: As ``MAEOptions``.
        plan: As in ``Objective``.

    Raises:
        TypeError: If the backbone is no ``ViT``.
        ValueError: If the decoder's width does not suit its heads or the axes.

    Source: He et al., Masked autoencoders are scalable vision learners, CVPR 2022,
    arXiv:2111.06377.
    """

    backbone: ViT

    def __init__(self, backbone: nn.Module, options: MAEOptions, plan: Plan) -> None:
        if not isinstance(backbone, ViT):
            message = f"MAE: backbone must be a ViT, got {type(backbone).__name__}"
            raise TypeError(message)
        super().__init__(backbone, options, plan, Views([augmentation(options, plan)]))
        width, vit = options.decoder_width, backbone.options
        if width % options.decoder_heads or width % (2 * vit.ndim):
            message = (
                f"MAE: decoder_width must be a multiple of decoder_heads and of {2 * vit.ndim}, "
                f"got {width} and {options.decoder_heads}"
            )
            raise ValueError(message)
        self.narrow = nn.Linear(vit.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        blocks = [Block(width, options.decoder_heads) for _ in range(options.decoder_depth)]
        self.decoder = nn.Sequential(*blocks, nn.LayerNorm(width, eps=1e-6))
        self.pixels = nn.Linear(width, vit.in_channels * vit.patch_size**vit.ndim)
        nn.init.normal_(self.mask_token, std=0.02)
        initialize(nn.ModuleList([self.narrow, self.decoder, self.pixels]))

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the mean over hidden patches of the error of their pixels."""
        (view,) = self.augment(samples_of(batch))
        targets = self.targets(view)  # [B, T, P]
        masking = random_masking(
            len(view), targets.shape[1], self.options.mask_ratio, device=view.device
        )
        predicted = self.fill_in(view, masking)  # [B, m, P]
        wanted = targets.gather(1, masking.hidden[..., None].expand_as(predicted))
        return {"loss": (predicted.float() - wanted).square().mean()}

    def fill_in(self, images: Tensor, masking: Masking) -> Tensor:
        """Return the pixels of the hidden patches.

        Args:
            images: (B, C, H, W) in [0, 1], or volumes.
            masking: Which patches are seen; the others have no influence.

        Returns:
            (B, m, P) as ``targets`` has them.
        """
        tokens = self.narrow(self.backbone.tokens(images, seen=masking.seen))
        patch, width = self.backbone.options.patch_size, tokens.shape[2]
        grid = [side // patch for side in images.shape[2:]]
        positions = sine_positions(grid, width).to(tokens)
        hidden = (self.mask_token + positions)[masking.hidden]
        seen = tokens[:, 1:] + positions[masking.seen]
        decoded = self.decoder(torch.cat([tokens[:, :1], seen, hidden], dim=1))
        filled: Tensor = self.pixels(decoded[:, -masking.hidden.shape[1] :])
        return filled

    def targets(self, images: Tensor) -> Tensor:
        """Return the pixels of all patches, (B, T, P) float32, P = C times the pixels of one.

        Less the mean of their patch and over its standard deviation, or as the network sees them.
        """
        patch, axes = self.backbone.options.patch_size, images.ndim - 2
        x: Tensor = self.backbone.intensities(images.float())
        for axis in range(2, 2 + axes):
            x = x.unfold(axis, patch, patch)  # [B, C, h, w, p, p]
        x = x.movedim(1, 1 + axes).flatten(1, axes).flatten(2)  # [B, T, C p p]
        if not self.options.normalize_patches:
            return x
        var, mean = torch.var_mean(x, dim=2, keepdim=True)
        return (x - mean) / (var + 1e-6).sqrt()
