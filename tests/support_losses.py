"""The usual eager losses, which store the similarities of all pairs: what ours are compared with."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfeat.losses import clip_loss, info_nce, nt_xent, supcon_loss, swav_loss


def unit(rows: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim), dim=1)


def by_scale(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """With the inverse of the temperature as the last argument."""

    def scaled(*arguments: Tensor) -> Tensor:
        *rest, scale = arguments
        return loss(*rest, temperature=1.0 / scale.double(), **options)

    return scaled


def eager_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    labels = torch.arange(len(image))
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    losses = [F.cross_entropy(s, labels, reduction="none") for s in (per_image, per_text)]
    return (losses[0] + losses[1]) / 2


def eager_info_nce(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(queries))
    return F.cross_entropy(scale * queries @ keys.T, labels, reduction="none")


def eager_supcon(features: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    s = (scale * features @ features.T).fill_diagonal_(-math.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    counts = positive.sum(dim=1)
    log_p = s.log_softmax(dim=1)
    return -log_p.where(positive, 0.0).sum(dim=1) / counts.clamp_min(1)


def eager_supcon_inside(features: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    s = (scale * features @ features.T).fill_diagonal_(-math.inf)
    positive = (labels[:, None] == labels).fill_diagonal_(False)
    some = positive.any(dim=1)
    share = s.softmax(dim=1).where(positive, 0.0).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
    return -share.where(some, 1.0).log()


def eager_nt_xent(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
    z = torch.cat([z1, z2])
    s = (scale * z @ z.T).fill_diagonal_(-math.inf)
    partners = torch.arange(len(z)).roll(len(z1))
    return F.cross_entropy(s, partners, reduction="none")


def with_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The losses, and the gradients of their mean by all inputs that are float, in float64."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = loss(*leaves)
    value.mean().backward()  # type: ignore[no-untyped-call]
    gradients = [x.grad for x in leaves if x.grad is not None]
    return [value.detach().double(), *(grad.double() for grad in gradients)]


def assert_as_good_as_torch(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    *inputs: Tensor,
    cancelled: float = 0.0,
) -> None:
    """Fail unless the error of every loss and gradient is at most twice the largest that torch makes.

    Errors are those of float32 against ``eager`` in float64. Granted where torch, by chance, makes none:
    one rounding of the largest element and, for the losses and for the gradient by the scale, the last
    argument, one of the largest similarity of unit vectors; and what float64 itself rounds. And one
    rounding of what is ``cancelled``: the largest of two parts of a gradient whose difference it is.
    """
    scale = float(inputs[-1])
    exact = with_gradients(eager, *(x.double() if x.is_floating_point() else x for x in inputs))
    for mine, theirs, true in zip(
        with_gradients(ours, *inputs), with_gradients(eager, *inputs), exact, strict=True
    ):
        error, budget = (mine - true).abs(), 2 * (theirs - true).abs().max()
        rounded = {0: 1.0, 1: scale}.get(true.ndim, 2.0**-27 * scale + cancelled)
        floor = 2.0**-24 * float(true.abs().max()) + 2.0**-23 * rounded
        assert (error <= budget + floor).all(), (
            f"off by {error.max():.2e} of {true.abs().max():.2e} {tuple(true.shape)}, torch {budget / 2:.2e}"
        )


class TensorSizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that operations return, but for what shares memory with others."""

    def __init__(self, *others: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._others = {x.untyped_storage().data_ptr() for x in others}
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if (
                isinstance(x, Tensor)
                and x.layout == torch.strided
                and x.untyped_storage().data_ptr() not in self._others
            ):
                self.largest = max(self.largest, x.numel())
        return found


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def _ids(features: Tensor, count: int) -> Tensor:
    return torch.arange(len(features), device=features.device) % count


# Of two sets of features and a scale; they take the options of all losses.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda a, b, s, **o: clip_loss(a, b, s, **o),
    "info_nce": lambda a, b, s, **o: info_nce(a, b, temperature=1 / s, extra_keys=b / 2, **o),
    "false negatives": lambda a, b, s, **o: info_nce(
        a, b, temperature=1 / s, query_ids=_ids(a, 9), key_ids=_ids(b, 9), symmetric=True, **o
    ),
    "supcon": lambda a, b, s, **o: supcon_loss(a, _ids(a, 11), temperature=1 / s, **o),
    "supcon in": lambda a, b, s, **o: supcon_loss(
        b, _ids(a, 11), temperature=1 / s, average="in", **o
    ),
    "nt_xent": lambda a, b, s, **o: nt_xent(a, b, temperature=1 / s, **o),
    "swav": lambda a, b, s, **o: swav_loss([a, b], b[:40] * s, **o),
}
