"""The training of adaptors: features on disk in, adaptors and their memories out."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pyfeat.anomaly.adaptors import Adaptation, Adaptor, alignment, compactness, means_of, spread_of
from pyfeat.anomaly.class_memories import ClassMemories
from pyfeat.anomaly.patches import Moments
from pyfeat.anomaly.sample_features import SampleBatch

_BETAS = (0.9, 0.95)


class PatchStore:
    """Patches of all samples of a set, in temporary files: training reads them again and again.

    Memory: what the operating system keeps of the files; these have 4 N C bytes a sample and modality.
    """

    def __init__(self) -> None:
        self.categories: list[str] = []  # (n,), of the samples
        self.grid = (0, 0)
        self._valid: list[Tensor] = []  # (N,) bool
        self._files: dict[str, tempfile._TemporaryFileWrapper[bytes]] = {}
        self._dims: dict[str, int] = {}
        self._maps: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def modalities(self) -> list[str]:
        """Names, in the order in which features came."""
        return list(self._dims)

    def dim(self, modality: str) -> int:
        """Features of a patch."""
        return self._dims[modality]

    def add(self, batch: SampleBatch) -> None:
        """Append the samples of a batch."""
        self.grid = batch.grid
        for modality, rows in batch.features.items():
            if modality not in self._files:
                self._files[modality] = tempfile.NamedTemporaryFile(prefix="pyfeat-")  # noqa: SIM115
                self._dims[modality] = rows.shape[2]
            self._files[modality].write(rows.contiguous().numpy().tobytes())
        self.categories += [sample.category for sample in batch.samples]
        self._valid += list(batch.valid)

    def patches(self, modality: str, samples: Sequence[int] | Tensor) -> Tensor:
        """(b, N, C) float32 of the samples with these numbers."""
        if modality not in self._maps:
            file = self._files[modality]
            file.flush()
            shape = (len(self), len(self._valid[0]), self._dims[modality])
            self._maps[modality] = torch.from_numpy(np.memmap(file.name, np.float32, "c", 0, shape))
        return self._maps[modality][torch.as_tensor(samples)]

    def valid(self, samples: Sequence[int] | Tensor) -> Tensor:
        """(b, N) bool."""
        return torch.stack([self._valid[int(i)] for i in samples])

    def batches(self, size: int, category: str | None = None) -> Iterator[Tensor]:
        """Numbers (b,) of the samples of a class, or of all, in order."""
        known = enumerate(self.categories)
        numbers = torch.tensor([i for i, name in known if category in (None, name)])
        for first in range(0, len(numbers), size):
            yield numbers[first : first + size]

    def centre_and_scale(self, modality: str) -> tuple[Tensor, float]:
        """Mean (C,) of the features of valid patches, and their root mean square less that."""
        moments = Moments(self._dims[modality])
        for numbers in self.batches(16):
            moments.add(self.patches(modality, numbers)[self.valid(numbers)])
        return moments.centre(), moments.spread()

    def close(self) -> None:
        """Delete the files."""
        self._maps.clear()
        for file in self._files.values():
            file.close()


class AdaptorSet(nn.Module):
    """An adaptor for each modality, and the centre and scale of the features that it takes.

    Features are centred one by one, as distances do not see it but the norm of an adaptor does: else it
    would pass on what all patches have in common, and little of what tells them apart.

    Args:
        scales: Centre (C,) and scale of the features, by modality.
        heads: As ``Adaptation``.
    """

    def __init__(self, scales: Mapping[str, tuple[Tensor, float]], heads: int) -> None:
        super().__init__()
        self.dims = {m: len(centre) for m, (centre, _) in scales.items()}
        self.adaptors = nn.ModuleDict({m: Adaptor(dim, heads) for m, dim in self.dims.items()})
        for m, (centre, scale) in scales.items():
            self.register_buffer(f"centre_{m}", centre)
            self.register_buffer(f"scale_{m}", torch.tensor(scale))

    def forward(self, modality: str, patches: Tensor) -> Tensor:
        """Scale and adapt patches (B, N, C)."""
        adapted: Tensor = self.adaptors[modality](self.scaled(modality, patches))
        return adapted

    def scaled(self, modality: str, patches: Tensor) -> Tensor:
        """What the adaptor of a modality takes of patches (B, N, C)."""
        centred = patches - self.get_buffer(f"centre_{modality}")
        return centred / self.get_buffer(f"scale_{modality}")


class AdaptationRun:
    """One run over a store; ``train`` does it.

    Args:
        store: Features of normal samples.
        adaptors: Are trained in place.
        options: How.
        memories: Of an earlier run, local and global by modality, to go on with; None: none.
        first_sample: Number of the first sample of the store among all ever seen.
        seed: Of the order of samples and the heads.
    """

    def __init__(
        self,
        store: PatchStore,
        adaptors: AdaptorSet,
        options: Adaptation,
        *,
        memories: Mapping[str, ClassMemories] | None = None,
        first_sample: int = 0,
        seed: int = 0,
    ) -> None:
        self.store, self.adaptors, self.options = store, adaptors, options
        self.first_sample = first_sample
        self.memories = dict(memories or self._fresh_memories())
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict(
                {m: nn.Linear(store.dim(m), options.projection) for m in store.modalities}
            )
        self.losses: list[dict[str, float]] = []  # of every step, by name
        self._steps_of_pass = -(-len(store) // options.batch_size)
        start = options.start_step
        self.start_step = self._steps_of_pass if start is None else start

    def train(self, update: Callable[[int], object] = lambda count: None) -> None:
        """Take all steps; ``update`` is called with the samples of each."""
        options, store = self.options, self.store
        parameters = [*self.adaptors.parameters(), *self.heads.parameters()]
        optimiser = torch.optim.AdamW(
            parameters, options.learning_rate, betas=_BETAS, weight_decay=options.weight_decay
        )
        steps = options.epochs * self._steps_of_pass
        rise = max(1, round(options.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda step: min(
                (step + 1) / rise,
                0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)),
            ),
        )
        self.adaptors.train()
        for _ in range(options.epochs):
            order = torch.randperm(len(store), generator=self._generator)
            for first in range(0, len(order), options.batch_size):
                numbers = order[first : first + options.batch_size]
                optimiser.zero_grad()
                adapted = self._step(numbers)
                optimiser.step()
                schedule.step()
                self._remember(numbers, adapted)
                update(len(numbers))
        self.adaptors.eval()

    def _step(self, numbers: Tensor) -> dict[str, Tensor]:
        """Gradients of the loss of samples (B,); their adapted patches (B, N, C), detached."""
        valid = self.store.valid(numbers)
        taken = {
            m: self.adaptors.scaled(m, self.store.patches(m, numbers))
            for m in self.store.modalities
        }
        adapted = {m: self.adaptors.adaptors[m](patches) for m, patches in taken.items()}
        losses = self._losses(numbers, taken, adapted, valid)
        total = torch.stack(list(losses.values())).sum()
        if total.requires_grad:
            torch.autograd.backward(total)
        self.losses.append({name: float(loss.detach()) for name, loss in losses.items()})
        return {m: patches.detach() for m, patches in adapted.items()}

    def _losses(
        self,
        numbers: Tensor,
        taken: Mapping[str, Tensor],
        adapted: Mapping[str, Tensor],
        valid: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted parts of the loss, by name, of what adaptors take and make of it."""
        options = self.options
        means = {m: means_of(patches, valid) for m, patches in adapted.items()}
        parts = {"none": torch.zeros(())}
        if len(adapted) == 2:
            first, second = adapted
            for name, weight, features, counted in (
                ("local alignment", options.local_alignment, adapted, valid),
                (
                    "global alignment",
                    options.global_alignment,
                    {m: mean[None] for m, mean in means.items()},
                    valid.any(dim=1)[None],
                ),
            ):
                if weight:
                    parts[name] = weight * alignment(
                        self.heads[first](features[first]),
                        self.heads[second](features[second]),
                        counted,
                        temperature=options.temperature,
                        negatives=options.negatives if name == "local alignment" else "batch",
                    )
        if options.compactness and len(self.losses) >= self.start_step:
            for m, patches in adapted.items():
                share = torch.tensor(options.compactness)
                if options.relative:
                    share = share * spread_of(taken[m], valid) / spread_of(patches, valid)
                parts[f"compactness {m}"] = share * self._distance(m, numbers, patches, valid)
                if options.global_compactness:
                    share = share * options.global_compactness
                    parts[f"global compactness {m}"] = share * self._distance(
                        f"{m} means", numbers, means[m][:, None], valid.any(1, keepdim=True)
                    )
        return parts

    def _distance(self, name: str, numbers: Tensor, patches: Tensor, valid: Tensor) -> Tensor:
        memories = self.memories[name]
        held = []
        for number in numbers.tolist():
            category = self.store.categories[number]
            ready = memories.fill(category) >= self.options.start_fill
            held.append((memories.rows(category), memories.samples(category)) if ready else None)
        bound = self.options.max_distance * patches.shape[-1] ** 0.5
        return compactness(patches, valid, numbers + self.first_sample, held, bound)

    def _remember(self, numbers: Tensor, adapted: Mapping[str, Tensor]) -> None:
        """Put adapted patches and their means in, after the gradients are known."""
        if not self.options.compactness:
            return
        valid = self.store.valid(numbers)
        for m, patches in adapted.items():
            means = means_of(patches, valid)
            for place, number in enumerate(numbers.tolist()):
                category, sample = self.store.categories[number], number + self.first_sample
                self.memories[m].enqueue(category, patches[place], sample=sample, mask=valid[place])
                self.memories[f"{m} means"].enqueue(
                    category, means[place : place + 1], sample=sample
                )

    def _fresh_memories(self) -> dict[str, ClassMemories]:
        """Rings of which each has room for one pass over the smallest class at most.

        So all can fill, and a row is at most one pass old where the capacity allows it.
        """
        patches: dict[str, int] = {}
        samples: dict[str, int] = {}
        for number, category in enumerate(self.store.categories):
            count = int(self.store.valid([number]).sum())
            patches[category] = patches.get(category, 0) + count
            samples[category] = samples.get(category, 0) + 1
        rows = min(self.options.capacity, *patches.values())
        means = min(self.options.global_capacity, *samples.values())
        fresh = {}
        for m in self.store.modalities:
            fresh[m] = ClassMemories(rows, self.store.dim(m))
            fresh[f"{m} means"] = ClassMemories(means, self.store.dim(m))
        return fresh
