"""Kernels for NVIDIA GPUs in Triton. Importing this package does not import triton; its modules do."""
