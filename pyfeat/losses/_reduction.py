"""From sums over pairs to losses, and from losses to what is returned."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import BACKENDS, Backend, select_backend
from pyfeat._checks import check_choice, distance_dtype_of
from pyfeat._contrast import Pairs, PairSums, pair_sums
from pyfeat._distributed import distributed_pair_sums
from pyfeat._ranks import Ranks
from pyfeat.losses._group import REDUCES, Reduce, global_sum

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class Losses(NamedTuple):
    """Of all rows, or of all columns, in float64, and which count in a mean; None: all do."""

    each: Tensor
    counted: Tensor | None = None


def sums_over(
    op: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    columns: bool = False,
    largest: bool = False,
    backend: Backend | None,
    ranks: Ranks | None = None,
) -> PairSums:
    """``pair_sums`` of the backend that runs, over the rows and columns of all ranks."""
    chosen = chosen_backend(op, backend, a)
    if ranks is not None:
        return distributed_pair_sums(
            *(a, b, scale, pairs), columns=columns, largest=largest, ranks=ranks, backend=chosen
        )
    if chosen == "reference":
        return PairSums(*reference.pair_sums(a, b, scale, *pairs))
    return pair_sums(a, b, scale, pairs, columns=columns, largest=largest, backend=chosen)


def chosen_backend(op: str, backend: Backend | None, features: Tensor) -> Backend:
    """The one that runs."""
    check_choice(op, "backend", backend, (None, *BACKENDS))
    return select_backend(op, backend, features)


def is_reference(op: str, backend: Backend | None, features: Tensor) -> bool:
    """Whether the backend that runs is the reference."""
    return chosen_backend(op, backend, features) == "reference"


def check_group(
    op: str, group: object, reduce: str, backend: Backend | None, features: Tensor
) -> None:
    """Raise unless gradients may be reduced so, and a backend runs that takes part in a group."""
    check_choice(op, "reduce", reduce, REDUCES)
    if group is not None and is_reference(op, backend, features):
        message = f"{op}: group must be None with backend 'reference', got a group"
        raise NotImplementedError(message)


def check_reduction(op: str, reduction: str, *directions: Tensor) -> None:
    """Raise unless it may be asked for losses of the rows of these features."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if reduction == "none" and len({len(features) for features in directions}) == 2:
        message = f"{op}: reduction must be 'mean' or 'sum' for N != M, got 'none'"
        raise ValueError(message)


def reduced_mean(
    op: str,
    directions: Sequence[Losses],
    reduction: Reduction,
    features: Tensor,
    ranks: Ranks | None = None,
    reduce: Reduce = "ddp_mean",
) -> Tensor:
    """Mean of one or two directions, each reduced, over all ranks."""
    if ranks is not None and reduction != "none":
        means = _means_over(ranks, directions, reduction, reduce)
        return means.mean().to(distance_dtype_of(features))
    if len(directions) == 1:
        return reduced(op, *directions[0], reduction, features)
    each, back = (losses.each for losses in directions)
    everyone = all(losses.counted is None for losses in directions)
    if len(each) == len(back) and (reduction == "none" or everyone):
        return reduced(op, 0.5 * (each + back), None, reduction, features)
    first, second = (reduced(op, *losses, reduction, features) for losses in directions)
    return 0.5 * (first + second)


def _means_over(
    ranks: Ranks, directions: Sequence[Losses], reduction: Reduction, reduce: Reduce
) -> Tensor:
    """Means, or sums, of each direction over the rows of all ranks."""
    sums = []
    for each, counted in directions:
        count = each.new_tensor(float(len(each))) if counted is None else counted.sum().double()
        sums += [each.sum(), count]
    totals = global_sum(torch.stack(sums), ranks, reduce).reshape(-1, 2)  # of losses, and counts
    return totals[:, 0] / (totals[:, 1].detach().clamp_min(1.0) if reduction == "mean" else 1.0)


def reduced(
    op: str, losses: Tensor, counted: Tensor | None, reduction: Reduction, features: Tensor
) -> Tensor:
    """Float32, or float64 for float64 features; all losses count if ``counted`` is None."""
    dtype = distance_dtype_of(features)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / (max(len(losses), 1) if counted is None else counted.sum().clamp_min(1))
    return total.to(dtype)
