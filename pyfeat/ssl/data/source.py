"""What every source of samples is, and the data set that reads it."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

OP = "pyfeat train"
Sample = dict[str, Any]


class Source(abc.ABC):
    """Samples by index, read one at a time.

    A subclass is entered with ``SOURCES.register(name, Options)`` and is made by ``make(options)``.
    It must be picklable, since every process that reads data has a copy.

    Attributes:
        sample_shape: Of one image or volume, (C, H, W) or (C, D, H, W); empty if there is none.
        labels: (N,) int64, -1 where a sample has none; None if no sample has one. Nothing is trained
            on them but objectives that say so; probes are.
        num_images: Images beside volumes, of which some come with each sample.
        weights: (N,) float64, positive: how often samples are drawn, against each other; None: each
            once an epoch.
    """

    sample_shape: tuple[int, ...] = ()
    num_images: int = 0
    weights: Tensor | None = None
    labels: Tensor | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return N."""

    @abc.abstractmethod
    def read(self, index: int, generator: torch.Generator) -> Sample:
        """Return one sample.

        Args:
            index: 0 <= index < N.
            generator: The only source of random numbers; its state follows from seed, epoch and
                index, so that a sample does not depend on who reads it, or after what.

        Raises:
            ValueError: If it cannot be read; names it.
        """

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Return what a person calls a sample, such as its path."""


class SourceDataset(Dataset[Sample]):
    """The samples of a source by (epoch, index), with ``index`` and ``labels`` added."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)  # a seed has 63 bits
        sample = self.source.read(index, generator)
        sample["index"] = torch.tensor(index)
        if self.source.labels is not None:
            sample["labels"] = self.source.labels[index]
        return sample


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join samples: tensors are stacked, all else becomes lists.

    Raises:
        ValueError: If tensors differ in shape; names the shapes.

    Examples:
        >>> collate(
        ...     [{"index": torch.tensor(3), "texts": "a"}, {"index": torch.tensor(5), "texts": "b"}]
        ... )
        {'index': tensor([3, 5]), 'texts': ['a', 'b']}
    """
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, Tensor):
            shapes = sorted({tuple(value.shape) for value in values})
            if len(shapes) > 1:
                message = f"{OP}: {key} must have one shape in all samples, got {shapes}"
                raise ValueError(message)
            batch[key] = torch.stack(values)
        else:
            batch[key] = values
    return batch


def label_codes(values: Sequence[str | None]) -> Tensor:
    """Return (N,) int64 codes of label texts in their order; -1 for None.

    Examples:
        >>> label_codes(["good", None, "bad"])
        tensor([ 1, -1,  0])
    """
    names = {name: code for code, name in enumerate(sorted({v for v in values if v is not None}))}
    return torch.tensor([-1 if value is None else names[value] for value in values])
