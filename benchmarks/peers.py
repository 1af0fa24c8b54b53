"""The peers of the search: what they are given beforehand, and one call."""

from collections.abc import Callable, Sequence

import faiss
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from usearch.index import search

import pyfeat
from benchmarks.data import normal_features
from benchmarks.harness import Shape
from benchmarks.memory import peak_memory_mb
from benchmarks.timing import Contender, Work

SEARCH_PACKAGES = ("faiss-cpu", "scikit-learn", "usearch")
TORCH_CHUNK = 1024  # queries; their distances to a million rows take 4 GB
USEARCH_LIMIT = 4e9  # bytes of its buffers

# Prepares a search of queries in memory for k neighbours; it returns their indices (Q, k).
Prepare = Callable[[Tensor, Tensor, int], Callable[[], object]]


def prepare_faiss(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``IndexFlatL2``, with the rows added beforehand."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(memory.shape[1])
    index.add(memory.numpy())
    return lambda: index.search(queries.numpy(), k)[1]


def prepare_torch(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``cdist`` by matrix product and ``topk``, over chunks of the queries."""

    def search_chunks() -> Tensor:
        found = []
        for chunk in torch.split(queries, TORCH_CHUNK):
            distances = torch.cdist(chunk, memory, compute_mode="use_mm_for_euclid_dist")
            found.append(distances.topk(k, largest=False).indices)
        return torch.cat(found)

    return search_chunks


def prepare_sklearn(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``NearestNeighbors`` by brute force, fitted beforehand; it multiplies in float64."""
    neighbours = NearestNeighbors(algorithm="brute", n_jobs=torch.get_num_threads())
    neighbours.fit(memory.numpy())
    return lambda: neighbours.kneighbors(queries.numpy(), k, return_distance=False)


def prepare_usearch(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """Exact search by squared distance."""
    rows, wanted, threads = memory.numpy(), queries.numpy(), torch.get_num_threads()

    def search_all() -> Tensor:
        found = search(rows, wanted, k, "l2sq", exact=True, threads=threads)
        return torch.from_numpy(found.keys.reshape(len(wanted), k).astype("int64"))

    return search_all


def prepare_knn(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``pyfeat.knn``, nothing beforehand."""
    return lambda: pyfeat.knn(queries, memory, k).indices


def prepare_bank(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``MemoryBank.search``, the memory packed by a first search."""
    bank = pyfeat.MemoryBank(memory)
    bank.search(queries[:1], k)
    return lambda: bank.search(queries, k).indices


PEERS: dict[str, Prepare] = {
    "faiss": prepare_faiss,
    "torch": prepare_torch,
    "sklearn": prepare_sklearn,
    "usearch": prepare_usearch,
}


def peer_contenders(
    queries: Tensor, memory: Tensor, k: int, names: Sequence[str] = tuple(PEERS), *, reads: bool
) -> tuple[list[Contender], dict[str, str]]:
    """Peers that can run at this size, and why the others cannot.

    Args:
        queries: (Q, D).
        memory: (N, D).
        k: Neighbours per query.
        names: Of the peers.
        reads: Whether reading the memory bounds the search, not multiplying.
    """
    shape = Shape(len(queries), memory.shape[0], memory.shape[1], k)
    skipped = {}
    buffers = 16.0 * shape.num_queries * shape.num_rows
    if "usearch" in names and buffers > USEARCH_LIMIT:
        skipped["usearch"] = f"its buffers of 16 B × Q × N would take {buffers / 1e9:.0f} GB"
    work = Work(4.0 * memory.numel(), "read") if reads else Work(shape.operations, "float32")
    contenders = [
        Contender(name, PEERS[name](queries, memory, k), work=work)
        for name in names
        if name not in skipped
    ]
    return contenders, skipped


def extra_memory_mb(name: str, shape: Shape) -> float:
    """Peak memory that a search takes beyond its inputs; for a fresh process."""
    prepare = {"pyfeat": prepare_knn, **PEERS}[name]
    queries = normal_features(shape.num_queries, shape.dim, seed=1)
    memory = normal_features(shape.num_rows, shape.dim, seed=0)
    # Loads libraries and starts threads.
    prepare(queries[:1], memory[:64], shape.k)()
    return peak_memory_mb(lambda: prepare(queries, memory, shape.k)())
