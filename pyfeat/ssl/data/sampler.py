"""Which samples each step takes: seeded, over several processes, from any step on."""

import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from pyfeat.ssl.data.source import OP, Sample, Source, SourceDataset, collate


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of a whole run, epoch after epoch.

    Every epoch has its own order, from the seed and its number alone, each sample once unless there
    are weights; what is left of it after the
    last whole batch is left out. Of each batch of ``batch_size`` samples the process takes an equal
    part: all parts together are the batch that one process alone would take.

    Args:
        num_samples: N.
        batch_size: Samples a step, over all processes together.
        epochs: Passes over the data.
        seed: Of the orders.
        rank: Of this process.
        world_size: Number of processes.
        weights: (N,), positive: of an epoch, N samples are drawn in proportion, with repetition.

    Attributes:
        start: Step that the next iteration begins with, counted from 0.
        steps_per_epoch: N // ``batch_size``.

    Raises:
        ValueError: If the samples are fewer than one batch, or the batch has no equal parts.

    Examples:
        >>> sampler = StepSampler(5, 2, epochs=2, seed=0)
        >>> [[index for _, index in batch] for batch in sampler]
        [[4, 0], [1, 3], [0, 4], [2, 3]]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        epochs: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        if num_samples < world_size:
            message = (
                f"{OP}: processes must be at most as many as samples, got {world_size} for "
                f"{num_samples}"
            )
            raise ValueError(message)
        if batch_size > num_samples:
            message = (
                f"{OP}: training.batch_size must be at most the number of samples, {num_samples}, "
                f"got {batch_size}"
            )
            raise ValueError(message)
        if batch_size % world_size:
            message = (
                f"{OP}: training.batch_size must be a multiple of the {world_size} processes, "
                f"got {batch_size}"
            )
            raise ValueError(message)
        self.start = 0
        self.steps_per_epoch = num_samples // batch_size
        self._num_samples, self._batch_size = num_samples, batch_size
        self._epochs, self._seed = epochs, seed
        self._rank, self._part = rank, batch_size // world_size
        self._weights = weights

    def __len__(self) -> int:
        """Return the steps of the whole run, those before ``start`` included."""
        return self.steps_per_epoch * self._epochs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield (epoch, index) for each sample of this process, batch by batch."""
        epoch, order = -1, [0]
        for step in range(self.start, len(self)):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            begin = step % self.steps_per_epoch * self._batch_size + self._rank * self._part
            yield [(epoch, index) for index in order[begin : begin + self._part]]

    def order(self, epoch: int) -> list[int]:
        """Return the order of all samples in an epoch."""
        # One seed for each pair, without a pair whose orders agree.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        count = self._num_samples
        if self._weights is None:
            drawn = torch.randperm(count, generator=generator)
        else:  # multinomial takes 2^24 kinds at most
            ends = self._weights.double().cumsum(0)
            places = torch.rand(count, generator=generator, dtype=torch.float64) * ends[-1]
            drawn = torch.searchsorted(ends, places, right=True).clamp_max(count - 1)
        order: list[int] = drawn.tolist()
        return order


class ResumableLoader(DataLoader[Sample]):
    """The batches of a run, whose position is that of the training and not of the readers ahead.

    Args:
        source: Samples.
        sampler: Which of them.
        seed: Of the samples.
        workers: Processes that read; 0 reads in the process that trains.

    Attributes:
        steps_done: Steps trained; who trains sets it, and a checkpoint keeps it.
    """

    def __init__(self, source: Source, sampler: StepSampler, *, seed: int, workers: int) -> None:
        super().__init__(
            SourceDataset(source, seed),
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            # Of its own, so that starting to read takes nothing from torch's global one.
            generator=torch.Generator().manual_seed(seed),
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_ignore_interrupts,
        )
        self.steps_done = 0

    def state_dict(self) -> dict[str, int]:
        """Return the position, for Lightning's checkpoints."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""
        self.steps_done = state["steps_done"]
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.start = self.steps_done


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
