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
