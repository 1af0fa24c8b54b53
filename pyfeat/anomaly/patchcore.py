"""PatchCore: a memory of normal patches; what is far from all of them is anomalous."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfeat._checks import check_choice
from pyfeat._extras import require
from pyfeat._storage import PathLike, replaced_folder
from pyfeat.anomaly.draw import Draw
from pyfeat.anomaly.images import ImageInput, ImageStream, NamedImage, SkippedImage, batched
from pyfeat.anomaly.metrics import Threshold, normal_threshold
from pyfeat.anomaly.model_files import MANIFEST, FitSummary, read_files, write_files
from pyfeat.anomaly.patches import patches_of_maps
from pyfeat.anomaly.scoring import SCORINGS, ScoringName
from pyfeat.features import Backbone, load_backbone
from pyfeat.memory import MemoryBank

# Images whose scores, each without its own rows in the bank, make the threshold of `fit`.
_CALIBRATION_IMAGES = 100


class AnomalyScores(NamedTuple):
    """Scores of a set of images, in their order."""

    scores: Tensor  # (B,) float32, higher is more anomalous
    maps: Tensor  # (B, H, W) float32, one value per pixel of the model's input
    names: list[str]  # (B,), the images that were scored


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """One image as it comes out of ``PatchCore.stream``."""

    name: str
    pixels: Tensor  # (3, H, W) float32 in [0, 1], at the size of the model's input
    score: float
    heat_map: Tensor  # (H, W) float32
    shape: tuple[int, int]  # height and width in pixels before it was resized


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
    Source: Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022,
    arXiv:2106.08265.
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
        _check("batch_size", batch_size >= 1, "be at least 1", batch_size)
        in_range = 0.0 < false_alarm_rate < 1.0
        _check("false_alarm_rate", in_range, "be in (0, 1)", false_alarm_rate)
        self.backbone = load_backbone(
            backbone, layers=layers, device=device, dtype=dtype, compile=compile
        )
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.neighbourhood = neighbourhood
        self.coreset_ratio = coreset_ratio
        self.candidates = candidates
        self.scoring: ScoringName = scoring
        self.false_alarm_rate = false_alarm_rate
        self.seed = seed
        self.batch_size = batch_size
        self.bank = MemoryBank()  # ids are (image, row, column) of the patch
        self.grid = (0, 0)  # patches of an image, rows and columns
        self.threshold: Threshold | None = None
        self.summary = FitSummary()
        self.skipped: list[SkippedImage] = []  # of the latest fit or score

    def fit(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> "PatchCore":
        """Learn what is normal; forgets what an earlier fit learned, unless it fails itself.

        The threshold is set from the scores of up to 100 of the images, each against a bank without
        its own patches: unseen normal images exceed it about as often as ``false_alarm_rate`` says.
        ``calibrate`` with normal images that were not learned from gives a guarantee instead.

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
        count, grid = 0, (0, 0)
        with _timed(summary, "features"):
            for batch, patches, grid in self._patches(images, "fit", strict, progress):
                ids = _patch_ids(count, len(batch), grid)
                candidates.add(patches.flatten(0, 1), ids)
                calibration.add(patches, torch.arange(count, count + len(batch)))
                count += len(batch)
        if not count:
            raise ValueError(self._nothing_left("fit"))
        with _timed(summary, "coreset"):
            features, ids = candidates.result()
            bank = MemoryBank(features, ids=ids)
            summary.radius = bank.coreset(
                ratio=self.coreset_ratio, seed=self.seed, progress=progress
            ).radius
        summary.num_images, summary.num_rows = count, len(bank)
        summary.num_patches = count * grid[0] * grid[1]
        with _timed(summary, "threshold"):
            threshold = self._leave_one_out_threshold(bank, *calibration.result())
        self.bank, self.grid, self.summary, self.threshold = bank, grid, summary, threshold
        return self

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
        self._check_fitted("calibrate")
        results = self.stream(images, strict=strict, progress=progress)
        scores = [result.score for result in results]
        if not scores:
            raise ValueError(self._nothing_left("calibrate"))
        self.threshold = normal_threshold(scores, false_alarm_rate=self.false_alarm_rate)
        return self.threshold

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
        scores: list[float] = []
        maps: list[Tensor] = []
        names: list[str] = []
        for result in self.stream(images, strict=strict, progress=progress):
            scores.append(result.score)
            maps.append(result.heat_map)
            names.append(result.name)
        stacked = torch.stack(maps) if maps else torch.empty((0, *self.image_size))
        return AnomalyScores(torch.tensor(scores), stacked, names)

    def stream(
        self, images: ImageInput, *, strict: bool = False, progress: bool = False
    ) -> Iterator[ScoredImage]:
        """Score images one batch at a time, in order; arguments and errors as ``score``."""
        self._check_fitted("score")
        scoring = SCORINGS[self.scoring]
        for batch, patches, grid in self._patches(images, "score", strict, progress):
            found = self.bank.search(patches.flatten(0, 1))
            distances = found.distances.view(len(batch), -1)  # [B, P]
            indices = found.indices.view(len(batch), -1)
            scores = scoring.image_scores(distances, indices, patches, self.bank)
            patch_scores = scoring.patch_scores(distances).view(-1, *grid)
            maps = scoring.pixel_maps(patch_scores, self.image_size)
            for image, value, heat_map in zip(batch, scores.tolist(), maps, strict=True):
                yield ScoredImage(image.name, image.pixels, value, heat_map, image.shape)

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
        with _bar(progress, verb, stream.length) as update:
            for batch, pixels in batched(stream, self.batch_size):
                patches, grid = self._embed(pixels)
                _check_patches(op, batch, patches)
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

    def _leave_one_out_threshold(
        self, bank: MemoryBank, patches: Tensor, images: Tensor
    ) -> Threshold | None:
        """Threshold from training images, each scored against the bank without its own rows.

        None for a single image: there is no other to compare it with.

        Args:
            bank: Of all training images.
            patches: (B, P, D) of the images to score.
            images: (B,) their numbers, as in the ids of the bank.
        """
        scoring = SCORINGS[self.scoring]
        scores = []
        for image, own in zip(images, patches, strict=True):
            others = bank.ids[:, 0] != image
            if others.any():
                rest = MemoryBank(bank.features[others])
                found = rest.search(own)  # [P, 1]
                score = scoring.image_scores(found.distances.T, found.indices.T, own[None], rest)
                scores.append(float(score))
        if not scores:
            return None
        return normal_threshold(scores, false_alarm_rate=self.false_alarm_rate)

    def _check_fitted(self, verb: str) -> None:
        if not len(self.bank):
            message = f"PatchCore.{verb}: model must be fitted first, got an empty memory bank"
            raise ValueError(message)

    def _nothing_left(self, verb: str) -> str:
        reasons = "".join(f"\n  {image.name}: {image.reason}" for image in self.skipped[:10])
        return (
            f"PatchCore.{verb}: images must hold at least one that can be read, "
            f"got none ({len(self.skipped)} skipped){reasons}"
        )


def _check_patches(op: str, images: Sequence[NamedImage], patches: Tensor) -> None:
    finite = torch.isfinite(patches).flatten(1).all(dim=1)
    if not finite.all():
        name = images[int(finite.int().argmin())].name
        message = f"{op}: backbone must give finite features, got NaN or infinity for {name}"
        raise ValueError(message)


def _patch_ids(first_image: int, num_images: int, grid: tuple[int, int]) -> Tensor:
    """(B h w, 3) int64: image, row and column of every patch."""
    axes = [torch.arange(first_image, first_image + num_images), *map(torch.arange, grid)]
    return torch.cartesian_prod(*axes)


@contextmanager
def _timed(summary: FitSummary, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    summary.seconds[stage] = time.perf_counter() - began


@contextmanager
def _bar(shown: bool, verb: str, total: int | None) -> Iterator[Any]:
    if not shown:
        yield lambda count: None
        return
    tqdm = require("tqdm", extra="anomaly", op=f"PatchCore.{verb}")
    with tqdm.tqdm(total=total, desc=verb, unit="img") as bar:
        yield bar.update


def _check(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        message = f"PatchCore: {name} must {expected}, got {got!r}"
        raise ValueError(message)
