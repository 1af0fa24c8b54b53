"""Launchers of the CUDA kernels, whose modules are imported when they are called.

A launcher allocates results and workspaces with torch, hands addresses, shapes, strides and torch's
current stream to ``pyfeat._cuda``, and waits for nothing: CUDA graphs can capture it.
"""
