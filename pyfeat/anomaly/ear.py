"""EAR: cut out what stands out, rebuild it from a hint, and see what could not be rebuilt."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyfeat._storage import PathLike, replaced_folder
from pyfeat.anomaly.ear_files import MANIFEST, EARSummary, read_files, write_files
from pyfeat.anomaly.excision import Excision
from pyfeat.anomaly.images import ImageInput, ImageStream, SkippedImage, batched, nothing_left
from pyfeat.anomaly.metrics import Threshold, normal_threshold
from pyfeat.anomaly.progress import progress_bar
from pyfeat.anomaly.reconstruction import (
    RESIDUALS,
    NormalResiduals,
    RebuildOptions,
    RebuiltImage,
    ResidualName,
    residual_maps,
    smooth,
    train_to_rebuild,
)
from pyfeat.anomaly.results import AnomalyScores, ScoredImage
from pyfeat.anomaly.saliency import EnergySaliency, Saliency
from pyfeat.anomaly.unet import UNet

# Blocks that `block="auto"` chooses among, in pixels, and how much worse a cut may be rebuilt.
_BLOCKS, _SLACK = (4, 8, 16, 32), 0.1


class EAR:
    """Anomaly detection by excision and recovery: one mask, one pass, no randomness in scoring.

    A frozen source of saliency says where an image stands out; that is cut out and shown as a
    mosaic, from which a U-Net rebuilds it. The network has only seen normal images, so it rebuilds a
    defect as something normal. What it was shown sharply it may copy, so a defect that is not cut
    out is missed: ``coverage`` of ``pyfeat.anomaly.excision`` measures that where masks are known.

    Args:
        saliency: Where images stand out; None takes ``EnergySaliency``.
        image_size: Pixels (height, width), or one number for both, to which images are resized; at
            least 16.
        excision: Area, dilation and hint of the cut.
        block: Side of a block of the mosaic, in place of ``excision.block``; "auto" trains with
            blocks of 4, 8, 16 and 32 pixels by turns and takes the largest for which held-out
            normal images are rebuilt at most 10 % worse inside the cut than outside, or else 4.
        width: Channels of the U-Net's finest level.
        levels: How often it halves the sides, of which at least 2 pixels must be left.
        skips: Skip connections that are on in scoring, from the finest down; None is all. All are on
            in training; with the finer ones off, fine detail cannot be copied.
        residual: "msgms", similarity of gradients on several scales, or "absolute".
        relative: Judge a residual by those of the images of ``fit`` at the same pixel, in their
            spreads above their mean. From 16 images on; meant for aligned parts, of which some
            places are always hard to rebuild; on textures it changes little.
        window: Side in pixels of the square over which residuals are averaged; odd.
        weighting: "plain" judges whole images, "masked" only what was cut out.
        training: How the network learns.
        holdout: Share of the images of ``fit`` that is not learned from, in (0, 1).
        false_alarm_rate: Of the threshold set by ``fit`` and ``calibrate``, in (0, 1).
        seed: Of all draws in training; equal seeds give equal models on the CPU.
        batch_size: Images per pass in scoring.
        device: Of the U-Net.

    Raises:
        ValueError: If an argument is out of range.

    Memory: images are kept in half precision while a fit runs, 6 H W bytes each.
    Source: Park et al., Visual defect obfuscation based self-supervised anomaly detection, 2023,
    arXiv:2310.04010. From there: one mask from the attention of a pre-trained transformer, the mosaic
    as hint, the unchanged U-Net, the switched skips of its first version. The area of the cut, how it
    grows, the sizes of blocks, losses (of RIAD), training, residuals and scores are choices made here.
    """

    def __init__(
        self,
        saliency: Saliency | None = None,
        *,
        image_size: int | tuple[int, int] = 256,
        excision: Excision | None = None,
        block: int | Literal["auto"] | None = None,
        width: int = 32,
        levels: int = 4,
        skips: Sequence[bool] | None = None,
        residual: ResidualName = "msgms",
        relative: bool = True,
        window: int = 21,
        weighting: Literal["plain", "masked"] = "plain",
        training: RebuildOptions | None = None,
        holdout: float = 0.1,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
        batch_size: int = 16,
        device: str | torch.device | None = None,
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for name, value, holds, expected in (
            ("image_size", image_size, len(size) == 2 and min(size) >= 16, "be at least 16 pixels"),
            (
                "block",
                block,
                block in (None, "auto", *range(1, max(size) + 1)),
                "be 'auto' or pixels",
            ),
            ("width", width, width >= 1, "be at least 1"),
            ("levels", levels, 2 <= 2**levels <= min(size) // 2, "leave 2 pixels of the sides"),
            ("skips", skips, skips is None or len(skips) == levels, f"be {levels} switches"),
            ("residual", residual, residual in RESIDUALS, f"be one of {RESIDUALS}"),
            ("window", window, window >= 1 and window % 2 == 1, "be odd and positive"),
            ("weighting", weighting, weighting in ("plain", "masked"), "be 'plain' or 'masked'"),
            ("holdout", holdout, 0 < holdout < 1, "be in (0, 1)"),
            ("false_alarm_rate", false_alarm_rate, 0 < false_alarm_rate < 1, "be in (0, 1)"),
            ("batch_size", batch_size, batch_size >= 1, "be at least 1"),
        ):
            if not holds:
                message = f"EAR: {name} must {expected}, got {value!r}"
                raise ValueError(message)
        self.saliency = EnergySaliency() if saliency is None else saliency
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.chooses_block = block == "auto"
        self.excision = Excision() if excision is None else excision
        if block is not None and block != "auto":
            self.excision = replace(self.excision, block=int(block))
        self.width, self.levels = width, levels
        self.skips = None if skips is None else tuple(bool(on) for on in skips)
        self.residual: ResidualName = residual
        self.relative, self.window = bool(relative), window
        self.weighting: Literal["plain", "masked"] = weighting
        self.training = RebuildOptions() if training is None else training
        self.holdout, self.false_alarm_rate = holdout, false_alarm_rate
        self.seed, self.batch_size = int(seed), batch_size
        self.device = torch.device(device or "cpu")
        self.network: UNet | None = None
        self.normal: NormalResiduals | None = None  # of ``fit``, if ``relative``
        self.threshold: Threshold | None = None
        self.summary = EARSummary()
        self.skipped: list[SkippedImage] = []  # of the latest fit or score

    @property
    def map_threshold(self) -> Threshold | None:
        """Of pixels: what is above is a region. The score is the highest pixel, so it is the same."""
        return self.threshold

    def fit(self, images: ImageInput, *, strict: bool = False, progress: bool = False) -> "EAR":
        """Learn to rebuild normal images; forgets what an earlier fit learned.

        The threshold is set from the held-out images, as ``calibrate`` does. A single image is
        learned from, and leaves no threshold.

        Args:
            images: Normal images; see ``pyfeat.anomaly.images.ImageStream`` for what is taken.
            strict: Raise at the first image that cannot be read instead of skipping it.
            progress: Show a bar of the steps with the remaining time (needs tqdm).

        Returns:
            The model itself.

        Raises:
            ValueError: If no image can be read, or a loss is NaN or infinite.
            ImportError: If kornia, of the extra "train", is missing for the SSIM.
        """
        summary = EARSummary()
        began = time.perf_counter()
        pixels = self._read(images, strict)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(self.seed))
        count = min(len(pixels) - 1, max(1, round(self.holdout * len(pixels))))
        held_out, train = pixels[order[:count].sort().values], pixels[order[count:].sort().values]
        summary.num_images, summary.num_held_out = len(train), len(held_out)
        read = time.perf_counter()
        self.saliency.fit(train)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = UNet(self.width, self.levels).to(self.device)
        ready = time.perf_counter()
        summary.seconds |= {"images": read - began, "saliency": ready - read}
        steps = self.training.steps
        with progress_bar(progress, op="EAR.fit", total=steps, unit="step") as update:
            summary.losses = train_to_rebuild(
                network,
                train,
                self._shown_in_training,
                self.training,
                seed=self.seed,
                after_step=lambda: update(1),
            )
        summary.seconds["training"] = time.perf_counter() - ready
        self.network, self.summary, self.threshold = network, summary, None
        if self.chooses_block and count:
            self._choose_block(network, held_out, summary)
        skipped, self.normal = self.skipped, None
        if self.relative:
            self.learn_residuals(train)
        if count:
            scores = [result.score for result in self.stream(held_out)]
            self.threshold = normal_threshold(scores, false_alarm_rate=self.false_alarm_rate)
        self.skipped = skipped
        return self

    def learn_residuals(self, images: ImageInput, *, strict: bool = False) -> None:
        """Take what is left over of normal images as what is normal; ``fit`` does so if ``relative``.

        To be called, and ``calibrate`` after it, when ``residual``, ``skips`` or ``saliency`` were
        changed. Under 16 images leave residuals to be judged as they are. Errors as ``score``.
        """
        rebuilt = self.rebuild(images, strict=strict)
        self.normal = NormalResiduals.of(
            residual_maps(image.pixels[None], image.rebuilt[None], self.residual)
            for image in rebuilt
        )

    def calibrate(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> Threshold:
        """Set the threshold from normal images that ``fit`` has not seen.

        Returns:
            The threshold, with the false-alarm rate that it guarantees for images like these; see
            ``pyfeat.anomaly.metrics.normal_threshold``.

        Raises:
            ValueError: If the model is not fitted, or no image can be read.
        """
        scores = [result.score for result in self.stream(images, strict=strict, progress=progress)]
        if not scores:
            raise ValueError(nothing_left("EAR.calibrate", self.skipped))
        self.threshold = normal_threshold(scores, false_alarm_rate=self.false_alarm_rate)
        return self.threshold

    def score(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> AnomalyScores:
        """Score images and keep all maps; ``stream`` holds one batch at a time instead.

        Equal images in equal batches have equal scores, bit by bit.

        Args:
            images: As in ``fit``.
            strict: Raise at the first image that cannot be read instead of skipping it.
            progress: Show a progress bar with the remaining time.

        Returns:
            ``scores`` (B,), ``maps`` (B, H, W) at ``image_size``, and the ``names`` of the images
            that could be read; ``skipped`` of the model names the others.

        Raises:
            ValueError: If the model is not fitted.
        """
        results = self.stream(images, strict=strict, progress=progress)
        return AnomalyScores.of(results, self.image_size)

    def stream(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> Iterator[ScoredImage]:
        """Score images one batch at a time, in order; arguments and errors as ``score``."""
        plain = self.weighting == "plain"
        for image in self.rebuild(images, strict=strict, progress=progress):
            yield ScoredImage(
                image.name,
                image.pixels,
                image.plain_score if plain else image.masked_score,
                image.plain_map if plain else image.masked_map,
                image.shape,
            )

    def rebuild(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> Iterator[RebuiltImage]:
        """Yield all that scoring makes of each image: mask, hint, rebuilt image, both scores.

        Arguments and errors as ``score``.
        """
        if self.network is None:
            message = "EAR.score: model must be fitted first, got no network"
            raise ValueError(message)
        stream = ImageStream(images, op="EAR.score", size=self.image_size, strict=strict)
        self.skipped = stream.skipped
        with progress_bar(progress, op="EAR.score", total=stream.length) as update:
            for batch, pixels in batched(stream, self.batch_size):
                masks, shown, rebuilt = self._rebuilt(self.network, pixels, self.excision)
                residual = residual_maps(pixels, rebuilt, self.residual)
                if self.normal is not None:
                    residual = self.normal(residual)
                plain, masked = (smooth(r, self.window) for r in (residual, residual * masks))
                for i, image in enumerate(batch):
                    yield RebuiltImage(
                        image.name,
                        image.shape,
                        image.pixels,
                        masks[i],
                        shown[i],
                        rebuilt[i],
                        plain[i],
                        masked[i],
                        float(plain[i].max()),
                        float(masked[i].max()),
                    )
                    update(1)
        self.skipped = stream.skipped

    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Write the model to a folder; an interrupted save leaves an older one whole.

        Weights of the backbone of the saliency are not copied: ``load`` checks that it meets the
        same ones.

        Args:
            path: Folder to write; it must not exist unless ``force`` is given.
            force: Replace a model at ``path``.

        Raises:
            FileExistsError: If ``path`` exists and may not be replaced.
            ValueError: If the model is not fitted.
        """
        if self.network is None:
            message = "EAR.save: model must be fitted first, got no network"
            raise ValueError(message)
        with replaced_folder("EAR.save", Path(path), marker=MANIFEST, force=force) as folder:
            write_files(self, folder)

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        saliency: Any = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
    ) -> "EAR":
        """Read a model that ``save`` wrote.

        Args:
            path: Folder of the model.
            saliency: The source of saliency, or the module or Backbone in it, if that is none which
                can be found by name.
            batch_size: As in the constructor.
            device: As in the constructor.

        Raises:
            FileNotFoundError: If there is no model at ``path``.
            ValueError: If the model is cut off, was written by a newer version, or the saliency has
                other weights than the one it was fitted with.
        """
        return read_files(cls, Path(path), saliency=saliency, batch_size=batch_size, device=device)

    def _read(self, images: ImageInput, strict: bool) -> Tensor:
        """All images that can be read, (N, 3, H, W) float16."""
        stream = ImageStream(images, op="EAR.fit", size=self.image_size, strict=strict)
        self.skipped = stream.skipped
        pixels = [image.pixels.half() for image in stream]
        self.skipped = stream.skipped
        if not pixels:
            raise ValueError(nothing_left("EAR.fit", self.skipped))
        return torch.stack(pixels)

    def _shown_in_training(self, images: Tensor, generator: torch.Generator) -> Tensor:
        excision = self.excision
        if self.chooses_block:
            blocks = self._blocks()
            turn = int(torch.randint(len(blocks), (), generator=generator))
            excision = replace(excision, block=blocks[turn])
        masks = excision.masks(self.saliency(images), self.image_size).to(images.device)
        return excision.shown(images, masks)

    def _blocks(self) -> list[int]:
        """Blocks to choose among: those of which two fit the image."""
        return [b for b in _BLOCKS if 2 * b <= min(self.image_size)]

    def _choose_block(self, network: UNet, held_out: Tensor, summary: EARSummary) -> None:
        """Take the largest block whose error on normal images gives the cut away least."""
        for block in self._blocks():
            inside, outside = [], []
            excision = replace(self.excision, block=block)
            for begin in range(0, len(held_out), self.batch_size):
                pixels = held_out[begin : begin + self.batch_size].float()
                masks, _, rebuilt = self._rebuilt(network, pixels, excision)
                error = (pixels - rebuilt).square().mean(dim=1)
                inside.append(error[masks])
                outside.append(error[~masks])
            errors = [float(torch.cat(part).double().mean()) for part in (inside, outside)]
            summary.block_errors[block] = errors[0] / errors[1] if errors[1] > 0 else 1.0
        fine = [b for b, ratio in summary.block_errors.items() if ratio <= 1 + _SLACK]
        self.excision = replace(self.excision, block=max(fine, default=_BLOCKS[0]))

    def _rebuilt(
        self, network: UNet, pixels: Tensor, excision: Excision
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (B, H, W), what is shown and what is made of it (B, 3, H, W), on the CPU."""
        masks = excision.masks(self.saliency(pixels), self.image_size).cpu()
        shown = excision.shown(pixels, masks)
        with torch.no_grad():
            rebuilt: Tensor = network(shown.to(self.device), self.skips).cpu()
        return masks, shown, rebuilt
