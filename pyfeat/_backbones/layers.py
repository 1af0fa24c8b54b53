"""Layers by name: which there are, which to take, and their outputs as maps."""

import difflib
import math
from collections.abc import Sequence

from torch import Tensor

OP = "load_backbone"  # opens the error messages

# Class, distillation and four register tokens never exceed this; a larger bound makes the grid
# of small images ambiguous.
_MAX_PREFIX_TOKENS = 5


def to_map(
    output: object, layer: str, size: tuple[int, int], patch: tuple[int, int] | None
) -> Tensor:
    """Return one layer's output as (B, C, h, w); tokens are laid out row by row."""
    if isinstance(output, tuple) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    if not isinstance(output, Tensor) or output.ndim != 3:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        message = f"{OP}: layers must give 4-D maps or 3-D tokens, got {got} from {layer!r}"
        raise ValueError(message)
    height, width = size
    num_tokens = output.shape[1]
    common = math.gcd(height, width)
    sides = [(p, p) for p in range(1, common + 1) if common % p == 0] if patch is None else [patch]
    limit = _MAX_PREFIX_TOKENS if patch is None else num_tokens
    grids = [(height // p, width // q) for p, q in sides]
    grids = [(h, w) for h, w in grids if 0 <= num_tokens - h * w <= limit]
    if len(grids) != 1:
        message = (
            f"{OP}: layers must give tokens on one grid that fits the image, got {num_tokens} "
            f"tokens from {layer!r} for {height} x {width} pixels, with candidates {grids}"
        )
        raise ValueError(message)
    h, w = grids[0]
    return output[:, num_tokens - h * w :].mT.reshape(-1, output.shape[2], h, w)


def default_layers(names: Sequence[str], strides: Sequence[int]) -> tuple[str, ...]:
    """Take half and three quarters of the depth of a token grid, strides 8 and 16 of a pyramid.

    A pyramid without these strides gives the two layers before its last.
    """
    if len(set(strides)) == 1:
        last = len(names) - 1
        return tuple(dict.fromkeys((names[last // 2], names[last * 3 // 4])))
    deepest = dict(zip(strides, names, strict=True))
    if 8 in deepest and 16 in deepest:
        return deepest[8], deepest[16]
    return tuple(names[-3:-1])


def check_known(layers: Sequence[str], known: Sequence[str], name: str) -> None:
    """Raise ValueError, with the closest names, for a layer that ``name`` does not have."""
    for layer in layers:
        if layer not in known:
            near = difflib.get_close_matches(layer, known, n=5, cutoff=0.3) or known[:5]
            message = (
                f"{OP}: layers must be layers of {name}, got {layer!r}; closest: {', '.join(near)}"
            )
            raise ValueError(message)
