from enum import Enum

import numpy as np
from numpy.typing import NDArray

__version__: str

class Metric(Enum):
    euclidean = ...
    sqeuclidean = ...
    cosine = ...
    inner_product = ...

class Dtype(Enum):
    float32 = ...
    float64 = ...
    float16 = ...
    bfloat16 = ...

class NonFinite(Enum):
    refuse = ...
    skip = ...

# Address, rows, columns, row stride in elements, dtype.
_Matrix = tuple[int, int, int, int, Dtype]
# Address and stride between queries; address 0: no mask.
_Mask = tuple[int, int]

class ReusedFloats:
    def __init__(self, count: int) -> None: ...
    @staticmethod
    def forget() -> None: ...
    def __buffer__(self, flags: int) -> memoryview: ...

class PairTerms:
    def __init__(
        self,
        column_bias: int = 0,
        row_ids: int = 0,
        column_ids: int = 0,
        row_groups: int = 0,
        column_groups: int = 0,
        keep_positives: bool = False,
        separate_positives: bool = False,
        only_positives: bool = False,
    ) -> None: ...

class PackedMemory:
    def __init__(
        self,
        memory: _Matrix,
        metric: Metric,
        nonfinite: NonFinite,
        num_threads: int,
        isa: str = "",
        precision: str = "",
        bound_scale: float = 1.0,
    ) -> None: ...
    @property
    def precision(self) -> str: ...

class FarthestSearch:
    def __init__(
        self,
        rows: _Matrix,
        start: int,
        squared_distances: int = 0,
        isa: str = "",
        precision: str = "",
    ) -> None: ...
    def advance(
        self,
        num_picks: int,
        stop_squared_radius: float,
        picks: int,
        squared_radii: int,
        num_threads: int,
    ) -> int: ...
    @property
    def counts(self) -> tuple[int, int, int]: ...

def isas() -> list[str]: ...
def precisions(isa: str = "") -> list[str]: ...
def check_finite(rows: _Matrix, op: str, name: str, num_threads: int) -> None: ...
def knn_cpu(
    queries: _Matrix,
    memory: _Matrix,
    k: int,
    metric: Metric,
    distances: int,
    distance_dtype: Dtype,
    indices: int,
    mask: _Mask,
    nonfinite: NonFinite,
    num_threads: int,
    isa: str = "",
    precision: str = "",
    packed: PackedMemory | None = None,
    bound_scale: float = 1.0,
) -> tuple[int, int, int]: ...
def within_cpu(
    queries: _Matrix,
    memory: _Matrix,
    radius: float,
    metric: Metric,
    mask: _Mask,
    nonfinite: NonFinite,
    num_threads: int,
    isa: str = "",
    precision: str = "",
    packed: PackedMemory | None = None,
    bound_scale: float = 1.0,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], tuple[int, int, int]]: ...
def log_sum_exp_cpu(
    a: _Matrix,
    b: _Matrix,
    scale: float,
    product_dtype: Dtype,
    row_lse: int,
    column_lse: int,
    num_threads: int,
    isa: str = "",
    pairs: PairTerms = ...,
    row_positives: int = 0,
    column_positives: int = 0,
    row_largest: int = 0,
    itself: bool = False,
    kept: tuple[int, int] = (0, 0),
) -> None: ...
def contrast_gradient_cpu(
    a: _Matrix,
    b: _Matrix,
    scale: float,
    pairs: PairTerms,
    rows: tuple[int, int, int],
    columns: tuple[int, int, int],
    products: tuple[_Matrix, _Matrix, int, int],
    num_threads: int,
    isa: str = "",
    itself: bool = False,
    kept: tuple[int, int] = (0, 0),
) -> None: ...
def softplus_cpu(
    a: _Matrix,
    b: _Matrix,
    scale: float,
    bias: float,
    pairs: PairTerms,
    weights: int,
    sums: tuple[int, int],
    products: tuple[_Matrix, _Matrix, int, int],
    num_threads: int,
    isa: str = "",
) -> None: ...
def tile_shape(dtype: Dtype, isa: str = "") -> tuple[int, int]: ...
def power_of_two(exponents: int, count: int, powers: int, isa: str = "") -> None: ...

# address, dtype, strides of B, S, H
_Value = tuple[int, Dtype, int, int, int]
# dimensions, shapes, points of each level, border, align_corners, discrete, softmax
_Levels = tuple[int, list[int], list[int], bool, bool, bool, bool]
# address, strides of B, Q, H
_Points = tuple[int, int, int, int]
_Addresses = tuple[int, int, int]

def deform_attn_cpu(
    value: _Value,
    sizes: tuple[int, int, int, int, int],
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    output: int,
    num_threads: int,
    isa: str = "",
) -> None: ...
def deform_attn_backward_cpu(
    value: _Value,
    sizes: tuple[int, int, int, int, int],
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    grad_output: int,
    gradients: _Addresses,
    num_threads: int,
    isa: str = "",
) -> None: ...
def deform_attn_second_cpu(
    value: _Value,
    sizes: tuple[int, int, int, int, int],
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    grad_output: int,
    cotangents: _Addresses,
    gradients: tuple[_Addresses, int],
    num_threads: int,
    isa: str = "",
) -> None: ...
