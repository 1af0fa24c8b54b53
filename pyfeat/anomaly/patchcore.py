"""PatchCore: a memory of normal patches; what is far from all of them is anomalous."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._checks import check_choice
from pyfeat._storage import PathLike, replaced_folder
from pyfeat.anomaly.calibration import NormalScores, leave_one_out
from pyfeat.anomaly.draw import Draw
from pyfeat.anomaly.image_kinds import ImageKinds, find_kinds
from pyfeat.anomaly.images import (
    ImageInput,
    ImageStream,
    Item,
    NamedImage,
    SkippedImage,
    batched,
    nothing_left,
)
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.model_files import MANIFEST, FitSummary, read_files, write_files
from pyfeat.anomaly.patches import check_patches, patch_ids, patches_of_maps
from pyfeat.anomaly.progress import progress_bar
from pyfeat.anomaly.results import AnomalyScores, LearnedImage, NearestPatch, ScoredImage
from pyfeat.anomaly.scoring import SCORINGS, ScoringName
from pyfeat.features import Backbone, load_backbone
from pyfeat.memory import MemoryBank

# Images whose scores, each without its own rows in the bank, make the threshold of `fit`.
_CALIBRATION_IMAGES = 100


class PatchCore:
    """Anomaly detection from normal images alone, by nearest patches in a memory bank.

    ``fit`` cuts normal images into overlapping patches, describes each by features of two stages of
    a frozen backbone, and keeps a coreset. ``score`` measures how far every patch of an image is
    from its nearest one in the bank, exactly.

    Args:
        backbone: As ``pyfeat.features.load_backbone``: "efficientnet_lite0", "timm:<name>",
            "hf:<folder or name>", a module (with ``layers``) or a Backbone.
        layers: Stages to take maps from; None takes the backbone's default.
        image_size: Pixels (height, width), or one number for both, to which images are resized.
        neighbourhood: Side of the square, in cells of a map, over which features are averaged; odd.
        coreset_ratio: Fraction of the candidate patches that stay in the bank, in (0, 1].
        candidates: Patches, drawn evenly from all images, among which the coreset is chosen; bounds
            memory and time of a fit. None takes all.
        scoring: Published definition of the scores: "paper", "official", "anomalib", "m3dm" or
            "anomalydino"; see ``pyfeat.anomaly.scoring``.
        kinds: Kinds of images to tell apart, without labels, where several are learned together; with
            more than 1, image scores are on the scale of each kind, see ``image_kinds.ImageKinds``.
        false_alarm_rate: Of the threshold set by ``fit`` and ``calibrate``, in (0, 1).
        seed: Decides the draw of candidates and the first pick; equal seeds give equal models.
        batch_size: Images per pass through the backbone.
        device: Of the backbone; the bank is on the CPU.
        dtype: Of the backbone; None is bfloat16 where the machine multiplies it, else float32.
        compile: Pass the backbone through ``torch.compile``.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If an optional package of the backbone is missing.

    Memory: images are streamed; a fit holds at most 12 D bytes a candidate, and scoring one batch.
    Source: Roth et al., PatchCore, CVPR 2022, arXiv:2106.08265; kinds are a choice made here.
    """

    def __init__(
        self,
        backbone: str | nn.Module | Backbone = "efficientnet_lite0",
        *,
        layers: Sequence[str] | None = None,
        image_size: int | tuple[int, int] = 224,
        neighbourhood: int = 3,
        coreset_ratio: float = 0.1,
        candidates: int | None = 100_000,
        scoring: ScoringName = "paper",
        kinds: int = 1,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        check_choice("PatchCore", "scoring", scoring, SCORINGS)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        _check("image_size", len(size) == 2 and min(size) >= 1, "hold positive pixels", image_size)
        odd = neighbourhood >= 1 and neighbourhood % 2 == 1
        _check("neighbourhood", odd, "be odd and positive", neighbourhood)
        _check("coreset_ratio", 0.0 < coreset_ratio <= 1.0, "be in (0, 1]", coreset_ratio)
        _check("candidates", candidates is None or candidates >= 1, "be at least 1", candidates)
        _check("kinds", kinds >= 1, "be at least 1", kinds)
        _check("batch_size", batch_size >= 1, "be at least 1", batch_size)
        rate = false_alarm_rate
        _check("false_alarm_rate", 0.0 < rate < 1.0, "be in (0, 1)", rate)
        self.backbone = load_backbone(
            backbone, layers=layers, device=device, dtype=dtype, compile=compile
        )
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.neighbourhood, self.kinds = neighbourhood, kinds
        self.coreset_ratio, self.candidates = coreset_ratio, candidates
        self.scoring: ScoringName = scoring
        self.false_alarm_rate, self.seed, self.batch_size = false_alarm_rate, seed, batch_size
        self.bank = MemoryBank()  # ids are (image, row, column) of the patch
        self.learned: list[LearnedImage] = []  # by the first number of those ids
        self.grid = (0, 0)  # patches of an image, rows and columns
        self.scales: ImageKinds | None = None  # of image scores; None with one kind
        self.normal_scores = NormalScores()  # that the thresholds were set from
        self.threshold: Threshold | None = None  # of image scores
        self.map_threshold: Threshold | None = None  # of pixels: what is above is a region
        self.summary = FitSummary()
        self.skipped: list[SkippedImage] = []  # of the latest fit or score

    def fit(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> "PatchCore":
        """Learn what is normal; forgets what an earlier fit learned, unless it fails itself.

        The thresholds, of image scores and of pixels, are set from up to 100 of the images, each
        scored against a bank without its own patches: unseen normal images exceed either about as
        often as ``false_alarm_rate`` says. ``calibrate`` with images not learned from guarantees it.

        Args:
            images: Normal images; see ``pyfeat.anomaly.images.ImageStream`` for what is taken.
            strict: Raise at the first image that cannot be read instead of skipping it.
            progress: Show progress bars with the remaining time (needs tqdm).

        Returns:
            The model itself.

        Raises:
            ValueError: If no image can be read, or features are NaN or infinite.
        """
        summary = FitSummary()
        candidates = Draw(self.candidates, self.seed)
        calibration = Draw(_CALIBRATION_IMAGES, self.seed)
        learned: list[LearnedImage] = []
        means: list[Tensor] = []  # of the patches of each image
        grid = (0, 0)
        with summary.timed("features"):
            for batch, patches, grid in self._patches(images, "fit", strict, progress):
                count = len(learned)
                candidates.add(patches.flatten(0, 1), patch_ids(count, len(batch), grid))
                calibration.add(patches, torch.arange(count, count + len(batch)))
                means.append(patches.mean(dim=1))
                learned += [LearnedImage(image.name, image.shape) for image in batch]
        if not learned:
            raise ValueError(nothing_left("PatchCore.fit", self.skipped))
        with summary.timed("coreset"):
            features, ids = candidates.result()
            bank = MemoryBank(features, ids=ids)
            summary.radius = bank.coreset(
                ratio=self.coreset_ratio, seed=self.seed, progress=progress
            ).radius
        summary.num_images, summary.num_rows = len(learned), len(bank)
        summary.num_patches = len(learned) * grid[0] * grid[1]
        with summary.timed("threshold"):
            kinds = find_kinds(torch.cat(means), self.kinds, seed=self.seed)
            normal, scales = leave_one_out(
                SCORINGS[self.scoring],
                bank,
                *calibration.result(),
                grid=grid,
                size=self.image_size,
                kinds=kinds if self.kinds > 1 else None,
            )
        self.bank, self.learned, self.grid = bank, learned, grid
        self.summary, self.scales = summary, scales
        self._set_thresholds(normal)
        return self

    def partial_fit(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> "PatchCore":
        """Learn further normal images without another look at the earlier ones.

        The rule, image after image in their order: the image is scored, as one that the model has not
        seen; then as many of its patches join the bank as it takes to have all within
        ``summary.radius`` of a row, the farthest first (``MemoryBank.cover``). So one call with all
        images and a call for each give the same model. The thresholds are set from the scores that
        they were set from before, which a grown bank can only make too high, and the new ones.

        Nothing changes if the call fails. A model that is not fitted is fitted.

        Args:
            images: As in ``fit``.
            strict: As in ``fit``, like ``progress``.
            progress: See above.

        Returns:
            The model itself.

        Raises:
            ValueError: As ``fit``.
        """
        if not len(self.bank):
            return self.fit(images, strict=strict, progress=progress)
        radius = self.summary.radius
        summary = replace(self.summary, seconds=dict(self.summary.seconds))
        bank = MemoryBank(self.bank.features, ids=self.bank.ids)
        normal = self.normal_scores.copy()
        learned = list(self.learned)
        with summary.timed("partial_fit"):
            for batch, patches, grid in self._patches(images, "partial_fit", strict, progress):
                for image, own in zip(batch, patches, strict=True):
                    scores, maps = self._judge(own[None], bank, grid)
                    normal.add(float(scores), maps[0])
                    bank.cover(own, patch_ids(len(learned), 1, grid), radius=radius)
                    learned.append(LearnedImage(image.name, image.shape))
        if len(learned) == len(self.learned):
            raise ValueError(nothing_left("PatchCore.partial_fit", self.skipped))
        summary.num_images, summary.num_rows = len(learned), len(bank)
        summary.num_patches = len(learned) * self.grid[0] * self.grid[1]
        self.bank, self.learned, self.summary = bank, learned, summary
        self._set_thresholds(normal)
        return self

    def calibrate(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> Threshold:
        """Set the thresholds from normal images that ``fit`` has not seen.

        Returns:
            That of image scores, with the false-alarm rate that it guarantees for images like these; see
            ``pyfeat.anomaly.metrics.normal_threshold``.

        Raises:
            ValueError: If the model is not fitted, or no image can be read.
        """
        self._check_fitted("calibrate")
        normal = NormalScores()
        for result in self.stream(images, strict=strict, progress=progress):
            normal.add(result.score, result.heat_map)
        threshold = self._set_thresholds(normal)
        if threshold is None:
            raise ValueError(nothing_left("PatchCore.calibrate", self.skipped))
        return threshold

    def score(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> AnomalyScores:
        """Score images and keep all maps; ``stream`` holds one batch at a time instead.

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
        self._check_fitted("score")
        for batch, patches, grid in self._patches(images, "score", strict, progress):
            scores, maps = self._judge(patches, self.bank, grid)
            for image, value, heat_map in zip(batch, scores.tolist(), maps, strict=True):
                yield ScoredImage(image.name, image.pixels, value, heat_map, image.shape)

    def nearest_patch(self, image: Item, row: int, column: int) -> NearestPatch:
        """Find the normal patch in memory that the patch at a pixel is closest to.

        Args:
            image: One image, of any kind that a list of images may hold.
            row: Of the pixel, in the image before it is resized.
            column: See above.

        Returns:
            The training image by name and the patch in it, how far apart the features are, and the
            patch asked about. Boxes are cells of the grid of patches; features see some way beyond.

        Raises:
            ValueError: If the model is not fitted, the image cannot be read, or the pixel is outside it.
        """
        self._check_fitted("nearest_patch")
        [(batch, patches, grid)] = self._patches([image], "nearest_patch", True, False)
        shape = batch[0].shape
        inside = 0 <= row < shape[0] and 0 <= column < shape[1]
        _check("row and column", inside, f"be a pixel of {shape[0]} x {shape[1]}", (row, column))
        return NearestPatch.found(self.bank, self.learned, patches[0], grid, shape, (row, column))

    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Write the model to a folder; an interrupted save leaves an older one whole.

        The weights of the backbone are not copied: ``load`` checks that it meets the same ones.

        Args:
            path: Folder to write; it must not exist unless ``force`` is given.
            force: Replace a model at ``path``.

        Raises:
            FileExistsError: If ``path`` exists and may not be replaced.
            ValueError: If the model is not fitted.
        """
        self._check_fitted("save")
        with replaced_folder("PatchCore.save", Path(path), marker=MANIFEST, force=force) as folder:
            self.write_into(folder)

    def write_into(self, folder: Path) -> None:
        """Write the files of a model into a folder that the caller is filling."""
        write_files(self, folder)

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        backbone: nn.Module | Backbone | None = None,
        batch_size: int = 16,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> "PatchCore":
        """Read a model that ``save`` wrote.

        Args:
            path: Folder of the model.
            backbone: The network, if the model was fitted with a module or a Backbone of your own.
            batch_size: As in the constructor, like the arguments that follow.
            device: See above.
            dtype: See above.
            compile: See above.

        Raises:
            FileNotFoundError: If there is no model at ``path``.
            ValueError: If the model is cut off, was written by a newer version, or the backbone has
                other weights than the one it was fitted with.
        """
        return read_files(
            cls,
            Path(path),
            backbone=backbone,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
        )

    def _patches(
        self, images: ImageInput, verb: str, strict: bool, progress: bool
    ) -> Iterator[tuple[list[NamedImage], Tensor, tuple[int, int]]]:
        """Yield images, their patches (B, P, D) and the grid (h, w), P = h w."""
        op = f"PatchCore.{verb}"
        stream = ImageStream(images, op=op, size=self.image_size, strict=strict)
        self.skipped = stream.skipped
        with progress_bar(progress, op=op, total=stream.length) as update:
            for batch, pixels in batched(stream, self.batch_size):
                patches, grid = self._embed(pixels)
                check_patches(op, [image.name for image in batch], patches)
                self.skipped = stream.skipped
                yield batch, patches, grid
                update(len(batch))
        self.skipped = stream.skipped

    def _embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch features (B, P, D) of images, and their grid."""
        patches, grid = patches_of_maps(self.backbone(pixels), self.neighbourhood)
        if SCORINGS[self.scoring].unit_length:
            patches = functional.normalize(patches, dim=-1)
        return patches, grid

    def _judge(
        self, patches: Tensor, bank: MemoryBank, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Scores (B,), on the scale of their kinds, and maps of images by patches (B, P, D)."""
        scores, maps = SCORINGS[self.scoring].judge(patches, bank, grid, self.image_size)
        if self.scales is not None:
            scores = self.scales.relative(scores, patches.mean(dim=1))
        return scores, maps

    def _set_thresholds(self, normal: NormalScores) -> Threshold | None:
        self.normal_scores = normal
        self.threshold, self.map_threshold = normal.thresholds(self.false_alarm_rate)
        return self.threshold

    def _check_fitted(self, verb: str) -> None:
        if not len(self.bank):
            message = f"PatchCore.{verb}: model must be fitted first, got an empty memory bank"
            raise ValueError(message)


def _check(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        message = f"PatchCore: {name} must {expected}, got {got!r}"
        raise ValueError(message)
