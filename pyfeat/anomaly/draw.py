"""An even draw from a stream of unknown length."""

import numpy as np
import torch
from torch import Tensor


class Draw:
    """An even draw without replacement from a stream of unknown length, in the stream's order.

    Every item gets a random key and those with the smallest keys stay.

    Args:
        count: Items to keep; None keeps all.
        seed: Equal seeds and streams give equal draws.

    Memory: at most twice the items kept, and the latest ones added.
    """

    def __init__(self, count: int | None, seed: int) -> None:
        self._count = count
        self._random = np.random.default_rng(seed)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # features, ids, keys
        self._held = 0

    def add(self, features: Tensor, ids: Tensor) -> None:
        """Offer items (n, ...) with their ids (n, ...)."""
        keys = torch.from_numpy(self._random.random(len(features)))
        self._parts.append((features, ids, keys))
        self._held += len(features)
        if self._count is not None and self._held > 2 * self._count:
            self._prune()

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the items drawn and their ids; at least one must have been added."""
        self._prune()
        features, ids, _ = self._parts[0]
        return features, ids

    def _prune(self) -> None:
        features, ids, keys = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if self._count is not None and len(keys) > self._count:
            keep = keys.argsort()[: self._count].sort().values
            features, ids, keys = features[keep], ids[keep], keys[keep]
        self._parts, self._held = [(features, ids, keys)], len(keys)
