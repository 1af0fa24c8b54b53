"""Sums over pairs and their gradients in plain torch, one block of similarities at a time.

For float64 features, and what second derivatives build on; any device. Memory is O((L + S) D) and a
few blocks: the (L, S) similarities never exist. Products of features are of their dtype, float32 at
least; what is done with a pair is float64.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._capture import is_capturing, zero_if
from pyfeat._pairs import Pairs, WeightedSide

# Rows and columns of a block: 8 MiB in float64, where products run at full speed.
SIDE = 1024


# By the dimension that sums are over: 1, columns, for sums of rows, and 0, rows, if those of columns
# are wanted.
Sides = Mapping[int, WeightedSide]


class Block(NamedTuple):
    """Similarities of some rows l with some columns s."""

    rows: slice
    columns: slice
    products: Tensor  # [l, s] float64, a @ b.T
    similarities: Tensor  # [l, s] float64, scale * products + column_bias
    positive: Tensor | None  # [l, s] bool; None: no pair is
    left_out: Tensor | None  # [l, s] bool; None: no pair is
    powerless: Tensor | None  # [l, s] bool, of no weight in a log-sum-exp; None: no pair is

    def part(self, dim: int) -> slice:
        """Of what the sums over ``dim`` are: the rows or the columns of this block."""
        return self.rows if dim == 1 else self.columns

    def spread(self, values: Tensor, dim: int) -> Tensor:
        """[l, 1] or [1, s], of one value for every row or column."""
        return values[self.part(dim)].unsqueeze(dim)

    def softmax(self, lse: Tensor, dim: int) -> Tensor:
        """[l, s] ``exp(S - lse)`` of what has weight, 0 elsewhere."""
        # A log-sum-exp over nothing, -inf, meets none but powerless pairs.
        powers = (self.similarities - self.spread(lse, dim)).exp_()
        return powers if self.powerless is None else powers.masked_fill_(self.powerless, 0.0)

    def without(self, excluded: Tensor | None) -> Tensor:
        """[l, s] S, -inf where excluded."""
        if excluded is None:
            return self.similarities
        return self.similarities.masked_fill(excluded, -math.inf)

    def at_positives(self, values: Tensor) -> Tensor:
        """[l, s] ``values`` where a pair is positive, 0 elsewhere."""
        if self.positive is None:
            return values.new_zeros(self.products.shape)
        return values.expand(self.products.shape).where(self.positive, 0.0)

    def positive_weights(self, sides: Sides) -> Tensor:
        """[l, s] gradients by positive sums, of rows and of columns, where a pair is positive."""
        weights = self.spread(sides[1].positives, 1)
        if 0 in sides:
            weights = weights + self.spread(sides[0].positives, 0)
        return self.at_positives(weights)


def wide_dtype(features: Tensor) -> torch.dtype:
    """Theirs, float32 at least."""
    return torch.promote_types(features.dtype, torch.float32)


def product_dtype(features: Tensor) -> torch.dtype:
    """Float64 where torch may round float32 to fewer digits before it multiplies, as TF32 does."""
    kept = _multiplies_float32(features.device)
    return torch.promote_types(features.dtype, torch.float32 if kept else torch.float64)


def _multiplies_float32(device: torch.device) -> bool:
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch < 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")


def without_autocast(features: Tensor) -> AbstractContextManager[None]:
    """Products in here keep their dtype, whatever autocast is on around the op."""
    return torch.autocast(features.device.type, enabled=False)


def blocks(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs) -> Iterator[Block]:
    """All pairs, block by block; ``a`` (L, D) and ``b`` (S, D) are of the dtype of products."""
    scale = scale.double()
    # Few rows meet blocks of more columns, and the other way round.
    num_rows = SIDE * SIDE // max(1, min(SIDE, b.shape[0]))
    num_columns = SIDE * SIDE // max(1, min(SIDE, a.shape[0]))
    for first_row in range(0, a.shape[0], num_rows):
        rows = slice(first_row, first_row + num_rows)
        for first_column in range(0, b.shape[0], num_columns):
            columns = slice(first_column, first_column + num_columns)
            products = (a[rows] @ b[columns].T).double()
            similarities = scale * products
            if pairs.column_bias is not None:
                similarities += pairs.column_bias[columns].double()
            yield Block(
                rows, columns, products, similarities, *_kinds(pairs, rows, columns, products)
            )


def _kinds(
    pairs: Pairs, rows: slice, columns: slice, products: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Which pairs are positive, left out and powerless, each [l, s], or None if none is."""
    positive = _equal(pairs.row_ids, pairs.column_ids, rows, columns)
    left_out = _equal(pairs.row_groups, pairs.column_groups, rows, columns)
    if positive is not None and left_out is not None:
        if pairs.keep_positives:
            left_out &= ~positive
        positive &= ~left_out
    powerless = left_out
    if pairs.separate_positives:
        powerless = _either(powerless, positive)
    if pairs.only_positives:
        nowhere = torch.zeros_like(products, dtype=torch.bool)
        powerless = _either(powerless, ~(nowhere if positive is None else positive))
    return positive, left_out, powerless


def _either(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Where one of them is true; None is nowhere."""
    if first is None or second is None:
        return second if first is None else first
    return first | second


def _equal(
    row_ids: Tensor | None, column_ids: Tensor | None, rows: slice, columns: slice
) -> Tensor | None:
    if row_ids is None or column_ids is None:
        return None
    return row_ids[rows, None] == column_ids[columns]


def sums(
    a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, *, columns: bool, largest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``PairSums`` holds; of columns, and the largest, (0,) if unwanted.

    Raises:
        ValueError: If similarities could overflow.
    """
    scale = scale_in_range("pair_sums", a, b, scale)
    counts = (b.shape[0] if columns else 0, a.shape[0])  # by dim
    lse = [a.new_full((count,), -math.inf, dtype=torch.float64) for count in counts]
    positives = [torch.zeros_like(x) for x in lse]
    row_largest = lse[1].new_full((a.shape[0] if largest else 0,), -math.inf)
    a, b = (x.to(product_dtype(x)) for x in (a, b))
    with without_autocast(a):
        for block in blocks(a, b, scale, pairs):
            counted = block.without(block.powerless)
            at_positives = block.at_positives(block.similarities)
            if largest:
                others = block.without(_either(block.left_out, block.positive))
                row_largest[block.rows] = row_largest[block.rows].maximum(others.amax(1))
            for dim in (0, 1) if columns else (1,):
                part = block.part(dim)
                lse[dim][part] = torch.logaddexp(lse[dim][part], counted.logsumexp(dim))
                positives[dim][part] += at_positives.sum(dim)
    return lse[1], lse[0], positives[1], positives[0], row_largest


def products(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    sides: Sides,
    a_values: Tensor,
    b_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """``G @ b_values`` and ``G.T @ a_values``, G_ij being what the sides weigh a pair with."""
    dtypes = a_values.dtype, b_values.dtype
    a, b, a_values, b_values = (x.to(product_dtype(x)) for x in (a, b, a_values, b_values))
    by_a = b_values.new_zeros(a.shape[0], b_values.shape[1])
    by_b = a_values.new_zeros(b.shape[0], a_values.shape[1])
    with without_autocast(a):
        for block in blocks(a, b, scale, pairs):
            weights = block.positive_weights(sides)  # G, [l, s]
            for dim, side in sides.items():
                weights += block.spread(side.weights, dim) * block.softmax(side.lse, dim)
            weights = weights.to(a.dtype)
            by_a[block.rows] += weights @ b_values[block.columns]
            by_b[block.columns] += weights.T @ a_values[block.rows]
    return by_a.to(dtypes[1]), by_b.to(dtypes[0])


def gradients(
    a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, sides: Sides
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by ``a``, ``b`` and ``scale`` of a loss whose gradients by the sums are given."""
    wide_a, wide_b = (x.to(product_dtype(x)) for x in (a, b))
    grad_a, grad_b = products(wide_a, wide_b, scale, pairs, sides, wide_a, wide_b)
    # dL/dscale = sum of dL/dS a.b, which is that of <a, dL/da> without its scale.
    grad_scale = (wide_a * grad_a).sum(dtype=torch.float64).to(scale.dtype)
    return (grad_a * scale).to(a.dtype), (grad_b * scale).to(b.dtype), grad_scale


def scale_in_range(op: str, a: Tensor, b: Tensor, scale: Tensor, *, least: float = 0.0) -> Tensor:
    """The scale; if similarities could overflow, with it or with ``least``, NaN in a captured graph.

    Raises:
        ValueError: If they could, elsewhere.
    """
    if a.numel() == 0 or b.numel() == 0:
        return scale
    lengths = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).amax() for x in (a, b)]
    largest = scale.double().abs().clamp_min(least) * lengths[0] * lengths[1]
    limit = 1e300 if a.dtype == torch.float64 else 1e36
    if is_capturing(a):
        return scale + zero_if(largest <= limit, scale)
    if not float(largest) <= limit:
        message = (
            f"{op}: scale |a| |b| must be at most {limit:.0e} for the longest rows, "
            f"got {float(largest):.3g}"
        )
        raise ValueError(message)
    return scale
