from enum import Enum

__version__: str

# A float32 matrix: address, rows, columns, row stride in elements.
_Matrix = tuple[int, int, int, int]

class Metric(Enum):
    euclidean = ...
    sqeuclidean = ...
    cosine = ...
    inner_product = ...

class PackedMemory:
    def __init__(
        self, memory: _Matrix, metric: Metric, num_threads: int, isa: str = ""
    ) -> None: ...

def isas() -> list[str]: ...
def check_finite(rows: _Matrix, name: str, num_threads: int) -> None: ...
def knn_cpu(
    queries: _Matrix,
    memory: _Matrix,
    k: int,
    metric: Metric,
    distances: int,
    indices: int,
    num_threads: int,
    isa: str = "",
    packed: PackedMemory | None = None,
) -> tuple[int, int]: ...
def farthest_cpu(
    rows: _Matrix,
    squared_distances: int,
    owners: int,
    picks: int,
    squared_radii: int,
    first_pick: int,
    num_picks: int,
    stop_squared_radius: float,
    num_threads: int,
    isa: str = "",
) -> tuple[int, int, int]: ...
