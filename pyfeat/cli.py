"""The command line: ``pyfeat demo``, ``fit``, ``score``, ``evaluate``, ``train``, ``export`` and ``info``."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyfeat import _C
from pyfeat._extras import require
from pyfeat._info import info as installation
from pyfeat._storage import check_replaceable, replaced_folder
from pyfeat.anomaly.images import SkippedImage

if TYPE_CHECKING:
    from pyfeat.anomaly.samples import Dataset, Split

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Feature matching that is exact, fast and installs everywhere.",
)

Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail on a file that cannot be read instead of skipping it."),
]
AsDataset = Annotated[
    bool,
    typer.Option(
        "--dataset",
        help="IMAGES is a data set in the layout of MVTec AD, VisA, MVTec 3D-AD or Eyecandies.",
    ),
]
Categories = Annotated[
    list[str] | None,
    typer.Option("--category", help="Of the data set; repeat for several. All if left out."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run wrote.")]


class Cells(str, Enum):
    """Types of solar cell."""

    mono = "mono"
    poly = "poly"
    all = "all"


class ScoringChoice(str, Enum):
    """Published definitions of the scores."""

    paper = "paper"
    official = "official"
    anomalib = "anomalib"
    m3dm = "m3dm"
    anomalydino = "anomalydino"


class Library(str, Enum):
    """Libraries that a backbone is handed over to."""

    timm = "timm"
    transformers = "transformers"


@app.command()
def demo(
    cells: Annotated[Cells, typer.Option(help="Type of solar cell.")] = Cells.mono,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo"),
    force: Force = False,
) -> None:
    """Learn from good solar cells, rank unseen ones, write a page with heat maps."""
    with _plain_errors():
        from pyfeat.anomaly.demo import run_demo

        metrics = run_demo(cells.value, out, force=force)
        _say(
            f"{cells.value} cells: image AUROC {metrics['image_auroc']:.3f}, "
            f"average precision {metrics['average_precision']:.3f}, "
            f"{metrics['num_train']} images learned, {metrics['num_test']} ranked\n"
            f"open {out / 'index.html'}"
        )


@app.command()
def fit(
    images: Annotated[Path, typer.Argument(help="Folder of normal images, or one image.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the model to write.")],
    backbone: Annotated[
        str, typer.Option(help="efficientnet_lite0, timm:NAME, hf:FOLDER_OR_NAME or run:FOLDER.")
    ] = "efficientnet_lite0",
    layer: Annotated[
        list[str] | None, typer.Option(help="Stage to take features from; repeat for several.")
    ] = None,
    image_size: Annotated[
        tuple[int, int], typer.Option(help="Height and width in pixels of the model's input.")
    ] = (224, 224),
    coreset_ratio: Annotated[
        float, typer.Option(help="Fraction of the candidate patches to keep.")
    ] = 0.1,
    candidates: Annotated[
        int, typer.Option(help="Patches among which the coreset is chosen.")
    ] = 100_000,
    scoring: Annotated[
        ScoringChoice, typer.Option(help="Published definition of the scores.")
    ] = ScoringChoice.paper,
    neighbourhood: Annotated[
        int, typer.Option(help="Side of the square of cells over which features are averaged; odd.")
    ] = 3,
    kinds: Annotated[
        int, typer.Option(help="Kinds of images that are learned together, found without labels.")
    ] = 1,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Of the threshold, for unseen normal images.")
    ] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Images per pass through the backbone.")] = 16,
    device: Annotated[str, typer.Option(help="Device of the backbone.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal models.")] = 0,
    dataset: AsDataset = False,
    category: Categories = None,
    strict: Strict = False,
    force: Force = False,
) -> None:
    """Learn what is normal from a folder of images, or from the training images of a data set."""
    with _plain_errors():
        from pyfeat.anomaly import PatchCore
        from pyfeat.anomaly.model_files import MANIFEST

        check_replaceable("pyfeat fit", out, marker=MANIFEST, force=force)
        model = PatchCore(
            backbone,
            layers=layer or None,
            image_size=image_size,
            coreset_ratio=coreset_ratio,
            candidates=candidates,
            neighbourhood=neighbourhood,
            scoring=scoring.value,
            kinds=kinds,
            false_alarm_rate=false_alarm_rate,
            seed=seed,
            batch_size=batch_size,
            device=device,
        )
        source = _records(images, category, "train") if dataset else images
        model.fit(source, strict=strict, progress=True)
        model.save(out, force=force)
        _say_skipped(model.skipped)
        summary = model.summary
        _say(
            f"learned {summary.num_images} images: {summary.num_rows} of {summary.num_patches} "
            f"patches kept\nwrote {out}"
        )


@app.command()
def score(
    model: Annotated[Path, typer.Argument(help="Folder that 'pyfeat fit' wrote.")],
    images: Annotated[Path, typer.Argument(help="Folder of images, or one image.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report to write.")],
    batch_size: Annotated[int, typer.Option(help="Images per pass through the backbone.")] = 16,
    device: Annotated[str, typer.Option(help="Device of the backbone.")] = "cpu",
    dataset: AsDataset = False,
    category: Categories = None,
    strict: Strict = False,
    force: Force = False,
) -> None:
    """Rank images by how anomalous they are: a page with heat maps, and CSV tables.

    Of a data set, its test images, with heights and masks where there are any. LSFA takes no other.
    """
    with _plain_errors():
        from pyfeat.anomaly.evaluation import RANKING, write_ranking
        from pyfeat.anomaly.models import load_model

        check_replaceable("pyfeat score", out, marker=RANKING, force=force)
        loaded = load_model(model, batch_size=batch_size, device=device)
        source = _records(images, category, "test") if dataset else images
        count = write_ranking(loaded, source, out, strict=strict, force=force)
        _say_skipped(loaded.skipped)
        _say(f"ranked {count} images\nopen {out / 'index.html'}")


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Folder of a model, or one with a model for each category.")
    ],
    dataset: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the table as Markdown and CSV.")
    ] = None,
    category: Categories = None,
    batch_size: Annotated[int, typer.Option(help="Images per pass through the backbone.")] = 16,
    device: Annotated[str, typer.Option(help="Device of the backbone.")] = "cpu",
    strict: Strict = False,
    force: Force = False,
) -> None:
    """Say how good a model is on the test images of a data set: AUROC, AUPRO, F1 by category."""
    with _plain_errors():
        from pyfeat.anomaly import tables
        from pyfeat.anomaly.models import load_models

        op = "pyfeat evaluate"
        if out is not None:
            check_replaceable(op, out, marker=tables.TABLE, force=force)
        records = _records(dataset, category, "test")
        models = load_models(model, records.categories, batch_size=batch_size, device=device)
        table = tables.evaluate(models, records, strict=strict, progress=True)
        _say_skipped(table.skipped)
        _say(table.markdown())
        if out is not None:
            with replaced_folder(op, out, marker=tables.TABLE, force=force) as folder:
                table.write(folder)
            _say(f"wrote {out}")


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys that win over the file: training.epochs=5.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run folder.")
    ] = False,
    help_config: Annotated[
        bool, typer.Option("--help-config", help="Say what every key of a configuration means.")
    ] = False,
    force: Force = False,
) -> None:
    """Train a backbone on images, volumes or captions, without labels."""
    with _plain_errors():
        require("lightning", extra="train", op="pyfeat train")
        from pyfeat.ssl.config import help_text, load_config

        if help_config:
            _say(help_text())
            return
        if config is None:
            message = "pyfeat train: CONFIG must be given, got nothing; see --help-config"
            raise ValueError(message)
        from pyfeat.ssl.training import fit as run_training

        run = run_training(load_config(config, overrides or ()), resume=resume, force=force)
        if not run.finished:
            typer.echo(f"stopped after step {run.steps_done}; go on with --resume", err=True)
            raise typer.Exit(130)
        latest = {name: value for _, _, name, value in run.metrics()}
        for name in ("loss", "probe/knn", "probe/linear", "collapse/effective_rank"):
            if name in latest:
                _say(f"{name} {latest[name]:.4g}")
        _say(f"trained {run.steps_done} steps\nwrote {run.folder}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder that 'pyfeat train' wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    format: Annotated[
        Library, typer.Option(help="Library that is to load the folder.")
    ] = Library.transformers,
    force: Force = False,
) -> None:
    """Hand a trained backbone over to timm or transformers."""
    with _plain_errors():
        from pyfeat import ssl

        ssl.export(run, format=format.value).save(out, force=force)
        _say(f"wrote {out}")


@app.command()
def info() -> None:
    """Say what this installation has, and why the rest is missing."""
    _say(json.dumps(installation(), indent=2))


def _version(shown: bool) -> None:
    if shown:
        _say(_C.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say what is wrong in a line instead of a traceback; Ctrl-C ends quietly."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None


def _records(folder: Path, categories: Sequence[str] | None, split: "Split") -> "Dataset":
    """Samples of a data set for one purpose."""
    from pyfeat.anomaly.readers import read_dataset

    records = read_dataset(folder, categories=categories or None).select(split=split)
    if not len(records):
        message = f"pyfeat: the data set must hold {split} images, got none in {str(folder)!r}"
        raise ValueError(message)
    return records


def _say(text: str) -> None:
    typer.echo(text)


def _say_skipped(skipped: Sequence[SkippedImage]) -> None:
    if skipped:
        typer.echo(f"skipped {len(skipped)} files:", err=True)
    for image in skipped[:10]:
        typer.echo(f"  {image.name}: {image.reason}", err=True)
