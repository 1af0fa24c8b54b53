"""Softmax losses: cross-entropies of the positive pairs of rows and of columns."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._contrast import Pairs, PairSums
from pyfeat._ranks import Ranks
from pyfeat.losses._arguments import real_number
from pyfeat.losses._metrics import RowSums
from pyfeat.losses._positives import Positives, count_negatives
from pyfeat.losses._reduction import Losses, sums_over


class Hardness(NamedTuple):
    """Of similarities S, negatives have weights ``exp(beta S)``; so many of them are positive."""

    beta: float
    prior: float


def checked_hardness(op: str, beta: float, prior: float) -> Hardness | None:
    """None if negatives are as they are."""
    beta = real_number(op, "hard_negative_beta", beta)
    prior = real_number(op, "positive_prior", prior)
    if not 0.0 <= beta < math.inf:
        message = f"{op}: hard_negative_beta must be at least 0 and finite, got {beta}"
        raise ValueError(message)
    if not 0.0 <= prior < 1.0:
        message = f"{op}: positive_prior must be in [0, 1), got {prior}"
        raise ValueError(message)
    return Hardness(beta, prior) if beta or prior else None


def not_hard(op: str, hardness: Hardness, where: str) -> ValueError:
    """What to raise where negatives must be as they are."""
    beta, prior = hardness
    message = (
        f"{op}: hard_negative_beta and positive_prior must be 0 {where}, got {beta} and {prior}"
    )
    return ValueError(message)


def pair_losses(
    op: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    positives: Positives,
    *,
    hardness: Hardness | None = None,
    inside: bool = False,
    columns: bool = False,
    measured: bool = False,
    backend: Backend | None,
    ranks: Ranks | None = None,
) -> tuple[list[Losses], RowSums | None]:
    """Of rows and, if wanted, of columns; of several positives the mean is taken ``inside`` of the log.

    ``measured``: whether sums for metrics are wanted, too.
    """

    def sums(factor: float, pairs: Pairs) -> PairSums:
        scaled = scale if factor == 1.0 else factor * scale
        return sums_over(
            op,
            a,
            b,
            scaled,
            pairs,
            columns=columns,
            largest=measured,
            backend=backend,
            ranks=ranks,
        )

    sides = range(2 if columns else 1)
    pairs = positives.pairs
    factor = 1.0
    if hardness is not None:
        if not pairs.separate_positives:
            raise not_hard(op, hardness, "where a row has several positives")
        numbers = count_negatives(positives, a, b, ranks)
        found, parts = _hard_losses(sums, positives, hardness, numbers, scale, sides)
        factor = 1.0 + hardness.beta
    elif inside:
        found, parts = _inside_losses(sums, positives, sides)
    else:
        found = sums(1.0, pairs)
        parts = [
            _softmax_loss(found[side], found[side + 2], positives.counts[side], pairs)
            for side in sides
        ]
    losses = [part.losses for part in parts]
    if not measured:
        return losses, None
    with torch.no_grad():
        rows = RowSums(
            factor * scale.detach(),
            losses[0].counted,
            found.row_positives.detach(),
            None if pairs.separate_positives else _largest(sums, pairs),
            found.row_largest,
            losses[0].each + parts[0].positive,
        )
    return losses, rows


# Factor of the scale, and pairs.
Sums = Callable[[float, Pairs], PairSums]


class _Part(NamedTuple):
    """Of rows, or of columns: losses, log-sum-exps without what stands for the positives."""

    losses: Losses
    positive: Tensor


def _largest(sums: Sums, pairs: Pairs) -> Tensor:
    """Of every row, the largest of what is not left out, positive or not."""
    without = pairs._replace(row_ids=None, column_ids=None, separate_positives=False)
    return sums(1.0, without).row_largest


def _softmax_loss(lse: Tensor, positives: Tensor, counts: Tensor | None, pairs: Pairs) -> _Part:
    """Those with a positive count, the others have loss 0.

    ``lse`` is over all pairs, or where they are separate: over all but the only positive one.
    ``positives`` are sums over so many pairs as ``counts`` says, over one pair without.
    """
    separate = pairs.separate_positives
    if counts is None:
        each = _outweighed(lse, positives) if separate else lse - positives
        return _Part(Losses(each), positives)
    counted = counts > 0
    # Where nothing counts the log-sum-exp is -inf, which must not meet a gradient.
    lse = lse.masked_fill(~counted, 0.0)
    mean = positives / counts.clamp_min(1.0)
    each = _outweighed(lse, mean) if separate else lse - mean
    return _Part(Losses(each.where(counted, 0.0), counted), mean)


def _outweighed(others: Tensor, positive: Tensor) -> Tensor:
    """``log(exp(others) + exp(positive)) - positive``, to its last digits where positive is larger."""
    return torch.nn.functional.softplus(others - positive)


def _inside_losses(sums: Sums, positives: Positives, sides: range) -> tuple[PairSums, list[_Part]]:
    """Minus the log of the share that a positive has on average: of positives alone, and others."""
    pairs = positives.pairs
    alone = sums(1.0, pairs._replace(separate_positives=False, only_positives=True))
    others = sums(1.0, pairs._replace(separate_positives=True))
    parts = []
    for side in sides:
        own, counts = alone[side], positives.counts[side]
        if counts is None:
            parts.append(_Part(Losses(_outweighed(others[side], own)), own))
            continue
        counted = counts > 0
        lse, own = (x.masked_fill(~counted, 0.0) for x in (others[side], own))
        number = counts.clamp_min(1.0).log()
        each = (_outweighed(lse, own) + number).where(counted, 0.0)
        parts.append(_Part(Losses(each, counted), own - number))
    return others, parts


def _hard_losses(
    sums: Sums,
    positives: Positives,
    hardness: Hardness,
    numbers: tuple[Tensor, Tensor],
    scale: Tensor,
    sides: range,
) -> tuple[PairSums, list[_Part]]:
    """Of single positives and so many negatives, whose weighted mean is a quotient of sums.

    With ``LSE_c = log sum_j exp(c S_ij)`` over the negatives j, the mean of ``exp(S_ij)`` under weights
    ``exp(beta S_ij)`` is ``exp(LSE_{1 + beta} - LSE_beta)``.
    """
    beta, prior = hardness
    sharp = sums(1.0 + beta, positives.pairs)
    weights = sums(beta, positives.pairs)[:2] if beta else [x.log() for x in numbers]
    parts = []
    for side in sides:
        some = numbers[side] > 0
        means = sharp[side].where(some, 0.0) - weights[side].where(some, 0.0)
        products = sharp[side + 2] / (1.0 + beta)
        if prior:
            means = _without_positives(means, products, scale, prior)
        lse = (means + numbers[side].log().where(some, 0.0)).masked_fill(~some, -math.inf)
        parts.append(_softmax_loss(lse, products, positives.counts[side], positives.pairs))
    return sharp, parts


def _without_positives(negatives: Tensor, positives: Tensor, scale: Tensor, prior: float) -> Tensor:
    """``log(max((exp(negatives) - prior exp(positives)) / (1 - prior), exp(-scale)))``."""
    share = positives + math.log(prior) - negatives
    left = share < 0.0
    rest = torch.log(-torch.expm1(share.where(left, -1.0)))
    corrected = negatives + rest - math.log1p(-prior)
    least = -scale.double()  # of unit vectors, no similarity is below
    return torch.where(left & (corrected > least), corrected, least)
