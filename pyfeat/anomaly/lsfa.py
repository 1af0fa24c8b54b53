"""LSFA: colours and points, adapted to normal samples, then compared with memories of them."""

import time
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

from torch import Tensor

from pyfeat._checks import check_choice
from pyfeat._storage import PathLike, replaced_folder
from pyfeat.anomaly.adaptation import AdaptorSet, PatchStore
from pyfeat.anomaly.adaptors import Adaptation
from pyfeat.anomaly.calibration import NormalScores
from pyfeat.anomaly.category_banks import BankOptions, CategoryBanks
from pyfeat.anomaly.class_memories import ClassMemories
from pyfeat.anomaly.extractors import EXTRACTORS, BackbonePatches, PatchExtractor
from pyfeat.anomaly.fusion import FusionKind, ScoreFusion
from pyfeat.anomaly.images import SkippedImage
from pyfeat.anomaly.lsfa_fit import Earlier, learn_banks, pass_on, train_adaptors
from pyfeat.anomaly.metrics import Threshold
from pyfeat.anomaly.progress import progress_bar
from pyfeat.anomaly.results import AnomalyScores, ScoredImage
from pyfeat.anomaly.sample_features import SampleBatch, SampleFeatures, Samples, resized
from pyfeat.anomaly.samples import Sample
from pyfeat.anomaly.scoring import SCORINGS, ScoringName


class LSFA:
    """Anomaly detection in colour and 3-D, with features that are adapted to normal samples.

    Frozen features of both modalities pass through one small transformer block each. ``fit`` trains
    these on normal samples alone: patches of the two modalities at one place are brought to agree
    (alignment), and every patch is drawn to the nearest one of other samples of its class (compactness).
    Then it keeps a coreset of adapted patches for each class and modality. ``score`` measures how far
    patches of a sample are from their nearest ones, exactly, and fuses what the banks say.

    Args:
        rgb: Features of colours: an extractor, the name of a backbone as ``load_backbone`` takes it, or
            None to leave colours out.
        xyz: Features of points: an extractor, "fpfh" for ``GeometryPatches()``, "normals" for
            ``NormalPatches()`` (slower, and better on the plates of ``synthesise``: image AUROC 0.97
            against 0.89), or None.
        adaptation: How features are adapted; None compares them as they are: PatchCore on each modality.
        image_size: Pixels (height, width), or one number for both, to which samples are resized.
        coreset_ratio: Fraction of the candidate patches that stay in a bank, in (0, 1].
        candidates: Patches of a class, drawn evenly, among which the coreset is chosen; None takes all.
        projection: Dimensions to which features are projected at random for the choice; None: as they
            are.
        scoring: Of every bank; see ``pyfeat.anomaly.scoring``. Those on vectors of unit length are not
            taken.
        fusion: "weighted", "mean" or "one_class_svm"; see ``ScoreFusion``.
        weights: Of colours and points in the fusion; None: 1 each.
        false_alarm_rate: Of the thresholds that ``fit`` and ``calibrate`` set, in (0, 1).
        seed: Decides the training, the draw and the first pick; equal seeds give equal models.
        batch_size: Samples per pass through extractors.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: If an optional package of a backbone is missing.

    Memory: features of a fit lie in temporary files, 4 N C bytes a sample and modality.
    Source: Tu et al., Self-supervised Feature Adaptation for 3D Industrial Anomaly Detection, ECCV 2024,
    arXiv:2401.03145; where it differs from the published code, ``Adaptation`` says so.
    """

    def __init__(
        self,
        rgb: str | PatchExtractor | None = "efficientnet_lite0",
        xyz: str | PatchExtractor | None = "fpfh",
        *,
        adaptation: Adaptation | None = Adaptation(),  # noqa: B008  # frozen
        image_size: int | tuple[int, int] = 224,
        coreset_ratio: float = 0.1,
        candidates: int | None = 100_000,
        projection: int | None = None,
        scoring: ScoringName = "m3dm",
        fusion: FusionKind = "weighted",
        weights: Sequence[float] | None = None,
        false_alarm_rate: float = 0.05,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        lengths = [name for name in SCORINGS if not SCORINGS[name].unit_length]
        check_choice("LSFA", "scoring", scoring, lengths)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        _check("image_size", len(size) == 2 and min(size) >= 1, "hold positive pixels", image_size)
        _check("coreset_ratio", 0.0 < coreset_ratio <= 1.0, "be in (0, 1]", coreset_ratio)
        _check("candidates", candidates is None or candidates >= 1, "be at least 1", candidates)
        _check("batch_size", batch_size >= 1, "be at least 1", batch_size)
        _check("false_alarm_rate", 0 < false_alarm_rate < 1, "be in (0, 1)", false_alarm_rate)
        if isinstance(xyz, str):
            check_choice("LSFA", "xyz", xyz, ("fpfh", "normals"))
            xyz = EXTRACTORS[xyz]()
        chosen = {
            "rgb": BackbonePatches(rgb) if isinstance(rgb, str) else rgb,
            "xyz": xyz,
        }
        self.extractors: dict[str, PatchExtractor] = {
            name: extractor for name, extractor in chosen.items() if extractor is not None
        }
        _check("rgb", bool(self.extractors), "be given where xyz is None", rgb)
        count = len(self.extractors)
        _check("weights", weights is None or len(weights) == count, f"hold {count}", weights)
        ScoreFusion(fusion, weights=weights)  # refuses what cannot be fused
        self.adaptation = adaptation
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.coreset_ratio, self.candidates, self.projection = coreset_ratio, candidates, projection
        self.scoring: ScoringName = scoring
        self.fusion: FusionKind = fusion
        self.weights = None if weights is None else tuple(weights)
        self.false_alarm_rate, self.seed, self.batch_size = false_alarm_rate, seed, batch_size
        self.adaptors: AdaptorSet | None = None
        self.memories: dict[str, ClassMemories] = {}  # of the training, by modality
        self.num_seen = 0  # samples learned from, over all fits that went on
        self.banks: dict[str, CategoryBanks] = {}
        self.grid = (0, 0)
        self.losses: list[dict[str, float]] = []  # of every step of the latest fit
        self.seconds: dict[str, float] = {}  # of the latest fit, by stage
        self.skipped: list[SkippedImage] = []  # of the latest fit or score

    @property
    def categories(self) -> list[str]:
        """Classes that were learned."""
        return list(self.banks)

    @property
    def threshold(self) -> Threshold | None:
        """Of the only class; None where there are several, see ``banks``, or a single sample."""
        return self._of_only_class("threshold")

    @property
    def map_threshold(self) -> Threshold | None:
        """Of pixels: what is above is a region, of which normal samples have none, as it promises.

        None where there are several classes, see ``banks``, or a single sample.
        """
        return self._of_only_class("map_threshold")

    def fit(
        self,
        samples: Samples,
        *,
        resume: bool = False,
        strict: bool = False,
        progress: bool = False,
    ) -> "LSFA":
        """Learn what is normal; forgets what an earlier fit learned, unless it fails or is interrupted.

        Fusion and thresholds of a class are set from the scores of up to 100 of its samples, each against
        banks without its own patches. The adaptors have seen these samples; ``calibrate`` with others
        gives a guarantee.

        Args:
            samples: Normal ones, records or loaded: all of one class or of several.
            resume: Go on with the adaptors and memories of an earlier fit or a loaded model.
            strict: Raise at the first sample that cannot be used instead of skipping it.
            progress: Show progress bars with the remaining time (needs tqdm).

        Returns:
            The model itself.

        Raises:
            ValueError: If no sample can be used, features are NaN or infinite, the extractors give
                different numbers of patches, or there is nothing to resume.
        """
        op = "LSFA.fit"
        if resume and self.adaptors is None:
            message = f"{op}: resume must be False before the first fit, got True"
            raise ValueError(message)
        seconds: dict[str, float] = {}
        store = PatchStore()
        try:
            began = time.perf_counter()
            for batch in self._features(samples, "fit", strict, progress):
                store.add(batch)
            if not len(store):
                raise ValueError(self._nothing_left("fit"))
            seconds["features"] = time.perf_counter() - began
            began = time.perf_counter()
            run = None
            if self.adaptation is not None:
                earlier = Earlier(self.adaptors, self.memories, self.num_seen) if resume else None
                run = train_adaptors(store, self.adaptation, earlier, self.seed, progress=progress)
            adaptors = run.adaptors if run else None
            seconds["adaptation"] = time.perf_counter() - began
            began = time.perf_counter()
            options = BankOptions(
                SCORINGS[self.scoring],
                self.coreset_ratio,
                self.candidates,
                self.projection,
                self.false_alarm_rate,
                self.seed,
                store.grid,
                self.image_size,
            )
            fusion = ScoreFusion(self.fusion, weights=self.weights, seed=self.seed)
            banks = learn_banks(store, adaptors, fusion, options, progress=progress)
            seconds["banks"] = time.perf_counter() - began
        finally:
            store.close()
        self.adaptors, self.banks, self.grid, self.seconds = adaptors, banks, store.grid, seconds
        self.memories, self.losses = (run.memories, run.losses) if run else ({}, [])
        self.num_seen = (self.num_seen if resume else 0) + len(store)
        return self

    def calibrate(
        self, samples: Samples, *, strict: bool = False, progress: bool = False
    ) -> dict[str, Threshold]:
        """Set the thresholds from normal samples that ``fit`` has not seen.

        Returns:
            Of each class of which there was a sample, with the false-alarm rate that it guarantees; see
            ``pyfeat.anomaly.metrics.normal_threshold``.

        Raises:
            ValueError: If the model is not fitted, or no sample can be used.
        """
        normal: dict[str, NormalScores] = {}
        scoring = SCORINGS[self.scoring]
        for sample, score, patches in self._scored(samples, "calibrate", strict, progress):
            heat_map = scoring.pixel_maps(patches.view(1, *self.grid), self.image_size)
            normal.setdefault(sample.category, NormalScores()).add(score, heat_map)
        if not normal:
            raise ValueError(self._nothing_left("calibrate"))
        found: dict[str, Threshold] = {}
        for category, scores in normal.items():
            banks = self.banks[category]
            banks.threshold, banks.map_threshold = scores.thresholds(self.false_alarm_rate)
            if banks.threshold is not None:
                found[category] = banks.threshold
        return found

    def score(
        self, samples: Samples, *, strict: bool = False, progress: bool = False
    ) -> AnomalyScores:
        """Score samples and keep all maps; ``stream`` holds one batch at a time instead.

        Args:
            samples: Records or loaded, of classes that were learned.
            strict: Raise at the first sample that cannot be used instead of skipping it.
            progress: Show a progress bar with the remaining time.

        Returns:
            ``scores`` (B,), ``maps`` (B, H, W) at ``image_size``, and the ``names`` of the samples that
            could be used; ``skipped`` of the model names the others.

        Raises:
            ValueError: If the model is not fitted.
        """
        results = self.stream(samples, strict=strict, progress=progress)
        return AnomalyScores.of(results, self.image_size)

    def stream(
        self, samples: Samples, *, strict: bool = False, progress: bool = False
    ) -> Iterator[ScoredImage]:
        """Score samples one batch at a time, in order; arguments and errors as ``score``."""
        scoring = SCORINGS[self.scoring]
        for sample, score, patches in self._scored(samples, "score", strict, progress):
            heat_map = scoring.pixel_maps(patches.view(1, *self.grid), self.image_size)[0]
            size = (sample.rgb.shape[1], sample.rgb.shape[2])
            pixels = resized(sample.rgb[None], self.image_size)[0]
            yield ScoredImage(sample.name, pixels, score, heat_map, size)

    def adapted(self, samples: Samples) -> Iterator[tuple[Sample, dict[str, Tensor], Tensor]]:
        """Yield every usable sample, features (N, C) by modality as banks hold them, and valid (N,).

        Raises:
            ValueError: If the model is not fitted.
        """
        self._check_fitted("adapted")
        for batch in self._features(samples, "adapted", False, False):
            features = pass_on(self.adaptors, batch.features)
            for place, sample in enumerate(batch.samples):
                banks = self._banks_of("adapted", sample)
                rows = {m: banks.scaled(m, of_batch[place]) for m, of_batch in features.items()}
                yield sample, rows, batch.valid[place]

    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Write the model to a folder; an interrupted save leaves an older one whole.

        Weights of extractors are not copied: ``load`` checks that it meets the same ones.

        Args:
            path: Folder to write; it must not exist unless ``force`` is given.
            force: Replace a model at ``path``.

        Raises:
            FileExistsError: If ``path`` exists and may not be replaced.
            ValueError: If the model is not fitted.
        """
        from pyfeat.anomaly.lsfa_files import MANIFEST

        self._check_fitted("save")
        with replaced_folder("LSFA.save", Path(path), marker=MANIFEST, force=force) as folder:
            self.write_into(folder)

    def write_into(self, folder: Path) -> None:
        """Write the files of a model into a folder that the caller is filling."""
        from pyfeat.anomaly.lsfa_files import write_files

        write_files(self, folder)

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        rgb: PatchExtractor | None = None,
        xyz: PatchExtractor | None = None,
        batch_size: int = 8,
    ) -> "LSFA":
        """Read a model that ``save`` wrote.

        Args:
            path: Folder of the model.
            rgb: The extractor, if the model was fitted with one of your own.
            xyz: Likewise.
            batch_size: As in the constructor.

        Raises:
            FileNotFoundError: If there is no model at ``path``.
            ValueError: If the model is cut off or damaged, was written by a newer version, or an
                extractor gives other features than the one it was fitted with.
        """
        from pyfeat.anomaly.lsfa_files import read_files

        given = {"rgb": rgb, "xyz": xyz}
        return read_files(cls, Path(path), given=given, batch_size=batch_size)

    def _features(
        self, samples: Samples, verb: str, strict: bool, progress: bool
    ) -> Iterator[SampleBatch]:
        op = f"LSFA.{verb}"
        read = SampleFeatures(
            self.extractors, self.image_size, self.batch_size, op=op, strict=strict
        )
        self.skipped = read.skipped
        total = len(samples) if isinstance(samples, Sized) else None
        with progress_bar(progress, op=op, total=total, unit="sample") as update:
            for batch in read(samples):
                yield batch
                update(len(batch.samples))

    def _scored(
        self, samples: Samples, verb: str, strict: bool, progress: bool
    ) -> Iterator[tuple[Sample, float, Tensor]]:
        """Yield samples, their fused scores, and those of their patches (N,)."""
        self._check_fitted(verb)
        scoring = SCORINGS[self.scoring]
        for batch in self._features(samples, verb, strict, progress):
            if batch.grid != self.grid:
                message = f"LSFA.{verb}: grid must be {self.grid} as fitted, got {batch.grid}"
                raise ValueError(message)
            features = pass_on(self.adaptors, batch.features)
            for place, sample in enumerate(batch.samples):
                part = slice(place, place + 1)
                own = {m: rows[part] for m, rows in features.items()}
                banks = self._banks_of(verb, sample)
                _, fused, patches = banks.score(own, batch.valid[part], scoring)
                yield sample, float(fused), patches[0]

    def _of_only_class(self, name: str) -> Threshold | None:
        if len(self.banks) != 1:
            return None
        (banks,) = self.banks.values()
        threshold: Threshold | None = getattr(banks, name)
        return threshold

    def _banks_of(self, verb: str, sample: Sample) -> CategoryBanks:
        if sample.category not in self.banks:
            message = (
                f"LSFA.{verb}: samples must be of the classes learned, {self.categories}, got "
                f"{sample.category!r} of {sample.name!r}"
            )
            raise ValueError(message)
        return self.banks[sample.category]

    def _check_fitted(self, verb: str) -> None:
        if not self.banks:
            message = f"LSFA.{verb}: model must be fitted first, got no banks"
            raise ValueError(message)

    def _nothing_left(self, verb: str) -> str:
        reasons = "".join(f"\n  {each.name}: {each.reason}" for each in self.skipped[:10])
        return (
            f"LSFA.{verb}: samples must hold at least one that can be used, got none "
            f"({len(self.skipped)} skipped){reasons}"
        )


def _check(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        message = f"LSFA: {name} must {expected}, got {got!r}"
        raise ValueError(message)
