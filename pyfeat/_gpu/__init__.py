"""What all backends of a GPU share: which blocks of pairs are launched, in which order and dtypes.

A backend brings the kernels; no line here says how a tile is computed.
"""
