"""``knn`` against faiss ``IndexFlatL2``, and the coreset against the plain torch loop."""

from collections.abc import Callable, Iterator
from functools import partial

import faiss
import numpy as np
import torch
from tqdm import tqdm

import pyfeat
from benchmarks.timing import GIGA, in_fresh_process, peak_memory_mb, take_turns
from pyfeat import _C
from pyfeat._checks import as_matrix

# Queries, rows, width, neighbours.
SHAPES = [(12_544, 65_536, 384, 1), (784, 16_384, 1_536, 1), (784, 16_384, 1_536, 9)]
CORESET_SHAPE = (156_800, 152, 20)  # rows, width, picks


def search_tables() -> Iterator[str]:
    """Markdown lines of the search benchmark."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    isas = [isa for isa in _C.isas() if isa != "scalar"]
    yield "| Q × N × D, k | faiss | " + " | ".join(isas) + " | extra memory |"
    yield "|---|---|" + "---|" * (len(isas) + 1)
    for shape in tqdm(SHAPES, desc="search"):
        yield _search_row(shape, isas)


def _search_row(shape: tuple[int, int, int, int], isas: list[str]) -> str:
    num_queries, num_rows, dim, k = shape
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((num_queries, dim), dtype=np.float32)
    memory = rng.standard_normal((num_rows, dim), dtype=np.float32)
    index = faiss.IndexFlatL2(dim)
    index.add(memory)
    q, x = torch.from_numpy(queries), torch.from_numpy(memory)

    expected = index.search(queries, k)[1]
    for isa in isas:
        # faiss may swap near-ties; anything more is a wrong answer, which is not worth timing.
        same = (_search(q, x, k, isa) == torch.from_numpy(expected)).float().mean()
        if same < 0.999:
            message = f"{isa}: only {float(same):.4%} of the neighbours are those of faiss"
            raise RuntimeError(message)

    contenders: dict[str, Callable[[], object]] = {"faiss": lambda: index.search(queries, k)}
    contenders |= {isa: partial(_search, q, x, k, isa) for isa in isas}
    times = take_turns(contenders, rounds=5)
    work = 2 * num_queries * num_rows * dim / GIGA
    cells = [f"{num_queries:,} × {num_rows:,} × {dim:,}, {k}"]
    for name, time in times.items():
        ratio = "" if name == "faiss" else f", **{time.median / times['faiss'].median:.2f}×**"
        cells.append(
            f"{time.median:.3f} s ± {time.spread:.0%}, {work / time.median:.0f} GFLOP/s{ratio}"
        )
    cells.append(f"{in_fresh_process(_extra_memory_mb, *shape):.0f} MB")
    return "| " + " | ".join(cells) + " |"


def _extra_memory_mb(num_queries: int, num_rows: int, dim: int, k: int) -> float:
    queries, memory = torch.randn(num_queries, dim), torch.randn(num_rows, dim)
    pyfeat.knn(queries[:1], memory[:100])  # loads libraries and starts threads
    return peak_memory_mb(lambda: pyfeat.knn(queries, memory, k))


def coreset_table() -> Iterator[str]:
    """Markdown lines of the coreset benchmark."""
    num_rows, dim, size = CORESET_SHAPE
    features = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0))
    picks = pyfeat.greedy_coreset(features, size=size, start=0).indices
    if not torch.equal(picks, _torch_loop(features, size)):
        message = "the coreset differs from that of the torch loop"
        raise RuntimeError(message)
    times = take_turns(
        {
            "torch loop": lambda: _torch_loop(features, size),
            "pyfeat": lambda: pyfeat.greedy_coreset(features, size=size, start=0),
        },
        rounds=5,
    )
    yield "| N × D, picks | torch loop | pyfeat | ratio |"
    yield "|---|---|---|---|"
    loop, ours = times["torch loop"].median / size, times["pyfeat"].median / size
    yield (
        f"| {num_rows:,} × {dim}, {size} | {loop * 1e3:.2f} ms a pick | {ours * 1e3:.2f} ms a pick "
        f"| {ours / loop:.2f}× |"
    )


def _search(queries: torch.Tensor, memory: torch.Tensor, k: int, isa: str) -> torch.Tensor:
    distances = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    _C.knn_cpu(
        as_matrix(queries),
        as_matrix(memory),
        k,
        _C.Metric.euclidean,
        distances.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
        isa,
    )
    return indices


def _torch_loop(features: torch.Tensor, size: int) -> torch.Tensor:
    nearest = torch.full((len(features),), float("inf"))
    picks = [0]
    while True:
        nearest = torch.minimum(nearest, (features - features[picks[-1]]).norm(dim=1))
        if len(picks) == size:
            return torch.tensor(picks)
        picks.append(int(nearest.argmax()))
