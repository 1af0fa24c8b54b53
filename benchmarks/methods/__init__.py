"""Proofs on real data that a method does what it is for; ``python -m benchmarks.methods``."""
