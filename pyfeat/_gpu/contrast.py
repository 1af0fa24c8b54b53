"""Sums over all pairs on an NVIDIA GPU, and their gradients.

``contrast_sums.py`` launches what leaves sums over rows and columns of tiles behind,
``contrast_products.py`` what computes tiles again for the gradients and multiplies them with features,
a block of pairs at a time. ``contrast_pairs.py`` says what a backend brings.

Cost of 65,536 x 65,536 x 768 in bfloat16, rows and columns, on an H100 (989 TFLOP/s, 3.35 TB/s,
about 6 TB/s from its second-level cache), by arithmetic: a product of 6.6 TFLOP forward and three
backward. Two of them arise in tiles of 128 x 128, which read 1/64 byte an operation: the cache
allows 380 TFLOP/s, 35 ms. Two are the library's, 19 ms at 70 % of the peak. Four exponentials of
each pair take 5 ms of another unit. Parts of sums are 0.8 GB; the gradient by the similarities,
26 GB, stays in the cache for the most part; the sums of the gradients are 13 GB, 4 ms.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pyfeat._gpu.contrast_pairs import AllPairs, ContrastKernels
from pyfeat._gpu.contrast_products import Wanted, gradient_products, softplus_products
from pyfeat._gpu.contrast_sums import softplus_sums, sums_of_tiles
from pyfeat._pairs import Pairs, PairSums, WeightedSide

__all__ = ["Wanted", "pair_gradients", "pair_softplus", "pair_sums", "weighted_features"]


def pair_sums(
    kernels: ContrastKernels,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    *,
    columns: bool,
    largest: bool = False,
    itself: bool = False,
) -> PairSums:
    """Log-sum-exps and positive sums of ``S = scale * a @ b.T + column_bias``.

    Args:
        kernels: Of the backend.
        a: (L, D) float32, float16 or bfloat16. Copied unless its last axis is contiguous and D a
            multiple of 16.
        b: (S, D), dtype and device of ``a``.
        scale: () float. ``|a| |b|`` and ``scale |a| |b|`` must be at most 1e36 for the longest
            rows.
        pairs: On the device of ``a``.
        columns: Whether sums over columns are wanted.
        largest: Whether the largest of every row is wanted.
        itself: ``b`` is ``a``, and pairs say the same of ij and ji: takes about half of the
            products. Not with ``columns`` or a bias.

    Returns:
        As ``reference.pair_sums``, (0,) where not wanted.

    Precision: similarities in float32, also for features of 16 bits; sums of more than a tile in
    float64. Bit-identical between runs.
    Memory: outputs plus a workspace of at most 64 MB.
    """
    with _device_of(a):
        problem = AllPairs.of(kernels, a, b, scale, pairs)
        rows, of_columns = sums_of_tiles(
            kernels, problem, columns=columns, largest=largest, itself=itself
        )
    return PairSums(rows.lse, of_columns.lse, rows.positives, of_columns.positives, rows.largest)


def pair_gradients(
    kernels: ContrastKernels,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    rows: WeightedSide,
    columns: WeightedSide | None,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a loss by a (L, D), b (S, D) and scale () from those by its sums.

    Args:
        kernels: Of the backend.
        a: As in ``pair_sums``, as are ``b``, ``scale`` and ``pairs``.
        b: See above.
        scale: See above.
        pairs: See above.
        rows: Log-sum-exps of rows, and the gradients by them and by the sums over positives.
        columns: Likewise; None if sums over columns are not in the loss.
        wanted: Which gradients are.

    Returns:
        (L, D), (S, D) and (), in the dtypes of what they are by, (0, D) if not wanted.

    Precision: products are summed in float32, the gradient by ``scale`` in float64 across tiles.
    For features of 16 bits the gradient by a similarity is rounded to their dtype, u = 2^-8 for
    bfloat16 and 2^-11 for float16, before it is multiplied with features: an error of at most u
    times the sum of magnitudes of what is added up. The gradient by ``scale`` takes it before.
    Bit-identical between runs; for features of 16 bits as far as the library is (see
    ``contrast_products.py``).
    Memory: float32 gradients and a workspace of at most 64 MB.
    """
    with _device_of(a):
        problem = AllPairs.of(kernels, a, b, scale, pairs)
        factor = problem.scale.double()
        sides = (rows,) if columns is None else (rows, columns)
        unit = _unit(a, factor, [x for side in sides for x in side[1:]])
        second = rows if wanted.itself else columns
        by_a, by_b, total = gradient_products(
            kernels, problem, rows, second, factor * unit, a, b, wanted
        )
        # Of a batch with itself every pair has been in the gradients of two rows.
        grad_scale = total / (factor * unit) * (0.5 if wanted.itself else 1.0)
        grad_a, grad_b = (_divided(x, unit, a).to(a.dtype) for x in (by_a, by_b))
        return grad_a, grad_b, grad_scale.to(scale.dtype)


def weighted_features(
    kernels: ContrastKernels,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    pairs: Pairs,
    rows: WeightedSide,
    columns: WeightedSide | None,
    a_values: Tensor,
    b_values: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor]:
    """``G @ b_values`` (L, F) and ``G.T @ a_values`` (S, E), without G (L, S).

    See ``pyfeat._contrast.weighted_features``.

    Precision and memory: as of ``pair_gradients``.
    """
    with _device_of(a):
        problem = AllPairs.of(kernels, a, b, scale, pairs)
        one = torch.ones_like(problem.scale, dtype=torch.float64)
        sides = (rows,) if columns is None else (rows, columns)
        unit = _unit(b_values, one, [x for side in sides for x in side[1:]])
        by_a, by_b, _ = gradient_products(
            kernels, problem, rows, columns, unit, a_values, b_values, wanted
        )
        by_a, by_b = (_divided(x, unit, b_values) for x in (by_a, by_b))
        return by_a.to(b_values.dtype), by_b.to(a_values.dtype)


def pair_softplus(
    kernels: ContrastKernels,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    weights: Tensor,
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums over softplus of all pairs, and the gradients of a weighted sum of them.

    Args:
        kernels: Of the backend.
        a: As in ``pair_sums``, as are ``b``, ``scale`` and ``pairs``.
        b: See above.
        scale: See above.
        bias: () float.
        pairs: See above; its column bias and how it treats log-sum-exps have no part.
        weights: (L,), gradients by the sums of softplus.
        wanted: Which gradients are.

    Returns:
        Sums (L,) float64 of ``softplus(Z)`` and of ``y sigmoid(Z)``, with ``Z = y (S + bias)``, y -1
        for positive pairs and 1 for others, and the gradients by ``a`` and ``b``, float32, (0, D) if
        not wanted.

    Precision and memory: as of ``pair_gradients``.
    """
    with _device_of(a):
        problem = AllPairs.of(kernels, a, b, scale, pairs._replace(column_bias=None))
        bias = bias.to(a.device)
        if not (wanted.by_a or wanted.by_b):
            softplus, sigmoids = softplus_sums(kernels, problem, bias)
            by_a, by_b = (x.new_empty((0, x.shape[1]), dtype=torch.float32) for x in (a, b))
            return softplus, sigmoids, by_a, by_b
        factor = problem.scale.double()
        unit = _unit(a, factor, [weights])
        terms = (weights.double() * (factor * unit)).float()
        sums, by_a, by_b = softplus_products(kernels, problem, bias, terms, a, b, wanted)
        softplus, sigmoids = sums
        return softplus, sigmoids, _divided(by_a, unit, a), _divided(by_b, unit, a)


def _unit(values: Tensor, factor: Tensor, weights: list[Tensor]) -> Tensor:
    """() float64, a power of two that takes gradients into the range of ``values``."""
    if values.dtype != torch.float16:
        return torch.ones_like(factor)
    # No softmax and no sigmoid exceeds 1: their weights bound what they add up to. 2^14 leaves room
    # for rounding below the largest number, 65,504; what is 2^28 times smaller loses digits.
    largest = [x.double().abs().amax() for x in weights if x.numel()]
    bound = factor.abs() * sum(largest)
    exponent = torch.floor(14.0 - torch.log2(bound.where(bound > 0, 1.0)))
    return torch.exp2(exponent)


def _divided(products: Tensor, unit: Tensor, values: Tensor) -> Tensor:
    """Products with ``values`` of what had been multiplied by ``_unit``."""
    return products.div_(unit) if values.dtype == torch.float16 else products


def _device_of(features: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(features.device) if features.is_cuda else nullcontext()
