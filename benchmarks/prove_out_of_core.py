"""A memory on disk that is larger than the machine's: ``python -m benchmarks.prove_out_of_core``.

Writes a file of float16 rows (by default 1.1 times the installed memory), searches it through
``numpy.memmap``, and checks the answers against rows planted at known places; says how much memory the
search itself took. Needs that much room on disk; the file is deleted in the end.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import pyfeat
from benchmarks.memory import peak_anonymous_mb

DIM = 256
BLOCK = 1 << 20  # rows written at a time


def main() -> None:
    """Write, search, check."""
    parser = argparse.ArgumentParser(description=__doc__)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parser.add_argument("--gigabytes", type=float, default=1.1 * installed / 1e9)
    parser.add_argument("--folder", type=Path, default=None, help="where to put the file")
    options = parser.parse_args()
    num_rows = int(options.gigabytes * 1e9 / (2 * DIM))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "memory.bin"
        queries, places = write(path, num_rows)
        memory = np.memmap(path, dtype=np.float16, mode="r", shape=(num_rows, DIM))
        pyfeat.knn(queries, queries)  # loads libraries and starts threads
        found, began = [], time.perf_counter()
        grown = peak_anonymous_mb(lambda: found.append(pyfeat.knn(queries, memory, k=2)))
        elapsed = time.perf_counter() - began
    wrong = int((found[0].indices != places).sum())
    if wrong:
        message = f"{wrong} of {places.size} neighbours are wrong"
        raise RuntimeError(message)
    print(
        f"{num_rows:,} rows of {DIM} float16, {options.gigabytes:.1f} GB on a machine with "
        f"{installed / 1e9:.1f} GB: {len(queries)} queries in {elapsed:.0f} s, 0 wrong, "
        f"{grown:.0f} MB of memory beside the file's pages"
    )


def write(path: Path, num_rows: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Fill the file; returns queries and the places of the two nearest rows of each, planted."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((64, DIM)).astype(np.float16)
    places = rng.choice(num_rows, size=(64, 2), replace=False)
    # Far from all queries.
    block = (rng.standard_normal((BLOCK, DIM), dtype=np.float32) + 3).astype(np.float16)
    with path.open("wb") as file, tqdm(total=num_rows, unit="row", unit_scale=True) as bar:
        for first in range(0, num_rows, BLOCK):
            count = min(BLOCK, num_rows - first)
            rows = block[:count].copy()
            for rank, shift in ((0, 0.0), (1, 0.25)):
                for query, place in enumerate(places[:, rank]):
                    if first <= place < first + count:
                        rows[place - first] = queries[query] + np.float16(shift)
            rows.tofile(file)
            bar.update(count)
    return queries, places


if __name__ == "__main__":
    main()
