"""A small network, a loss with a parameter, and the plain step that the cached one is compared with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pyfeat.losses import info_nce


class Encoder(nn.Module):
    """A small network with all that makes a step hard to repeat."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), *layers, nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.body(x), dim=-1)


def dropout() -> Encoder:
    return Encoder(nn.Dropout(0.3), nn.GELU(), nn.Dropout(0.1)).double()


class Temperature(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return info_nce(queries, keys, temperature=self.temperature, backend="reference")


def plain_step(
    encoders: list[Any], inputs: list[Tensor], loss: Callable[..., Any], chunk_sizes: list[int]
) -> Tensor:
    features = [
        torch.cat([encoder(chunk) for chunk in torch.split(x, size)])
        for encoder, x, size in zip(encoders, inputs, chunk_sizes, strict=True)
    ]
    value: Tensor = loss(*features)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def views(rows: int = 11) -> list[Tensor]:
    return [torch.randn(rows, 6, dtype=torch.float64) for _ in range(2)]


class Recorder(Encoder):
    """Counts calls, the most rows with gradients, and reductions of gradients."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.3))
        self.calls: list[tuple[int, bool]] = []
        self.reduces = True
        self.reductions: list[bool] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        if torch.is_grad_enabled():
            self.reductions.append(self.reduces)
        return super().forward(x)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.reduces = False
        yield
        self.reduces = True
