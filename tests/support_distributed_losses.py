"""Losses on every rank of a few processes, and the same losses of one process."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeat._ranks import Schedule
from pyfeat.losses import clip_loss, info_nce, nt_xent, siglip_loss, supcon_loss
from pyfeat.losses._group import Reduce

DIM = 10
UPSTREAM = 3.0  # what losses are multiplied with before backward
ROWS = {2: (9, 4), 4: (5, 0, 1, 7)}
EXTRA = {2: (3, 0), 4: (0, 6, 0, 2)}


class Batch(NamedTuple):
    """Of one rank, or of all together."""

    a: Tensor
    b: Tensor
    extra: Tensor
    temperature: Tensor
    ids: tuple[Tensor, Tensor, Tensor]  # of all of the above
    log_probabilities: tuple[Tensor, Tensor]  # of b and extra
    targets: Tensor
    weights: Tensor  # of own b
    single_ids: tuple[
        Tensor, Tensor
    ]  # of a and b: equal but for one pair of the first and last row


def whole_batch(world_size: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(3)
    num_rows, num_extra = sum(ROWS[world_size]), sum(EXTRA[world_size])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b, extra = (nn.functional.normalize(draw(n, DIM)) for n in (num_rows, num_rows, num_extra))
    counts = torch.tensor(ROWS[world_size])
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    blocks = [draw(n, n).abs() for n in ROWS[world_size]]
    weights = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    weights[0] = 0.0
    # Of several positives of a row or column, only the last rank knows.
    single = torch.cat([torch.arange(num_rows - 1), torch.zeros(1, dtype=torch.int64)])
    return Batch(
        a.to(dtype),
        b.to(dtype),
        extra.to(dtype),
        torch.tensor(0.3, dtype=torch.float64),
        (torch.arange(num_rows) % 5, torch.arange(num_rows) % 4, torch.arange(num_extra) % 3),
        (draw(num_rows), draw(num_extra)),
        first + torch.arange(num_rows) % counts.repeat_interleave(counts) // 2,
        weights,
        (single, torch.cat([torch.tensor([num_rows]), single[1:]])),
    )


def batch_of(whole: Batch, world_size: int, rank: int) -> Batch:
    start = sum(ROWS[world_size][:rank])
    rows = slice(start, start + ROWS[world_size][rank])
    first = sum(EXTRA[world_size][:rank])
    extra = slice(first, first + EXTRA[world_size][rank])
    return Batch(
        whole.a[rows],
        whole.b[rows],
        whole.extra[extra],
        whole.temperature,
        (whole.ids[0][rows], whole.ids[1][rows], whole.ids[2][extra]),
        (whole.log_probabilities[0][rows], whole.log_probabilities[1][extra]),
        whole.targets[rows] - start,
        whole.weights[rows, rows],
        (whole.single_ids[0][rows], whole.single_ids[1][rows]),
    )


Loss = Callable[..., Any]


def _clip(x: Batch, **options: Any) -> Any:
    return clip_loss(x.a, x.b, 1.0 / x.temperature, **options)


def _captions(x: Batch, **options: Any) -> Any:
    return _clip(x, image_ids=x.ids[0], text_ids=x.ids[1], **options)


def _few_captions(x: Batch, **options: Any) -> Any:
    return _clip(x, image_ids=x.single_ids[0], text_ids=x.single_ids[1], **options)


def _info_nce(x: Batch, **options: Any) -> Any:
    return info_nce(x.a, x.b, temperature=x.temperature, **options)


def _extra(x: Batch, **options: Any) -> Any:
    return _info_nce(
        x,
        extra_keys=x.extra,
        query_ids=x.ids[0],
        key_ids=torch.cat(x.ids[1:]),
        key_log_probabilities=torch.cat(x.log_probabilities),
        **options,
    )


def _positive_ids(x: Batch, **options: Any) -> Any:
    ids = {"query_ids": x.ids[0], "key_ids": x.ids[1]}
    return _info_nce(x, same_ids="positive", symmetric=True, **ids, **options)


def _ignored_ids(x: Batch, **options: Any) -> Any:
    return _info_nce(x, query_ids=x.ids[0], key_ids=x.ids[1], **options)


def _supcon(x: Batch, **options: Any) -> Any:
    return supcon_loss(x.a, x.ids[0] * (x.ids[1] + 1), temperature=x.temperature, **options)


def _siglip(x: Batch, **options: Any) -> Any:
    return siglip_loss(x.a, x.b, 1.0 / x.temperature, 2.0 * x.temperature - 3.0, **options)


def _siglip_captions(x: Batch, **options: Any) -> Any:
    return _siglip(x, image_ids=x.ids[0], text_ids=x.ids[1], **options)


def _nt_xent(x: Batch, **options: Any) -> Any:
    return nt_xent(x.a, x.b, temperature=x.temperature, **options)


HARD: dict[str, Any] = {"hard_negative_beta": 0.5, "positive_prior": 0.1}
LOSSES: dict[str, Loss] = {
    "clip": _clip,
    "captions": _captions,
    "few captions": _few_captions,
    "symmetric": functools.partial(_info_nce, symmetric=True),
    "normalized": functools.partial(_info_nce, normalize=True),
    "targets": lambda x, **options: _info_nce(x, targets=x.targets, **options),
    "extra keys": _extra,
    "ignored ids": _ignored_ids,
    "positive ids": _positive_ids,
    "spread": lambda x, **options: _info_nce(x, targets=x.weights, symmetric=True, **options),
    "hard": functools.partial(_ignored_ids, **HARD),
    "supcon": _supcon,
    "supcon inside": functools.partial(_supcon, average="in"),
    "sigmoid": _siglip,
    "sigmoid captions": _siglip_captions,
    "views": _nt_xent,
    "hard views": functools.partial(_nt_xent, **HARD),
}
METRICS = ("clip", "captions", "extra keys", "hard", "supcon", "supcon inside", "views")
# Losses, how they are reduced, how their gradients are, schedules and dtypes.
VARIANTS: list[tuple[str, str, Reduce, Schedule | None, torch.dtype]] = [
    *((name, "mean", "ddp_mean", "ring", torch.float64) for name in LOSSES),
    *((name, "mean", "sum", "gather", torch.float64) for name in LOSSES),
    *((name, "sum", "ddp_mean", None, torch.float64) for name in ("clip", "supcon")),
    *(
        (name, "none", "ddp_mean", None, torch.float64)
        for name in ("clip", "extra keys", "sigmoid")
    ),
    *((name, "mean", "ddp_mean", "ring", torch.float32) for name in ("clip", "supcon", "views")),
]


def with_gradients(loss: Loss, batch: Batch, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of a multiple of its sum by features and temperature."""
    leaves = [x.clone().requires_grad_() for x in batch[:4]]
    a, b, extra, temperature = leaves
    value = loss(batch._replace(a=a, b=b, extra=extra, temperature=temperature), **options)
    gradients = torch.autograd.grad(UPSTREAM * value.sum(), leaves, materialize_grads=True)
    return [value.detach(), *gradients]


def loss_on_ranks(
    group: dist.ProcessGroup, variant: tuple[str, str, Reduce, Schedule | None, torch.dtype]
) -> list[Tensor]:
    name, reduction, reduce, schedule, dtype = variant
    world_size = dist.get_world_size(group)
    batch = batch_of(whole_batch(world_size, dtype), world_size, dist.get_rank(group))
    return with_gradients(
        LOSSES[name],
        batch,
        reduction=reduction,
        group=group,
        reduce=reduce,
        schedule=schedule,
    )


def metrics_on_ranks(group: dist.ProcessGroup, name: str, schedule: Schedule) -> list[Tensor]:
    world_size = dist.get_world_size(group)
    batch = batch_of(whole_batch(world_size), world_size, dist.get_rank(group))
    return metrics_of(LOSSES[name], batch, group=group, schedule=schedule)


def metrics_of(loss: Loss, batch: Batch, **options: Any) -> list[Tensor]:
    value, metrics = loss(batch, return_metrics=True, **options)
    return [value, *metrics]


def compiled(group: dist.ProcessGroup) -> list[list[Tensor]] | None:
    """The loss and its gradients, in eager mode and compiled; by two ranks only, as it takes a while."""
    world_size = dist.get_world_size(group)
    if world_size > 2:
        return None
    batch = batch_of(whole_batch(world_size), world_size, dist.get_rank(group))
    steps = _clip, torch.compile(_clip, backend="eager")
    with warnings.catch_warnings():
        # Of tensors between graphs, which the compiler looks at.
        warnings.filterwarnings("ignore", message="The .grad attribute")
        return [with_gradients(step, batch, normalize=True, group=group) for step in steps]


class Encoder(nn.Module):
    """Of images and texts, with the scale that is learned with it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.image, self.text = nn.Linear(DIM, 7).double(), nn.Linear(DIM, 7).double()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        for parameter in (*self.image.parameters(), *self.text.parameters()):
            nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.log_scale.exp()


def encoder_gradients(encoder: nn.Module, batch: Batch, **options: Any) -> list[Tensor]:
    torch.autograd.backward(clip_loss(*encoder(batch.a, batch.b), normalize=True, **options))
    return [x.grad for x in encoder.parameters() if x.grad is not None]


def training_step(group: dist.ProcessGroup, reduce: Reduce) -> list[Tensor]:
    """Gradients that ranks have after reducing them: as DistributedDataParallel does, or by a sum."""
    world_size = dist.get_world_size(group)
    batch = batch_of(whole_batch(world_size), world_size, dist.get_rank(group))
    if reduce == "ddp_mean":
        replica = DistributedDataParallel(Encoder(), process_group=group)
        return encoder_gradients(replica, batch, group=group)
    gradients = encoder_gradients(Encoder(), batch, group=group, reduce="sum")
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    return gradients


def refused_losses(group: dist.ProcessGroup) -> list[str]:
    """What is raised where rank 1 has something else than the others."""
    other = dist.get_rank(group) == 1
    x = torch.ones(3, 4)
    nan = torch.full((3, 4), torch.nan) if other else x
    ids = torch.arange(3)
    unknown: Any = "mean" if other else "sum"
    calls: list[Callable[[], Any]] = [
        lambda: clip_loss(nan, x, 2.0, group=group),
        lambda: (
            clip_loss(x[:, :3], x[:, :3], 2.0, group=group)
            if other
            else clip_loss(x, x, 2.0, group=group)
        ),
        lambda: clip_loss(
            x,
            x,
            2.0,
            image_ids=ids if other else None,
            text_ids=ids if other else None,
            group=group,
        ),
        lambda: nt_xent(x, x, temperature=0.5 if other else 0.25, group=group),
        lambda: supcon_loss(x, ids, reduction="sum" if other else "mean", group=group),
        lambda: info_nce(x, x, group=group, reduce=unknown),
        lambda: info_nce(x, x, backend="reference", group=group),
        lambda: _gradient_of_gradient(x, group),
    ]
    return [_error_of(call) for call in calls]


def _gradient_of_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(info_nce(x, x.flip(1), group=group), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x, materialize_grads=True)[0]


def _error_of(call: Callable[[], object]) -> str:
    try:
        return f"no error, but {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


LOSS_CASES: dict[str, Callable[[dist.ProcessGroup], Any]] = {
    "refused losses": refused_losses,
    "compiled": compiled,
    "training ddp_mean": functools.partial(training_step, reduce="ddp_mean"),
    "training sum": functools.partial(training_step, reduce="sum"),
    **{
        f"metrics {x}": functools.partial(metrics_on_ranks, name=x, schedule="ring")
        for x in METRICS
    },
    **{f"loss {x}": functools.partial(loss_on_ranks, variant=x) for x in VARIANTS},
}
