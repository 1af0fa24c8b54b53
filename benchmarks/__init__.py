"""Measurements against peers: ``python -m benchmarks`` writes ``RESULTS.md``."""
