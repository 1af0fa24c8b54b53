"""Searches on a GPU: the peers, what they are given beforehand, and one call."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import pyfeat
from benchmarks.answers import NeighbourCheck
from benchmarks.data import normal_features, patch_like_features
from benchmarks.gpu.setting import Setting, allow_tf32
from benchmarks.gpu.turns import Entrant, MissingError, import_peer
from benchmarks.harness import Shape
from benchmarks.timing import Work
from pyfeat._backends import Backend

# Of the matrix of distances that peers store for a part of the queries.
CHUNK_BYTES = 1 << 30

# Prepares a search of queries in memory for k neighbours; it returns their indices (Q, k).
Prepare = Callable[[Tensor, Tensor, int], Callable[[], object]]


def search_features(shape: Shape, *, patch_like: bool) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) and memory (N, D), float32 on the CPU, of one kind."""
    if not patch_like:
        memory = normal_features(shape.num_rows, shape.dim, seed=0)
        return normal_features(shape.num_queries, shape.dim, seed=1), memory
    features = patch_like_features(shape.num_queries + shape.num_rows, shape.dim)
    return features[: shape.num_queries], features[shape.num_queries :]


def search_entrants(setting: Setting, shape: Shape, *, patch_like: bool = False) -> list[Entrant]:
    """Our backends, which must be exact, and peers, of which it is said how often they are not.

    Args:
        setting: The device and our backends.
        shape: Of the search.
        patch_like: Rows lie in clusters that are narrow beside their distances, so that bounds on
            rounded products leave many rows of a cluster; else they are normal, and few are left.
    """
    queries, memory = (x.to(setting.device) for x in search_features(shape, patch_like=patch_like))
    ours = {name: f"pyfeat, {name}" for name in setting.backends}
    check = NeighbourCheck(queries, memory, shape.k, exact=ours.values())

    def ours_judged(name: str, answer: object) -> str:
        check(name, answer)
        return ""

    def peer_judged(name: str, answer: object) -> str:
        wrong = check.share_wrong(name, answer)
        return f"wrong for {wrong:.2%} of queries" if wrong else ""

    entrants = []
    for backend, name in ours.items():
        run = partial(_prepare_ours, setting, backend, queries, memory, shape.k)
        judge = partial(ours_judged, name)
        entrants.append(Entrant(name, run, judge, True, Work(shape.operations, "bf16")))
    for name, (prepare, resource) in PEERS.items():
        run = partial(prepare, queries, memory, shape.k)
        work = Work(shape.operations, resource)
        entrants.append(Entrant(name, run, partial(peer_judged, name), work=work))
    return entrants


def _prepare_ours(
    setting: Setting, backend: Backend, queries: Tensor, memory: Tensor, k: int
) -> Callable[[], object]:
    """``pyfeat.knn``, nothing beforehand."""
    setting.need(backend)
    return lambda: pyfeat.knn(queries, memory, k, backend=backend).indices


def prepare_products(
    queries: Tensor, memory: Tensor, k: int, *, tf32: bool
) -> Callable[[], object]:
    """Chunks of ``|x|^2 - 2 q x`` and their ``min`` or ``topk``; the norms come beforehand."""
    norms = memory.square().sum(dim=1)

    def search() -> Tensor:
        found = []
        with allow_tf32(tf32):
            for chunk in torch.split(queries, _chunk(memory)):
                scores = torch.addmm(norms, chunk, memory.T, alpha=-2.0)
                if k == 1:
                    found.append(scores.min(dim=1, keepdim=True).indices)
                else:
                    found.append(scores.topk(k, largest=False).indices)
        return torch.cat(found)

    return search


def prepare_cdist(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """Chunks of ``torch.cdist`` and their ``topk``."""

    def search() -> Tensor:
        found = []
        with allow_tf32(False):
            for chunk in torch.split(queries, _chunk(memory)):
                distances = torch.cdist(chunk, memory)
                found.append(distances.topk(k, largest=False).indices)
        return torch.cat(found)

    return search


def prepare_faiss(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``GpuIndexFlatL2``, with the rows added beforehand."""
    faiss = import_peer("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        message = "this faiss has no GPU index"
        raise MissingError(message)
    import_peer("faiss.contrib.torch_utils")  # lets indexes take tensors
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), memory.shape[1])
    index.add(memory)
    return lambda: index.search(queries, k)[1]


def prepare_cuvs(queries: Tensor, memory: Tensor, k: int) -> Callable[[], object]:
    """``brute_force``, with the index built beforehand."""
    brute_force = import_peer("cuvs.neighbors.brute_force")
    index = brute_force.build(memory, metric="sqeuclidean")
    return lambda: torch.as_tensor(brute_force.search(index, queries, k)[1], device=memory.device)


# By name, with the number format that is multiplied.
PEERS: dict[str, tuple[Prepare, str]] = {
    "mm + topk": (partial(prepare_products, tf32=False), "float32"),
    "mm + topk, TF32": (partial(prepare_products, tf32=True), "tf32"),
    "cdist + topk": (prepare_cdist, "float32"),
    "faiss": (prepare_faiss, "float32"),
    "cuVS": (prepare_cuvs, "float32"),
}


def _chunk(memory: Tensor) -> int:
    """Queries whose distances to all rows take CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * len(memory)))
