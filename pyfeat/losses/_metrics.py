"""How well keys are told apart, from what a loss has computed anyway."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._ranks import Ranks
from pyfeat.losses._group import sum_over
from pyfeat.losses._positives import Positives, left_out, most_ids, sums_by_id


class ContrastMetrics(NamedTuple):
    """Of the rows of a batch that count in its loss: queries, images, views, or labelled features.

    All () float32, without a gradient, 0 where there is nothing to average:

    - top1: share of rows whose most similar key, of those that are not left out, is a positive one; a
      positive key as similar as the best other one will do, if it is the only one of its row.
    - positive_similarity: mean of the products of features of all positive pairs, cosines of vectors of
      unit length.
    - negative_similarity: the same of all pairs that are neither positive nor left out.
    - log_sum_exp: mean of the logarithms of the denominators, those of the loss (weighted negatives have
      their weights).
    """

    top1: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    log_sum_exp: Tensor


class RowSums(NamedTuple):
    """Of all rows, float64, similarities being products of features times ``scale`` plus a bias."""

    scale: Tensor
    counted: Tensor | None
    positives: Tensor  # sums over positive pairs
    largest_positive: Tensor | None  # None: there is one positive pair at most
    largest_other: Tensor
    log_sum_exp: Tensor


@torch.no_grad()
def contrast_metrics(
    a: Tensor, b: Tensor, positives: Positives, rows: RowSums, ranks: Ranks | None = None
) -> ContrastMetrics:
    """In O((N + M) D): sums of products are products of sums of features, of all ranks.

    Precision: sums of features in float64 over all rows, in float32 over those of equal ids.
    """
    counted = rows.counted
    weights = a.new_ones(len(a), dtype=torch.float64) if counted is None else counted.double()
    counts = weights if positives.counts[0] is None else positives.counts[0] * weights
    if rows.largest_positive is None:
        best = rows.positives >= rows.largest_other
    else:
        best = rows.largest_positive > rows.largest_other
    pairs = positives.pairs
    each = best, rows.positives, rows.log_sum_exp.where(weights > 0, 0.0)
    own = [weights.sum(), counts.sum(), *((x * weights).sum() for x in each)]
    num_rows, num_positives, num_best, of_positives, log_sum_exp = sum_over(torch.stack(own), ranks)
    if pairs.column_bias is not None and pairs.row_ids is not None and pairs.column_ids is not None:
        bias = pairs.column_bias.double()[:, None]
        of_positives = of_positives - _sum_of_products(
            weights[:, None], bias, pairs.row_ids, pairs.column_ids, ranks
        )
    of_positives = of_positives / rows.scale
    a = a.to(torch.promote_types(a.dtype, torch.float32)) * weights[:, None].to(a.dtype)
    b = b.to(a.dtype)
    of_all = torch.dot(*(sum_over(x.sum(dim=0, dtype=torch.float64), ranks) for x in (a, b)))
    of_negatives = of_all - of_positives
    num_negatives = num_rows * (len(b) if ranks is None else sum(ranks.num_columns)) - num_positives
    for sign, row_ids, column_ids in left_out(pairs, ranks):
        of_negatives = of_negatives - sign * _sum_of_products(a, b, row_ids, column_ids, ranks)
        ones = weights[:, None], b.new_ones(len(b), 1, dtype=torch.float64)
        num_negatives = num_negatives - sign * _sum_of_products(*ones, row_ids, column_ids, ranks)
    values = (
        num_best / num_rows.clamp_min(1.0),
        of_positives / num_positives.clamp_min(1.0),
        of_negatives.where(num_negatives > 0, 0.0) / num_negatives.clamp_min(1.0),
        log_sum_exp / num_rows.clamp_min(1.0),
    )
    return ContrastMetrics(*(value.float() for value in values))


def _sum_of_products(
    a: Tensor, b: Tensor, row_ids: Tensor, column_ids: Tensor, ranks: Ranks | None
) -> Tensor:
    """Of rows of a and of b of all ranks with equal ids."""
    size = most_ids(row_ids, column_ids, ranks)
    if ranks is None:
        sums = (sums_by_id(x, ids, size) for x, ids in ((a, row_ids), (b, column_ids)))
        return torch.mul(*sums).sum(dtype=torch.float64)
    # Of so many ids at a time that the memory is that of the batch of one rank.
    step = max(1, *ranks.num_rows, *ranks.num_columns)
    total = a.new_zeros((), dtype=torch.float64)
    for start in range(0, size, step):
        products = a.new_ones(())
        for x, ids in ((a, row_ids), (b, column_ids)):
            here = (ids >= start) & (ids < start + step)
            products = products * sum_over(sums_by_id(x[here], ids[here] - start, step), ranks)
        total = total + products.sum(dtype=torch.float64)
    return total
