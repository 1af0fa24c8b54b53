"""One run from its configuration to its last checkpoint; Lightning does the steps."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer

from pyfeat.ssl.callbacks import RunKeeper
from pyfeat.ssl.checkpoints import FolderIO, read_manifest
from pyfeat.ssl.config import OP, Config
from pyfeat.ssl.data.sampler import ResumableLoader, StepSampler
from pyfeat.ssl.data.source import Source, SourceDataset, collate
from pyfeat.ssl.objectives.base import NonFiniteLossError, Objective, Plan
from pyfeat.ssl.registry import NETWORKS, OBJECTIVES, SOURCES
from pyfeat.ssl.runs import FAILED_BATCH, Run, continue_run, start_run

_SHOWN_NAMES = 16


def fit(config: Config, *, resume: bool = False, force: bool = False) -> Run:
    """Train, and leave a run folder behind.

    The folder holds config.yaml, versions.json, metrics.csv, curves.png and checkpoints/. The first
    Ctrl-C ends the run after the step, with a checkpoint; the second ends it at once. A run that was
    interrupted and resumed has, on the CPU and with as many processes, the bits of one that was not.

    Args:
        config: What ``load_config`` or ``make_config`` returned.
        resume: Go on from the newest checkpoint of the run folder, if there is one.
        force: Replace a run that is there.

    Returns:
        The run; ``run.finished`` tells whether all steps are done.

    Raises:
        FileExistsError: If the folder is not empty, and neither ``resume`` nor ``force`` is given.
        FileNotFoundError: If data do not exist.
        ValueError: If data are empty or cannot be read, processes or batch do not suit them, the run
            that is there has another configuration or other data, or the loss is NaN or infinite
            (``NonFiniteLossError``): the step and the samples of its batch are named, and the last
            good checkpoint stays.
        ImportError: If a package of the extra ``train`` is missing.
    """
    source: Source = SOURCES.find(config.data.name).make(config.data.options)
    training = config.training
    sampler = StepSampler(
        len(source),
        training.batch_size,
        epochs=training.epochs,
        seed=training.seed,
        world_size=training.devices * training.nodes,
        weights=source.weights,
    )
    objective = make_objective(config, source)
    objective.check_data(collate([SourceDataset(source, training.seed)[0, 0]]))
    checkpoint = continue_run(config, len(source)) if resume else None
    if checkpoint is None:
        start_run(config, force=force or resume)
    steps_done = int(read_manifest(checkpoint)["step"]) if checkpoint is not None else 0
    folder = Path(config.out)
    if steps_done >= len(sampler):
        return Run(folder)
    keeper = RunKeeper(config, source, total_steps=len(sampler), steps_done=steps_done)
    with _quiet_lightning(), _stopped_after_a_step(objective), _without_traceback():
        trainer = _make_trainer(config, keeper, objective.plan)
        try:
            trainer.fit(objective, datamodule=_Data(source, config), ckpt_path=checkpoint)
        except NonFiniteLossError as error:
            raise _named(error, source, folder) from error
        except SystemExit as error:
            # What Lightning makes of the second Ctrl-C, and, after the checkpoint, of the signal
            # that ends jobs.
            if not objective.stop_agreed:
                raise KeyboardInterrupt from error
    return Run(folder)


def make_objective(config: Config, source: Source) -> Objective:
    """Make backbone and objective, with weights that follow from the seed.

    Raises:
        ValueError: If the network takes another number of channels than the data have.
    """
    training = config.training
    plan = Plan(
        optimiser=config.optimiser,
        steps_per_epoch=max(1, len(source) // training.batch_size),
        epochs=training.epochs,
        num_samples=len(source),
        batch_size=training.batch_size,
        sample_shape=source.sample_shape,
        num_images=source.num_images,
    )
    channels = getattr(config.network.options, "in_channels", None)
    if source.sample_shape and channels not in (None, source.sample_shape[0]):
        message = (
            f"{OP}: network.in_channels must be the channels of the data, "
            f"{source.sample_shape[0]}, got {channels}"
        )
        raise ValueError(message)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        backbone = NETWORKS.find(config.network.name).make(config.network.options)
        made = OBJECTIVES.find(config.objective.name).make(backbone, config.objective.options, plan)
    objective: Objective = made
    return objective


class _Data(LightningDataModule):
    """The loader of each process, made once its rank is known."""

    def __init__(self, source: Source, config: Config) -> None:
        super().__init__()
        self._source, self._training = source, config.training

    def train_dataloader(self) -> ResumableLoader:
        sampler = StepSampler(
            len(self._source),
            self._training.batch_size,
            epochs=self._training.epochs,
            seed=self._training.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            weights=self._source.weights,
        )
        seed, workers = self._training.seed, self._training.workers
        return ResumableLoader(self._source, sampler, seed=seed, workers=workers)


def _make_trainer(config: Config, keeper: RunKeeper, plan: Plan) -> Trainer:
    """The whole run is one pass of Lightning's over the batches of all epochs."""
    training = config.training
    writer = FolderIO(
        config.objective.name,
        total_steps=plan.total_steps,
        sample_shape=plan.sample_shape,
        num_samples=plan.num_samples,
    )
    return Trainer(
        accelerator=training.accelerator,
        devices=training.devices,
        num_nodes=training.nodes,
        strategy="ddp" if training.devices * training.nodes > 1 else "auto",
        precision=training.precision,
        max_steps=plan.total_steps,
        gradient_clip_val=config.optimiser.clip_norm,
        callbacks=[keeper],
        plugins=[writer],
        default_root_dir=config.out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without its hints, which are about what a configuration has decided."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_traceback() -> Iterator[None]:
    """Take from a ValueError the traceback of a reading process, which torch puts before its text."""
    try:
        yield
    except ValueError as error:
        _, found, text = str(error).rpartition("\nValueError: ")
        if not found:
            raise
        raise ValueError(text.strip()) from error


@contextmanager
def _stopped_after_a_step(objective: Objective) -> Iterator[None]:
    """Let Ctrl-C, and the signal that ends jobs, ask the run to stop after the step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if objective.stop_asked:
            raise KeyboardInterrupt
        objective.stop_asked = True
        logging.getLogger("pyfeat").warning(
            "%s: stopping after this step with a checkpoint; once more stops at once",
            signal.Signals(number).name,
        )

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(error: NonFiniteLossError, source: Source, folder: Path) -> NonFiniteLossError:
    names = [source.name(index) for index in error.indices]
    if names:
        (folder / FAILED_BATCH).write_text("\n".join(names) + "\n")
    named: Any = NonFiniteLossError(error.step, error.indices)
    shown = ", ".join(names[:_SHOWN_NAMES]) or "the batch of another process"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    newest = Run(folder).checkpoint()
    named.args = (
        f"{OP}: loss must be finite, got NaN or infinity in step {error.step} with {shown}{more}; "
        f"the last good checkpoint is {newest or 'none'}",
    )
    return named  # type: ignore[no-any-return]
