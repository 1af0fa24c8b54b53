from enum import Enum

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

def architectures() -> list[str]: ...
def runtime_version() -> int: ...
def driver_version() -> int: ...

# Levels of deformable attention that one launch takes.
MAX_LEVELS: int

# Device index, address of the stream.
_Queue = tuple[int, int]
# Address, rows, columns, row stride in elements, dtype.
_Matrix = tuple[int, int, int, int, Dtype]
# Addresses of mean, scale and shift.
_Frame = tuple[int, int, int]
# First row, one past the last, address of what is packed.
_Part = tuple[int, int, int]
# Address and stride between queries; address 0: no mask.
_Mask = tuple[int, int]
# Addresses of distances and indices, dtype of distances.
_Outputs = tuple[int, int, Dtype]

MAX_NEIGHBOURS: int

def packed_bytes(num_rows: int, dim: int) -> int: ...
def workspace_bytes(num_queries: int, dim: int, k: int) -> int: ...
def count_offsets(num_queries: int, dim: int, k: int) -> tuple[int, int]: ...
def pack_memory(
    memory: _Matrix, part: _Part, allowed: int, metric: Metric, frame: _Frame, queue: _Queue
) -> None: ...
def knn(
    queries: _Matrix,
    memory: _Matrix,
    part: _Part,
    k: int,
    metric: Metric,
    mask: _Mask,
    frame: _Frame,
    workspace: int,
    begins: bool,
    ends: bool,
    outputs: _Outputs,
    queue: _Queue,
    bound_scale: float = 1.0,
) -> None: ...

# Address, dtype, strides of B, S, H.
_Value = tuple[int, Dtype, int, int, int]
# B, S, H, D, Q
_Sizes = tuple[int, int, int, int, int]
# n, sizes of all levels, points of each, border, align_corners, discrete, softmax.
_Levels = tuple[int, list[int], list[int], bool, bool, bool, bool]
# Address, strides of B, Q, H.
_Points = tuple[int, int, int, int]
# Of arrays by the values, the locations and the weights; 0 where not wanted.
_Addresses = tuple[int, int, int]

def deform_attn(
    value: _Value,
    sizes: _Sizes,
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    output: int,
    queue: _Queue,
) -> None: ...
def deform_attn_backward(
    value: _Value,
    sizes: _Sizes,
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    grad_output: int,
    gradients: _Addresses,
    queue: _Queue,
) -> None: ...
def deform_attn_count_terms(
    value: _Value,
    sizes: _Sizes,
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    part: tuple[int, int],
    counts: int,
    queue: _Queue,
) -> None: ...
def deform_attn_gather_terms(
    value: _Value,
    sizes: _Sizes,
    levels: _Levels,
    locations: _Points,
    weights: _Points,
    part: tuple[int, int],
    ends: int,
    terms: int,
    grad_output: int,
    by_value: int,
    queue: _Queue,
) -> None: ...

# Addresses of two packed matrices, dtype, rows, columns, width.
_Pair = tuple[int, int, Dtype, int, int, int]
# Addresses of a column bias, ids and groups of rows and columns; keep, separate, only positives.
_PairTerms = tuple[int, int, int, int, int, bool, bool, bool]

def packed_shape(dtype: Dtype, num_rows: int, dim: int) -> tuple[int, int]: ...
def pack_features(features: _Matrix, packed: int, queue: _Queue) -> None: ...
def pair_tile_shape(dtype: Dtype, queue: _Queue) -> tuple[int, int, int]: ...
def plan_pairs(pair: _Pair, queue: _Queue) -> tuple[int, int, int]: ...
def pair_sums(
    pair: _Pair,
    pairs: _PairTerms,
    scale: int,
    row_parts: int,
    column_parts: int,
    ids: bool,
    largest: bool,
    on_diagonal: bool,
    queue: _Queue,
) -> None: ...
def merge_sums(
    parts: int,
    num_slots: int,
    num_lines: int,
    lse: int,
    positives: int,
    largest: int,
    queue: _Queue,
) -> None: ...
def gradient_terms(
    lse: int,
    weights: int,
    positives: int,
    factor: int,
    terms: int,
    num_lines: int,
    queue: _Queue,
) -> None: ...
def pair_gradient(
    pair: _Pair,
    pairs: _PairTerms,
    scale: int,
    row_terms: tuple[int, int],
    column_terms: tuple[int, int],
    gradient: tuple[int, int],
    sums: int,
    queue: _Queue,
) -> None: ...
def pair_softplus(
    pair: _Pair,
    pairs: _PairTerms,
    scale: int,
    bias: int,
    parts: int,
    weights: int,
    gradient: tuple[int, int],
    queue: _Queue,
) -> None: ...
def add_product(pair: _Pair, out: int, stride: int, queue: _Queue) -> None: ...
