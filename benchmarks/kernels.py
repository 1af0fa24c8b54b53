"""Searches with an instruction set and a precision of the tiles that are chosen, not found."""

import torch
from torch import Tensor

from pyfeat import _C
from pyfeat._checks import as_mask, as_matrix

BYTES = {"float32": 4, "bf16": 2, "int8": 1}


def variants() -> list[tuple[str, str]]:
    """Every instruction set with every precision it has, slowest first; scalar is left out."""
    return [
        (isa, precision) for isa in _C.isas() if isa != "scalar" for precision in _C.precisions(isa)
    ]


def pack(memory: Tensor, isa: str = "", precision: str = "") -> _C.PackedMemory:
    """The memory as the tiles read it."""
    return _C.PackedMemory(
        as_matrix(memory),
        _C.Metric.euclidean,
        _C.NonFinite.refuse,
        torch.get_num_threads(),
        isa=isa,
        precision=precision,
    )


def default_precision(memory: Tensor) -> str:
    """Of the tiles where nothing is chosen."""
    return pack(memory).precision


def forced_search(
    queries: Tensor,
    memory: Tensor,
    k: int,
    isa: str = "",
    precision: str = "",
    packed: _C.PackedMemory | None = None,
) -> Tensor:
    """(Q, k) indices by euclidean distance; ``packed`` must be of the same isa and precision."""
    distances = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    _C.knn_cpu(
        as_matrix(queries),
        as_matrix(memory),
        k,
        _C.Metric.euclidean,
        distances.data_ptr(),
        _C.Dtype.float32,
        indices.data_ptr(),
        as_mask(None),
        _C.NonFinite.refuse,
        torch.get_num_threads(),
        isa=isa,
        precision=precision,
        packed=packed,
    )
    return indices
