"""Losses over all pairs on a GPU, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.eager_losses import Batch, eager_clip, eager_siglip, eager_supcon
from benchmarks.gpu.judges import GradientJudge
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.turns import Entrant, import_peer
from benchmarks.timing import Work
from pyfeat._backends import Backend
from pyfeat.losses import clip_loss, siglip_loss, supcon_loss

# Rows whose similarities exist at a time.
CHUNK_ROWS = 2_048

# Of both features and the numbers, of which the first is the scale.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Family:
    """One loss: ours, what is exact in float64, and the peers."""

    ours: Callable[[Backend], Loss]
    exact: Loss
    peers: Mapping[str, Callable[[], Loss]]  # each raises MissingError if it is not here
    numbers: tuple[float, ...]
    similarities: int = 1  # rows for each pair, of which all pairs count


def loss_entrants(
    setting: Setting, family: Family, batch: Batch, dtype: torch.dtype, *, compiles: bool = False
) -> list[Entrant]:
    """Our backends and the peers, or with ``compiles`` the peer "eager", compiled, instead of all."""
    a, b = (x.to(setting.device, dtype) for x in batch.features())
    step = partial(_step, a=a, b=b, numbers=family.numbers)
    exact = _step(family.exact, a=a.double(), b=b.double(), numbers=family.numbers)
    operations = 6.0 * (family.similarities * batch.num_pairs) ** 2 * batch.dim
    peers: dict[str, Callable[[], Callable[[], object]]]
    if compiles:
        peers = {"eager, compiled": lambda: step(setting.compiled(family.peers["eager"]()))}
    else:
        peers = {
            name: lambda make=make: step(make())  # type: ignore[misc]
            for name, make in family.peers.items()
        }
    return GradientJudge(exact, dtype).entrants(
        setting,
        lambda backend: step(family.ours(backend)),
        peers,
        Work(operations, "bf16" if dtype == torch.bfloat16 else "float32"),
    )


def clip_family() -> Family:
    """Symmetric, with a learnable scale of 20."""
    peers: dict[str, Callable[[], Loss]] = {
        "eager": lambda: eager_clip,
        "eager, in chunks": lambda: chunked_clip,
    }
    return Family(lambda backend: partial(clip_loss, backend=backend), chunked_clip, peers, (20.0,))


def siglip_family() -> Family:
    """With a learnable scale and bias, 10 and -10."""

    def siglip_kernel() -> Loss:
        loss = import_peer("siglip_kernel").fused_siglip_loss
        return lambda a, b, scale, bias: loss(a, b, scale.log(), bias)

    peers: dict[str, Callable[[], Loss]] = {
        "eager": lambda: eager_siglip,
        "siglip-kernel": siglip_kernel,
    }
    return Family(
        lambda backend: partial(siglip_loss, backend=backend), eager_siglip, peers, (10.0, -10.0)
    )


def supcon_family() -> Family:
    """Of both views at temperature 0.1, eight rows of each label."""

    def labels_of(features: Tensor) -> Tensor:
        pairs = len(features) // 2
        return (torch.arange(pairs, device=features.device) % max(1, pairs // 4)).repeat(2)

    def ours(backend: Backend) -> Loss:
        def loss(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            both = torch.cat([a, b])
            return supcon_loss(both, labels_of(both), temperature=1.0 / scale, backend=backend)

        return loss

    def eager(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        both = torch.cat([a, b])
        return eager_supcon(both, labels_of(both), scale)

    return Family(ours, eager, {"eager": lambda: eager}, (10.0,), similarities=2)


def chunked_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Some rows of the logits at a time, computed again in the backward pass."""
    own = logit_scale * (image * text).sum(dim=1)

    def one_side(rows: Tensor, columns: Tensor) -> Tensor:
        parts = [
            checkpoint(_row_lse, part, columns, logit_scale, use_reentrant=False)
            for part in torch.split(rows, CHUNK_ROWS)
        ]
        return torch.cat(parts)

    both = one_side(image, text) + one_side(text, image)
    return both.mean() / 2 - own.to(both.dtype).mean()


def _row_lse(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """In float32 for features of 16 bits, as autocast has it."""
    logits = scale * rows @ columns.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(dim=1)


def _step(
    loss: Loss, *, a: Tensor, b: Tensor, numbers: tuple[float, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients by both features and the numbers."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    scalars = [torch.tensor(number, dtype=dtype, device=a.device) for number in numbers]

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (a, b, *scalars)]
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return run
