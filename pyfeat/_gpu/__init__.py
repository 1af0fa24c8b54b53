"""What all backends of a GPU share: which blocks of pairs are launched, in which order and dtypes.

A backend brings the kernels; no line here says how a tile is computed.
"""

# What is made of sums over all pairs, by every backend that brings kernels for them.
PAIR_OPS = (
    *("info_nce", "clip_loss", "siglip_loss", "supcon_loss", "nt_xent"),
    *("sinkhorn_assignment", "swav_loss", "dino_loss", "ibot_loss"),
)
