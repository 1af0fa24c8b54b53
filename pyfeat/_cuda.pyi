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
