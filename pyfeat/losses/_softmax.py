"""Softmax losses: cross-entropies of the positive pairs of rows and of columns."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._contrast import Pairs, PairSums
from pyfeat.losses._arguments import real_number
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
    itself: bool = False,
    backend: Backend | None,
) -> list[Losses]:
    """Of rows and, if wanted, of columns; of several positives the mean is taken ``inside`` of the log.

    ``itself``: see ``pair_sums``.
    """

    def sums(factor: float, pairs: Pairs) -> PairSums:
        scaled = scale if factor == 1.0 else factor * scale
        return sums_over(op, a, b, scaled, pairs, columns=columns, itself=itself, backend=backend)

    sides = range(2 if columns else 1)
    if hardness is not None:
        if not positives.pairs.separate_positives:
            raise not_hard(op, hardness, "where a row has several positives")
        numbers = count_negatives(positives.pairs, a, b)
        return _hard_losses(sums, positives, hardness, numbers, scale, sides)
    if inside:
        return _inside_losses(sums, positives, sides)
    pairs = positives.pairs
    found = sums(1.0, pairs)
    return [
        _softmax_losses(
            found[side], found[side + 2], positives.counts[side], separate=pairs.separate_positives
        )
        for side in sides
    ]


# Factor of the scale, and pairs.
Sums = Callable[[float, Pairs], PairSums]


def _softmax_losses(
    lse: Tensor, positives: Tensor, counts: Tensor | None, *, separate: bool
) -> Losses:
    """Of rows, or of columns: those with a positive count, the others have loss 0.

    ``lse`` is over all pairs, or ``separate``: over all but the only positive one. ``positives`` are sums
    over so many pairs as ``counts`` says, over one pair without.
    """
    if counts is None:
        return Losses(_outweighed(lse, positives) if separate else lse - positives)
    counted = counts > 0
    # Where nothing counts the log-sum-exp is -inf, which must not meet a gradient.
    lse = lse.masked_fill(~counted, 0.0)
    mean = positives / counts.clamp_min(1.0)
    each = _outweighed(lse, mean) if separate else lse - mean
    return Losses(each.where(counted, 0.0), counted)


def _outweighed(others: Tensor, positive: Tensor) -> Tensor:
    """``log(exp(others) + exp(positive)) - positive``, to its last digits where positive is larger."""
    return torch.nn.functional.softplus(others - positive)


def _inside_losses(sums: Sums, positives: Positives, sides: range) -> list[Losses]:
    """Minus the log of the share that a positive has on average: of positives alone, and others."""
    pairs = positives.pairs
    alone = sums(1.0, pairs._replace(separate_positives=False, only_positives=True))
    others = sums(1.0, pairs._replace(separate_positives=True))
    losses = []
    for side in sides:
        counts = positives.counts[side]
        if counts is None:
            losses.append(Losses(_outweighed(others[side], alone[side])))
            continue
        counted = counts > 0
        lse, own = (x[side].masked_fill(~counted, 0.0) for x in (others, alone))
        each = _outweighed(lse, own) + counts.clamp_min(1.0).log()
        losses.append(Losses(each.where(counted, 0.0), counted))
    return losses


def _hard_losses(
    sums: Sums,
    positives: Positives,
    hardness: Hardness,
    numbers: tuple[Tensor, Tensor],
    scale: Tensor,
    sides: range,
) -> list[Losses]:
    """Of single positives and so many negatives, whose weighted mean is a quotient of sums.

    With ``LSE_c = log sum_j exp(c S_ij)`` over the negatives j, the mean of ``exp(S_ij)`` under weights
    ``exp(beta S_ij)`` is ``exp(LSE_{1 + beta} - LSE_beta)``.
    """
    beta, prior = hardness
    sharp = sums(1.0 + beta, positives.pairs)
    weights = sums(beta, positives.pairs)[:2] if beta else [x.log() for x in numbers]
    losses = []
    for side in sides:
        some = numbers[side] > 0
        means = sharp[side].where(some, 0.0) - weights[side].where(some, 0.0)
        products = sharp[side + 2] / (1.0 + beta)
        if prior:
            means = _without_positives(means, products, scale, prior)
        lse = (means + numbers[side].log().where(some, 0.0)).masked_fill(~some, -math.inf)
        losses.append(_softmax_losses(lse, products, positives.counts[side], separate=True))
    return losses


def _without_positives(negatives: Tensor, positives: Tensor, scale: Tensor, prior: float) -> Tensor:
    """``log(max((exp(negatives) - prior exp(positives)) / (1 - prior), exp(-scale)))``."""
    share = positives + math.log(prior) - negatives
    left = share < 0.0
    rest = torch.log(-torch.expm1(share.where(left, -1.0)))
    corrected = negatives + rest - math.log1p(-prior)
    least = -scale.double()  # of unit vectors, no similarity is below
    return torch.where(left & (corrected > least), corrected, least)
