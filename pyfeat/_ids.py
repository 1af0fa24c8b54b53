"""Ids of rows: one integer each, or a fixed number of them."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat._checks import as_tensor, dtype_name


def as_ids(op: str, ids: Tensor | NDArray[Any]) -> Tensor:
    """The ids as a tensor.

    Raises:
        TypeError: If they are not int64.
    """
    given = as_tensor(op, "ids", ids)
    if given.dtype != torch.int64:
        message = f"{op}: ids must be int64, got {dtype_name(given.dtype)}"
        raise TypeError(message)
    return given


def shape_like(ids: Tensor, count: int | str = "n") -> str:
    """The shape of ``count`` ids like these, for messages."""
    return f"({count},)" if ids.ndim == 1 else f"({count}, {ids.shape[1]})"


def are_alike(ids: Tensor, others: Tensor) -> bool:
    """Whether both are single numbers, or both as many to a row."""
    return ids.ndim == others.ndim and ids.shape[1:] == others.shape[1:]


def which_are_among(op: str, held: Tensor, wanted: Tensor) -> Tensor:
    """(N,) bool: which of the ids ``held`` (N,) or (N, c) are among those ``wanted``.

    Raises:
        ValueError: If ``wanted`` has another shape.
        KeyError: If one of them is not held.
    """
    if not are_alike(wanted, held):
        message = f"{op}: ids must have shape {shape_like(held)}, got {tuple(wanted.shape)}"
        raise ValueError(message)
    both = torch.cat([held, wanted.to(held.device)])
    key = torch.unique(both, dim=0, return_inverse=True)[1]  # [N + n]
    ours, asked = key[: len(held)], key[len(held) :]
    missing = ~torch.isin(asked, ours)
    if missing.any():
        message = f"{op}: ids must be in the bank, got {wanted[missing.cpu()][0].tolist()}"
        raise KeyError(message)
    return torch.isin(ours, asked)
