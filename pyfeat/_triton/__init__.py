"""Kernels for NVIDIA GPUs in Triton. Importing this package does not import triton; its modules do."""

# Neighbours that the kernels keep for each query.
MAX_K = 64
