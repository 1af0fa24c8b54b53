"""Run all benchmarks and write ``RESULTS.md`` beside this file."""

from pathlib import Path

from benchmarks.bench_search import coreset_table, search_tables
from benchmarks.timing import environment


def main() -> None:
    lines = ["# Results", "", *(f"- {item}" for item in environment()), ""]
    lines += [
        "Medians of five interleaved runs, ± half their range; ratios are of medians within a run,",
        "below 1 is faster than the peer. Command: `make bench`.",
        "",
        "## Search: float32 `knn` and faiss `IndexFlatL2`",
        "",
        *search_tables(),
        "",
        "## Coreset: `greedy_coreset` and the loop `min(d, ||x - c||)`",
        "",
        *coreset_table(),
        "",
    ]
    text = "\n".join(lines)
    Path(__file__).with_name("RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
