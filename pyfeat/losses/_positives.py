"""Which pairs of a loss are positive or left out, and how many of them rows and columns have."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyfeat._capture import is_capturing
from pyfeat._checks import dtype_name
from pyfeat._contrast import Pairs
from pyfeat._ranks import Ranks, all_columns
from pyfeat.losses._arguments import check_shape
from pyfeat.losses._group import largest_over, sum_over
from pyfeat.losses._traced import confirmed, opaque, zero


class Positives(NamedTuple):
    """Pairs, and how many positive ones all rows (L,) and columns (S,) have, in float64.

    None: exactly one.
    """

    pairs: Pairs
    counts: tuple[Tensor | None, Tensor | None] = (None, None)


def by_ids(
    row_ids: Tensor,
    column_ids: Tensor,
    column_bias: Tensor | None = None,
    groups: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Positives:
    """Pairs of equal ids, int32 from 0 on; rows and columns of equal groups are the same, left out."""
    rows, columns = count_equal(row_ids, column_ids, ranks)
    if groups is not None:
        rows, columns = rows - 1.0, columns - 1.0
    counts = rows if groups is not None else torch.cat([rows, columns])
    # A graph must not depend on values: it takes what is right for any number of positives.
    single = not torch.compiler.is_compiling() and _most(counts, ranks) <= 1.0
    pairs = Pairs(column_bias, row_ids, column_ids, groups, groups, separate_positives=single)
    return Positives(pairs, (rows, columns))


def _most(counts: Tensor, ranks: Ranks | None) -> float:
    largest = counts.max() if len(counts) else counts.new_zeros(())
    return float(largest_over(largest, ranks))


def by_targets(
    targets: Tensor,
    num_columns: int,
    column_bias: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    ranks: Ranks | None = None,
) -> Positives:
    """One of the own columns for every row, kept among those of its group."""
    places = torch.arange(num_columns, dtype=torch.int32, device=targets.device)
    if ranks is not None:
        targets, places = targets + ranks.first_column, places + ranks.first_column
    row_groups, column_groups = (None, None) if groups is None else groups
    return Positives(Pairs(column_bias, targets, places, row_groups, column_groups, True, True))


def checked_targets(
    op: str, targets: Tensor | None, num_rows: int, num_columns: int, features: Tensor
) -> Tensor:
    """Of every row a column (N,) int32, that of its index without targets."""
    if targets is None:
        if num_columns < num_rows:
            message = (
                f"{op}: keys must be at least as many as queries, {num_rows}, without targets, "
                f"got {num_columns}"
            )
            raise ValueError(message)
        return torch.arange(num_rows, dtype=torch.int32, device=features.device)
    check_ids(op, "targets", targets, num_rows, features)
    return confirmed(targets, _check_columns(targets, num_columns, op)).int()


@opaque(zero)
def _check_columns(targets: Tensor, num_columns: int, op: str) -> Tensor:
    if len(targets):
        lowest, highest = (int(x) for x in targets.aminmax())
        if lowest < 0 or highest >= num_columns:
            message = f"{op}: targets must be in [0, {num_columns}), got {lowest} to {highest}"
            raise ValueError(message)
    return zero(targets)


def checked_ids(
    op: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    num_rows: int,
    num_columns: int,
    features: Tensor,
    names: tuple[str, str] = ("query_ids", "key_ids"),
) -> tuple[Tensor, Tensor] | None:
    """Both, or None if neither is given."""
    if row_ids is None and column_ids is None:
        return None
    if row_ids is None or column_ids is None:
        missing, given = names if row_ids is None else names[::-1]
        message = f"{op}: {missing} must be given together with {given}, got None"
        raise ValueError(message)
    check_ids(op, names[0], row_ids, num_rows, features)
    check_ids(op, names[1], column_ids, num_columns, features)
    return row_ids, column_ids


def places_over(row_ids: Tensor, column_ids: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """``places_of`` ids of rows and columns of all ranks: those of this one."""
    first_row, first_column, rows, columns = 0, 0, row_ids, column_ids
    if ranks is not None:
        first_row, first_column = ranks.first_row, ranks.first_column
        rows = all_columns(row_ids, ranks._replace(num_columns=ranks.num_rows))
        columns = rows if column_ids is row_ids else all_columns(column_ids, ranks)
    places = places_of(rows if columns is rows else torch.cat([rows, columns]))
    of_rows = places[first_row : first_row + len(row_ids)]
    if columns is rows:
        return of_rows, of_rows
    first_column += len(rows)
    return of_rows, places[first_column : first_column + len(column_ids)]


def row_indices(features: Tensor, ranks: Ranks | None) -> Tensor:
    """Of every row, its index among those of all ranks, int32."""
    indices = torch.arange(len(features), dtype=torch.int32, device=features.device)
    return indices if ranks is None else indices + ranks.first_row


def _fake_places(ids: Tensor) -> Tensor:
    return ids.new_empty(ids.shape[:1], dtype=torch.int32)


@opaque(_fake_places)
def places_of(ids: Tensor) -> Tensor:
    """(N,) int32: of ids (N,), or rows (N, c) of them, their places among those that differ."""
    dim = None if ids.ndim == 1 else 0
    places: Tensor = torch.unique(ids, dim=dim, return_inverse=True)[1]
    return places.int()


def check_ids(op: str, name: str, ids: Tensor, count: int, features: Tensor) -> None:
    """Raise unless ids are (count,) int64 beside the features, and can be read."""
    if not isinstance(ids, Tensor):
        message = f"{op}: {name} must be a tensor of int64, got {type(ids).__name__}"
        raise TypeError(message)
    if ids.dtype != torch.int64:
        message = f"{op}: {name} must be int64, got {dtype_name(ids.dtype)}"
        raise TypeError(message)
    check_shape(op, name, ids, (count,), features)
    if is_capturing(ids):
        message = f"{op}: {name} must not be given while a CUDA graph is captured, got a tensor"
        raise NotImplementedError(message)


def count_equal(
    row_ids: Tensor, column_ids: Tensor, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """Of every row, how many columns of all ranks have its id, and the other way round, in float64."""
    size = most_ids(row_ids, column_ids, ranks)
    in_rows, in_columns = (
        sum_over(sums_by_id(ids.new_ones(len(ids), dtype=torch.float64), ids, size), ranks)
        for ids in (row_ids, column_ids)
    )
    return in_columns[row_ids], in_rows[column_ids]


def most_ids(row_ids: Tensor, column_ids: Tensor, ranks: Ranks | None) -> int:
    """There are no more ids than rows and columns."""
    # A size that need not be read from the tensor: nothing waits for it, and a compiler sees it.
    if ranks is None:
        return len(row_ids) + len(column_ids)
    return sum(ranks.num_rows) + sum(ranks.num_columns)


def sums_by_id(x: Tensor, ids: Tensor, size: int) -> Tensor:
    """Sums of x (N, ...) over rows of equal ids, (size, ...)."""
    return x.new_zeros(size, *x.shape[1:]).index_add_(0, ids, x)


def left_out(pairs: Pairs, ranks: Ranks | None = None) -> list[tuple[float, Tensor, Tensor]]:
    """Signs, and ids of rows and columns: pairs that are left out are those of equal ids, added up."""
    if pairs.row_groups is None or pairs.column_groups is None:
        return []
    groups = (1.0, pairs.row_groups, pairs.column_groups)
    if not pairs.keep_positives or pairs.row_ids is None or pairs.column_ids is None:
        return [groups]
    rows = torch.stack([pairs.row_ids, pairs.row_groups], dim=1)
    columns = torch.stack([pairs.column_ids, pairs.column_groups], dim=1)
    return [groups, (-1.0, *places_over(rows, columns, ranks))]


def count_negatives(
    positives: Positives, a: Tensor, b: Tensor, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """How many pairs of every row and every column are neither positive nor left out, in float64."""
    num_rows, num_columns = len(a), len(b)
    if ranks is not None:
        num_rows, num_columns = sum(ranks.num_rows), sum(ranks.num_columns)
    rows, columns = (1.0 if counts is None else counts for counts in positives.counts)
    rows = a.new_full((len(a),), float(num_columns), dtype=torch.float64) - rows
    columns = b.new_full((len(b),), float(num_rows), dtype=torch.float64) - columns
    for sign, row_ids, column_ids in left_out(positives.pairs, ranks):
        equal_rows, equal_columns = count_equal(row_ids, column_ids, ranks)
        rows, columns = rows - sign * equal_rows, columns - sign * equal_columns
    return rows, columns
