"""What the ops over all pairs take and return."""

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """What is said of the pairs: a bias (S,) float32, and ids (L,) or (S,) int32, at least 0.

    Pairs of equal ids are positive; pairs of equal groups are left out, positive ones only if they are
    not kept. With ``separate_positives`` log-sum-exps are over what is not positive: where one
    similarity outweighs all others, its distance to them keeps its digits. With ``only_positives``
    they are over what is positive.
    """

    column_bias: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    keep_positives: bool = False
    separate_positives: bool = False
    only_positives: bool = False


class PairSums(NamedTuple):
    """Of S, float64: log-sum-exps and sums over positives; (0,) where they are not wanted.

    ``row_largest`` is over what counts and is not positive, and has no gradient. Where nothing counts,
    log-sum-exps and largest are -inf.
    """

    row_lse: Tensor  # (L,)
    column_lse: Tensor  # (S,)
    row_positives: Tensor  # (L,)
    column_positives: Tensor  # (S,)
    row_largest: Tensor  # (L,)


class WeightedSide(NamedTuple):
    """Of the rows or of the columns, float64: what their pairs weigh.

    For a gradient, weights are the gradients by log-sum-exps and by sums over positives.
    """

    lse: Tensor
    weights: Tensor  # of exp(S - lse)
    positives: Tensor  # of positive pairs, added
