"""Values that change from step to step: learning rate, weight decay, momentum, temperature."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A linear rise, then half a cosine.

    From ``first`` the value goes in ``warmup`` steps straight to ``start``, from there by half a
    cosine to ``end``, which it has in the step ``total - 1`` and after.

    Args:
        start: Value after the rise.
        end: Last value; None: ``start``, a constant.
        total: Steps in all, >= 1.
        warmup: Steps of the rise, 0 <= warmup <= total.
        first: Value of step 0 if there is a rise.

    Raises:
        ValueError: If the numbers of steps are out of range, or a value is not finite.

    Examples:
        >>> rate = Schedule(1.0, 0.0, total=5, warmup=2)
        >>> [round(rate(step), 2) for step in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    start: float
    end: float | None = None
    total: int = 1
    warmup: int = 0
    first: float = 0.0

    def __post_init__(self) -> None:
        if self.total < 1:
            message = f"Schedule: total must be at least 1, got {self.total}"
            raise ValueError(message)
        if not 0 <= self.warmup <= self.total:
            message = f"Schedule: warmup must be in [0, total = {self.total}], got {self.warmup}"
            raise ValueError(message)
        for name in ("start", "end", "first"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                message = f"Schedule: {name} must be finite, got {value}"
                raise ValueError(message)

    def __call__(self, step: int) -> float:
        """The value in step ``step``, counted from 0."""
        if step < self.warmup:
            return self.first + (self.start - self.first) * step / self.warmup
        end = self.start if self.end is None else self.end
        length = self.total - 1 - self.warmup
        share = min(1.0, (step - self.warmup) / length) if length > 0 else 1.0
        if length <= 0 and step < self.total:
            share = 0.0
        return end + (self.start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
