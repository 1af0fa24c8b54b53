"""Judges of losses and gradients: ours may be off by what rounding explains, of peers it is said."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.answers import GradientCheck
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.turns import Entrant
from benchmarks.timing import Work, WrongAnswerError
from pyfeat._backends import Backend

# Allowed errors of each element by dtype, relative to the largest of its tensor.
SLACK = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class GradientJudge:
    """Of everybody who returns what ``exact`` does.

    Args:
        exact: Returns a result and gradients in float64.
        dtype: Of the features that the contenders are given.
    """

    def __init__(self, exact: Callable[[], Sequence[Tensor]], dtype: torch.dtype) -> None:
        self._slack = SLACK[dtype]
        self._check = GradientCheck(exact, self._slack)

    def ours(self, name: str, answer: object) -> str:
        """Refuses an answer that is not right."""
        self._check(name, answer)
        return ""

    def peer(self, answer: object) -> str:
        """Says how far off an answer is that is not right."""
        error = self._check.error(answer)
        if math.isnan(error):
            message = "its result or gradients are not numbers"
            raise WrongAnswerError(message)
        return "" if error <= self._slack else f"off by {error:.1e} of the largest element"

    def entrants(
        self,
        setting: Setting,
        ours: Callable[[Backend], Callable[[], object]],
        peers: dict[str, Callable[[], Callable[[], object]]],
        work: Work,
    ) -> list[Entrant]:
        """Our backends, then the peers.

        Args:
            setting: Says which backends.
            ours: Prepares a backend.
            peers: Each prepares a peer, or raises ``MissingError``.
            work: Of everybody.
        """

        def prepare(backend: Backend) -> Callable[[], object]:
            setting.need(backend)
            return ours(backend)

        names = {backend: f"pyfeat, {backend}" for backend in setting.backends}
        entrants = [
            Entrant(name, partial(prepare, backend), partial(self.ours, name), True, work)
            for backend, name in names.items()
        ]
        return entrants + [
            Entrant(name, made, self.peer, work=work) for name, made in peers.items()
        ]
