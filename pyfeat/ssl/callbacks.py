"""What happens around the steps of a run: figures, looks, checkpoints, and the stop."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from pyfeat._extras import require
from pyfeat.ssl.checkpoints import (
    checkpoint_path,
    checkpoints_of,
    random_state,
    set_random_state,
)
from pyfeat.ssl.config import OP, Config
from pyfeat.ssl.data.source import Source
from pyfeat.ssl.metrics import MetricsFile
from pyfeat.ssl.objectives.base import Objective
from pyfeat.ssl.watch import Watcher

_LOG = logging.getLogger("pyfeat")


class RunKeeper(Callback):
    """Keeps the run folder up to date.

    After a step, in this order: ``after_step`` of the objective, figures, a look if one is due, a
    checkpoint if one is due. So a checkpoint holds what a run that goes on from it starts with.

    Args:
        config: Of the run.
        source: Of its samples.
        total_steps: Of the run.
        steps_done: By the run before, from which this one goes on.
    """

    def __init__(
        self, config: Config, source: Source, *, total_steps: int, steps_done: int
    ) -> None:
        self._config, self._source = config, source
        self._folder = Path(config.out)
        self._total, self._start = total_steps, steps_done
        self._steps_per_epoch = total_steps // config.training.epochs
        self._random: list[dict[str, Any]] | None = None
        self._watcher: Watcher | None = None
        self._metrics: MetricsFile | None = None
        self._bar: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of all processes, for the checkpoint."""
        return {"random": random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the random states of a checkpoint; they are set when the steps begin."""
        self._random = state["random"]

    def on_train_start(self, trainer: Trainer, module: Objective) -> None:
        """Set random states, and open figures and the bar on the first process."""
        training = self._config.training
        torch.manual_seed(training.seed + 7919 * trainer.global_rank)
        if self._random is not None:
            set_random_state(self._random)
        if trainer.is_global_zero:
            self._metrics = MetricsFile(self._folder, until=self._start)
            if self._config.watch.every:
                self._watcher = Watcher(
                    self._source,
                    self._config.watch,
                    seed=training.seed,
                    batch_size=min(256, training.batch_size),
                )
            tqdm = require("tqdm", extra="train", op=OP).tqdm
            self._bar = tqdm(
                total=self._total,
                initial=self._start,
                unit="step",
                desc="training",
                disable=None if training.progress else True,
            )

    def on_train_batch_start(
        self, trainer: Trainer, module: Objective, batch: Any, batch_index: int
    ) -> None:
        """Tell the objective of an epoch that begins."""
        epoch, step = divmod(trainer.global_step, self._steps_per_epoch)
        if step == 0:
            module.start_epoch(epoch)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: Objective,
        outputs: Mapping[str, torch.Tensor],
        batch: Any,
        batch_index: int,
    ) -> None:
        """Do all that is due after a step."""
        module.after_step()
        step = trainer.global_step
        for loader in trainer.fit_loop._combined_loader.flattened:
            loader.steps_done = step
        epoch, rest = divmod(step, self._steps_per_epoch)
        finished, stopped = step == self._total, module.stop_agreed
        if self._metrics is not None:
            self._note(step, module, outputs)
        every = self._config.watch.every
        if finished or (every and rest == 0 and epoch % every == 0):
            self._look(step, module, last=finished)
        due = rest == 0 and epoch % self._config.training.checkpoint_every == 0
        if due or finished or stopped:
            self._save(trainer, step)
        if stopped:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, module: Objective) -> None:
        """Write figures and close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, module: Objective, exception: BaseException) -> None:
        """Write figures and close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.write()
            self._metrics.draw()

    def _note(self, step: int, module: Objective, outputs: Mapping[str, torch.Tensor]) -> None:
        self._bar.update(1)
        if step % self._config.training.log_every and step != self._total:
            return
        self._bar.set_postfix_str(f"loss {module.mean_loss:.4g}", refresh=False)
        values = {"loss": module.mean_loss}
        for name, value in outputs.items():
            if name != "loss" and value.numel() == 1:
                values[f"loss/{name}"] = float(value)
        values["lr"] = float(module.optimizers().param_groups[0]["lr"])
        self._add(step, values)

    def _look(self, step: int, module: Objective, *, last: bool) -> None:
        if self._watcher is not None:
            figures = self._watcher.look(module, last=last)
            self._add(step, figures)
            if self._metrics is not None:
                self._metrics.draw()
            for alarm in self._watcher.alarms(figures):
                _LOG.warning("step %d: %s", step, alarm)
        if dist.is_initialized():
            dist.barrier()

    def _save(self, trainer: Trainer, step: int) -> None:
        trainer.save_checkpoint(checkpoint_path(self._folder, step))
        if self._metrics is not None:
            for old in checkpoints_of(self._folder)[: -self._config.training.keep]:
                trainer.strategy.remove_checkpoint(old)
            self._metrics.write()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.add(step, step / self._steps_per_epoch, values)
