"""Arguments of the losses over all pairs: checks, and ids as the kernels take them."""

import math

import torch
from torch import Tensor

from pyfeat._checks import check_features, check_finite, dtype_name


def checked_features(op: str, *named: tuple[str, Tensor], normalize: bool) -> list[Tensor]:
    """Checked, and of unit length if so wanted."""
    first = named[0][1]
    for name, features in named:
        check_features(op, name, features)
        check_features(op, name, features, dim=first.shape[1], dtype=first.dtype)
        if features.device != first.device:
            message = (
                f"{op}: {name} must be on {first.device} like {named[0][0]}, got {features.device}"
            )
            raise ValueError(message)
        check_finite(op, name, features.detach())
    checked = [features for _, features in named]
    if not normalize:
        return checked
    # In float32 at least: squares of float16 overflow.
    return [_normalized(features).to(features.dtype) for features in checked]


def _normalized(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # [N, 1]
    # Zero vectors stay zero and get no gradient.
    return (x / norm.where(norm > 0, 1.0)).where(norm > 0, 0.0)


def positive_number(op: str, name: str, value: float | Tensor, features: Tensor) -> Tensor:
    """As a tensor (), with its gradient."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            message = f"{op}: {name} must be a number, got {dtype_name(value.dtype)} of {tuple(value.shape)}"
            raise ValueError(message)
        tensor = value.reshape(()).to(features.device)
    else:
        tensor = torch.tensor(float(value), dtype=torch.float64, device=features.device)
    number = float(tensor.detach())
    if not 0.0 < number < math.inf:
        message = f"{op}: {name} must be positive and finite, got {number}"
        raise ValueError(message)
    return tensor


def check_shape(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], features: Tensor
) -> None:
    if tuple(tensor.shape) != shape:
        message = f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}"
        raise ValueError(message)
    if tensor.device != features.device:
        message = f"{op}: {name} must be on {features.device}, got {tensor.device}"
        raise ValueError(message)


def _check_ids(op: str, name: str, ids: Tensor, count: int, features: Tensor) -> None:
    if ids.dtype != torch.int64:
        message = f"{op}: {name} must be int64, got {dtype_name(ids.dtype)}"
        raise TypeError(message)
    check_shape(op, name, ids, (count,), features)


def paired_ids(
    op: str,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    num_rows: int,
    num_columns: int,
    features: Tensor,
    names: tuple[str, str] = ("query_ids", "key_ids"),
) -> tuple[Tensor, Tensor] | None:
    """Equal where the given ids are, from 0 on, int32."""
    if row_ids is None and column_ids is None:
        return None
    if row_ids is None or column_ids is None:
        missing, given = names if row_ids is None else names[::-1]
        message = f"{op}: {missing} must be given together with {given}, got None"
        raise ValueError(message)
    _check_ids(op, names[0], row_ids, num_rows, features)
    _check_ids(op, names[1], column_ids, num_columns, features)
    places = torch.unique(torch.cat([row_ids, column_ids]), return_inverse=True)[1].int()
    return places[:num_rows], places[num_rows:]


def target_columns(
    op: str, targets: Tensor | None, num_rows: int, num_columns: int, features: Tensor
) -> Tensor:
    """(N,) int32, the positive column of every row."""
    if targets is None:
        if num_columns < num_rows:
            message = (
                f"{op}: keys must be at least as many as queries, {num_rows}, without targets, "
                f"got {num_columns}"
            )
            raise ValueError(message)
        return torch.arange(num_rows, dtype=torch.int32, device=features.device)
    _check_ids(op, "targets", targets, num_rows, features)
    if num_rows and not (int(targets.min()) >= 0 and int(targets.max()) < num_columns):
        message = (
            f"{op}: targets must be in [0, {num_columns}), "
            f"got {int(targets.min())} to {int(targets.max())}"
        )
        raise ValueError(message)
    return targets.int()


def count_positives(row_ids: Tensor, column_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row, how many columns have its id, and the other way round."""
    size = max((int(ids.max()) + 1 for ids in (row_ids, column_ids) if len(ids)), default=0)
    in_rows, in_columns = (torch.bincount(ids, minlength=size) for ids in (row_ids, column_ids))
    return in_columns[row_ids].float(), in_rows[column_ids].float()


def are_single(*counts: Tensor) -> bool:
    """Whether no row and no column has more than one positive."""
    return all(len(count) == 0 or float(count.max()) <= 1.0 for count in counts)


def check_symmetric(
    op: str,
    targets: Tensor | None,
    extra_keys: Tensor | None,
    num_rows: int,
    num_columns: int,
    *,
    by_ids: bool,
    names: tuple[str, str] = ("queries", "keys"),
) -> None:
    for name, value in (("targets", targets), ("extra_keys", extra_keys)):
        if value is not None:
            message = f"{op}: {name} must be None for a symmetric loss, got a tensor"
            raise ValueError(message)
    if num_rows != num_columns and not by_ids:
        message = (
            f"{op}: {names[1]} must have as many rows as {names[0]}, {num_rows}, got {num_columns}"
        )
        raise ValueError(message)
