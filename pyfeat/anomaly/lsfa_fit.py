"""The stages of a fit of LSFA, on features that are at hand."""

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat.anomaly.adaptation import AdaptationRun, AdaptorSet, PatchStore
from pyfeat.anomaly.adaptors import Adaptation
from pyfeat.anomaly.category_banks import BankOptions, CategoryBanks
from pyfeat.anomaly.class_memories import ClassMemories
from pyfeat.anomaly.fusion import ScoreFusion
from pyfeat.anomaly.progress import progress_bar

_BATCH = 8  # samples that are adapted at a time


class Earlier(NamedTuple):
    """What an earlier fit left behind."""

    adaptors: AdaptorSet | None
    memories: Mapping[str, ClassMemories]
    num_seen: int  # samples


@torch.no_grad()
def pass_on(adaptors: AdaptorSet | None, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features (B, N, C) by modality, adapted; as they are where there are no adaptors."""
    if adaptors is None:
        return dict(features)
    return {m: adaptors(m, rows) for m, rows in features.items()}


def train_adaptors(
    store: PatchStore,
    options: Adaptation,
    earlier: Earlier | None,
    seed: int,
    *,
    progress: bool,
) -> AdaptationRun:
    """Train adaptors on a store, from the start or from where an earlier fit came to.

    What the earlier fit left stays as it is.

    Raises:
        ValueError: If it was on features of other dimensions.
    """
    dims = {m: store.dim(m) for m in store.modalities}
    if earlier is not None and earlier.adaptors is not None:
        if earlier.adaptors.dims != dims:
            message = f"LSFA.fit: features must have dims {earlier.adaptors.dims}, got {dims}"
            raise ValueError(message)
        adaptors = copy.deepcopy(earlier.adaptors)
        memories = copy.deepcopy(dict(earlier.memories))
    else:
        scales = {m: store.centre_and_scale(m) for m in dims}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adaptors = AdaptorSet(scales, options.heads)
        memories = {}
    first_sample = earlier.num_seen if earlier else 0
    run = AdaptationRun(
        store, adaptors, options, memories=memories, first_sample=first_sample, seed=seed
    )
    total = options.epochs * len(store)
    with progress_bar(progress, op="LSFA.fit", total=total, unit="sample", label="adapt") as update:
        run.train(update)
    return run


def learn_banks(
    store: PatchStore,
    adaptors: AdaptorSet | None,
    fusion: ScoreFusion,
    options: BankOptions,
    *,
    progress: bool,
) -> dict[str, CategoryBanks]:
    """Banks of every class in a store; ``fusion`` is not fitted itself, each class has a copy."""
    banks = {}
    for category in dict.fromkeys(store.categories):

        def read(of: str = category) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
            for some in store.batches(_BATCH, of):
                features = {m: store.patches(m, some) for m in store.modalities}
                yield pass_on(adaptors, features), store.valid(some)

        banks[category] = CategoryBanks.learn(
            read, copy.deepcopy(fusion), options, progress=progress
        )
    return banks
