"""The kernels of losses over all pairs, as ``pyfeat._gpu.contrast`` asks for them.

``contrast_sums.py`` computes tiles of similarities, of which only sums over rows and columns
remain; ``contrast_gradient.py`` computes them again for the gradients, which
``contrast_products.py`` multiplies with the features. ``contrast_softplus.py`` does both at once for
losses that need no sums beforehand. ``contrast_tiles.py`` is what all of them begin with.
"""

from pyfeat._triton.contrast_gradient import gradient_terms, write_gradient
from pyfeat._triton.contrast_products import add_product
from pyfeat._triton.contrast_softplus import add_softplus
from pyfeat._triton.contrast_sums import add_sums
from pyfeat._triton.contrast_tiles import choose_tile as sums_tile
from pyfeat._triton.contrast_tiles import gradient_tile, readable
from pyfeat._triton.contrast_tiles import readable as packed

__all__ = [
    "add_product",
    "add_softplus",
    "add_sums",
    "gradient_terms",
    "gradient_tile",
    "packed",
    "readable",
    "sums_tile",
    "write_gradient",
]
