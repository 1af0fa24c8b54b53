"""Pairs of features that belong together."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat import _C, _ops, reference
from pyfeat._backends import BACKENDS, Backend, select_backend
from pyfeat._checks import (
    as_matrix,
    as_tensor,
    check_choice,
    check_features,
    check_finite,
    distance_dtype_of,
    dtype_name,
    with_contiguous_rows,
)
from pyfeat.search import METRICS, Metric

Method = Literal["mutual", "ratio", "dual_softmax"]

# What each method takes; the others must be left at their defaults.
_DEFAULTS = {
    "metric": "euclidean",
    "ratio": 0.8,
    "mutual": False,
    "temperature": 0.1,
    "threshold": 0.2,
}
_OPTIONS = {
    "mutual": ("metric",),
    "ratio": ("metric", "ratio", "mutual"),
    "dual_softmax": ("temperature", "threshold"),
}

# Of a log-sum-exp; a score is off by twice that, relatively.
_LARGEST_LSE_ERROR = 0.005
# Beyond this, float64 products and the searches for the largest of them could overflow.
_LARGEST_SIMILARITY = 1e100


class Matches(NamedTuple):
    """Pairs of rows of two sets, ascending in ``indices_a``."""

    indices_a: Tensor  # (M,) int64
    indices_b: Tensor  # (M,) int64
    scores: Tensor  # (M,) float32, float64 for float64 features


class NumpyMatches(NamedTuple):
    """``Matches`` of numpy inputs."""

    indices_a: NDArray[np.int64]  # (M,)
    indices_b: NDArray[np.int64]  # (M,)
    scores: NDArray[Any]  # (M,)


@overload
def match(
    a: Tensor,
    b: Tensor,
    *,
    method: Method = "mutual",
    metric: Metric = "euclidean",
    ratio: float = 0.8,
    mutual: bool = False,
    temperature: float = 0.1,
    threshold: float = 0.2,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    backend: Backend | None = None,
) -> Matches: ...
@overload
def match(
    a: NDArray[Any],
    b: NDArray[Any],
    *,
    method: Method = "mutual",
    metric: Metric = "euclidean",
    ratio: float = 0.8,
    mutual: bool = False,
    temperature: float = 0.1,
    threshold: float = 0.2,
    mask_a: NDArray[np.bool_] | None = None,
    mask_b: NDArray[np.bool_] | None = None,
    backend: Backend | None = None,
) -> NumpyMatches: ...
def match(
    a: Tensor | NDArray[Any],
    b: Tensor | NDArray[Any],
    *,
    method: Method = "mutual",
    metric: Metric = "euclidean",
    ratio: float = 0.8,
    mutual: bool = False,
    temperature: float = 0.1,
    threshold: float = 0.2,
    mask_a: Tensor | NDArray[np.bool_] | None = None,
    mask_b: Tensor | NDArray[np.bool_] | None = None,
    backend: Backend | None = None,
) -> Matches | NumpyMatches:
    """Match the rows of two sets of features, exactly and without an (L, S) matrix.

    - mutual: pairs that are each other's nearest. The score is their distance by ``metric`` (for
      inner_product, their product).
    - ratio: every row of ``a`` with its nearest row of ``b``, if that is nearer than ``ratio`` times
      the second nearest, ``d1 < ratio * d2`` (Lowe's test); the only row of ``b`` passes, two equal
      nearest rows do not. The score is ``d1 / d2``, and 0 without a second row. Rows of ``b`` may be
      matched several times. With ``mutual``, pairs that are each other's nearest and pass the test
      both ways; the score is the larger ratio.
    - dual_softmax: with ``s_ij = a_i . b_j / temperature``, ``P_ij`` is the softmax of ``s`` over the
      rows of ``b`` times that over the rows of ``a``. Pairs whose P is the largest of their row and
      of their column, and at least ``threshold``. The score is P.

    Among equals, the nearest and the largest is the one of the lowest index, on both sides.

    Args:
        a: (L, D) float32, float64, float16 or bfloat16, any strides. L may be 0. Tensor or numpy
            array.
        b: (S, D), same kind, dtype and device as ``a``. S may be 0.
        method: The method, by name. Options of other methods must be left at their defaults.
        metric: For mutual, as in ``knn``; for ratio, not inner_product.
        ratio: For ratio, in (0, 1].
        mutual: For ratio.
        temperature: For dual_softmax, in [1e-30, 1e30].
        threshold: For dual_softmax, in [0, 1].
        mask_a: (L,) bool: the rows of ``a`` that take part; the others are as if they were not there.
        mask_b: (S,) bool, the same for ``b``.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        ``indices_a`` (M,) int64, ascending, ``indices_b`` (M,) int64, and ``scores`` (M,) float32,
        float64 for float64 features; detached; numpy arrays for numpy inputs.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If shapes disagree, an option is out of range or of another method, a feature is
            NaN or infinite (float64: a row of norm above 1e150), or for dual_softmax
            ``|a| |b| / temperature`` could exceed 1e100.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: nearest rows and ratios as those of float64 brute force by direct differences. For
    dual_softmax, the logarithms of the softmaxes' sums are taken from float32 products as long as
    this provably changes P by less than 1 % (by about 1e-5 for unit vectors at temperature 0.1),
    and else, or for float64 features, from float64 products, which takes several times as long. The
    rest is float64: P is good to about ``D 2^-52 |a| |b| / temperature`` of itself, and always lies
    in [0, 1]. The same bits for any number of threads.
    Memory: O(L + S) beyond the arguments, at most 256 MB of workspace; for dual_softmax also a
    float64 copy of both.
    Source: Lowe, Distinctive image features from scale-invariant keypoints, 2004; the mutual ratio
    test as ``match_smnn`` of kornia; dual softmax: Sun et al., LoFTR, CVPR 2021, arXiv:2104.00680.

    Examples:
        >>> match(torch.eye(3), torch.eye(3)[[2, 0]]).indices_b
        tensor([1, 0])
    """
    options: dict[str, Any] = {
        "metric": metric,
        "ratio": ratio,
        "mutual": mutual,
        "temperature": temperature,
        "threshold": threshold,
    }
    _check_options(method, options)
    check_choice("match", "backend", backend, (None, *BACKENDS))
    left, right = _as_features(a, b)
    chosen = select_backend("match", backend, left)
    kept_a, kept_b = _kept_rows("a", left, mask_a), _kept_rows("b", right, mask_b)
    left = left if kept_a is None else left[kept_a]
    right = right if kept_b is None else right[kept_b]
    check_finite("match", "a", left)
    check_finite("match", "b", right)
    indices_a, indices_b, scores = _pairs(left, right, method, options, chosen)
    matches = Matches(
        indices_a if kept_a is None else kept_a[indices_a],
        indices_b if kept_b is None else kept_b[indices_b],
        scores.to(distance_dtype_of(left)),
    )
    if isinstance(a, np.ndarray):
        return NumpyMatches(*(part.numpy() for part in matches))
    return matches


def _pairs(
    a: Tensor, b: Tensor, method: Method, options: dict[str, Any], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices in ``a`` and ``b`` and float64 scores, (M,) each."""
    if a.shape[0] == 0 or b.shape[0] == 0:
        none = a.new_empty(0, dtype=torch.int64)
        return none, none, none.double()
    if method == "dual_softmax":
        _check_similarity(a, b, options["temperature"])
    if backend == "reference":
        return reference.match(a, b, method, **options)
    if method == "mutual":
        return _mutual(a, b, options["metric"])
    if method == "ratio":
        return _ratio(a, b, options["metric"], options["ratio"], mutual=options["mutual"])
    return _dual_softmax(a, b, options["temperature"], options["threshold"])


def _check_options(method: str, options: dict[str, Any]) -> None:
    check_choice("match", "method", method, tuple(_OPTIONS))
    for name, value in options.items():
        if name not in _OPTIONS[method] and value != _DEFAULTS[name]:
            owners = " or ".join(repr(m) for m, names in _OPTIONS.items() if name in names)
            message = f"match: {name} must only be given for method {owners}, got {value!r}"
            raise ValueError(message)
    # Ratios are of distances, which inner products are not.
    metrics = [m for m in METRICS if method == "mutual" or m != "inner_product"]
    check_choice("match", "metric", options["metric"], metrics)
    if not 0.0 < options["ratio"] <= 1.0:
        message = f"match: ratio must be in (0, 1], got {options['ratio']}"
        raise ValueError(message)
    if not 1e-30 <= options["temperature"] <= 1e30:
        message = f"match: temperature must be in [1e-30, 1e30], got {options['temperature']}"
        raise ValueError(message)
    if not 0.0 <= options["threshold"] <= 1.0:
        message = f"match: threshold must be in [0, 1], got {options['threshold']}"
        raise ValueError(message)


def _as_features(a: Tensor | NDArray[Any], b: Tensor | NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Both as tensors that fit each other, detached."""
    if isinstance(a, np.ndarray) != isinstance(b, np.ndarray):
        message = (
            f"match: a and b must both be tensors or both numpy arrays, "
            f"got {type(a).__name__} and {type(b).__name__}"
        )
        raise TypeError(message)
    left, right = as_tensor("match", "a", a).detach(), as_tensor("match", "b", b).detach()
    check_features("match", "a", left)
    check_features("match", "b", right, dim=left.shape[1], dtype=left.dtype)
    _check_device("b", right, left)
    return left, right


def _kept_rows(
    name: str, features: Tensor, mask: Tensor | NDArray[np.bool_] | None
) -> Tensor | None:
    """Indices of the rows that a mask keeps; None: all."""
    if mask is None:
        return None
    chosen = as_tensor("match", f"mask_{name}", mask)
    if chosen.dtype != torch.bool:
        message = f"match: mask_{name} must be bool, got {dtype_name(chosen.dtype)}"
        raise TypeError(message)
    if chosen.shape != features.shape[:1]:
        message = (
            f"match: mask_{name} must have shape ({features.shape[0]},), got {tuple(chosen.shape)}"
        )
        raise ValueError(message)
    _check_device(f"mask_{name}", chosen, features)
    return chosen.nonzero()[:, 0]


def _check_device(name: str, tensor: Tensor, a: Tensor) -> None:
    if tensor.device != a.device:
        message = f"match: {name} must be on {a.device} like a, got {tensor.device}"
        raise ValueError(message)


def _nearest(queries: Tensor, memory: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Distances (Q, k) float64 and indices (Q, k), as ``knn``."""
    return _ops.search_cpu(queries, memory, k, metric, distance_dtype=torch.float64)


def _are_mutual(nearest: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """Whether i is what ``back`` answers for ``nearest[i]``; it is asked once for each of them."""
    distinct, places = torch.unique(nearest, return_inverse=True)
    return back(distinct)[places] == torch.arange(len(nearest))


def _mutual(a: Tensor, b: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    distances, nearest = (part[:, 0] for part in _nearest(a, b, 1, metric))  # [L] each
    mutual = _are_mutual(nearest, lambda rows: _nearest(b[rows], a, 1, metric)[1][:, 0])
    found = mutual.nonzero()[:, 0]
    return found, nearest[found], distances[found]


def _ratio(
    a: Tensor, b: Tensor, metric: str, ratio: float, *, mutual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nearest, ratios = _ratios(a, b, metric, ratio)
    found = (ratios < math.inf).nonzero()[:, 0]
    nearest, ratios = nearest[found], ratios[found]
    if mutual and len(found):
        distinct, places = torch.unique(nearest, return_inverse=True)
        back, back_ratios = (part[places] for part in _ratios(b[distinct], a, metric, ratio))
        both = (back == found) & (back_ratios < math.inf)
        ratios = torch.maximum(ratios, back_ratios)[both]
        found, nearest = found[both], nearest[both]
    return found, nearest, ratios


def _ratios(a: Tensor, b: Tensor, metric: str, ratio: float) -> tuple[Tensor, Tensor]:
    """Nearest row of ``b`` and d1 / d2 of every row of ``a``; infinite where the test fails."""
    distances, indices = _nearest(a, b, min(2, len(b)), metric)
    first = distances[:, 0]
    second = distances[:, 1] if len(b) > 1 else torch.full_like(first, math.inf)
    passed = first < ratio * second
    return indices[:, 0], (first / second).where(passed, math.inf)


def _dual_softmax(
    a: Tensor, b: Tensor, temperature: float, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P_ij = exp(2 s_ij - r_i - c_j), r and c being the log-sum-exps of s over rows and columns.

    The largest P of row i is at the largest ``a_i . b_j - temperature c_j / 2``: a search by inner
    products among rows of one more feature.
    """
    dim = a.shape[1]
    roundings = min(dim, 64) + dim / 64 + 5  # of a float32 product
    error = roundings * 2.0**-24 * _largest_similarity(a, b, temperature)
    in_float64 = a.dtype == torch.float64 or error > _LARGEST_LSE_ERROR
    row_lse, column_lse = log_sum_exp(a, b, 1.0 / temperature, in_float64=in_float64)

    def best(queries: Tensor, memory: Tensor, memory_lse: Tensor) -> Tensor:
        minus_one = memory_lse.new_full((len(queries), 1), -1.0)
        penalty = (0.5 * temperature) * memory_lse[:, None]
        queries = torch.cat([queries.double(), minus_one], dim=1)
        memory = torch.cat([memory.double(), penalty], dim=1)
        return _nearest(queries, memory, 1, "inner_product")[1][:, 0]

    nearest = best(a, b, column_lse)  # [L]
    mutual = _are_mutual(nearest, lambda rows: best(b[rows], a, row_lse))
    found = mutual.nonzero()[:, 0]
    nearest = nearest[found]
    similarities = (a[found].double() * b[nearest].double()).sum(dim=1) / temperature  # [M]
    log_scores = (similarities - row_lse[found]) + (similarities - column_lse[nearest])
    scores = log_scores.exp().clamp_max(1.0)
    kept = scores >= threshold
    return found[kept], nearest[kept], scores[kept]


def _largest_similarity(a: Tensor, b: Tensor, temperature: float) -> float:
    """What no ``|a_i . b_j| / temperature`` exceeds."""
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).max() for x in (a, b)]
    return float(norms[0] * norms[1] / temperature)


def _check_similarity(a: Tensor, b: Tensor, temperature: float) -> None:
    largest = _largest_similarity(a, b, temperature)
    if not largest <= _LARGEST_SIMILARITY:
        message = (
            f"match: a and b must have norms with |a| |b| / temperature at most "
            f"{_LARGEST_SIMILARITY:g} for dual_softmax, got {largest:g}"
        )
        raise ValueError(message)


def log_sum_exp(
    a: Tensor, b: Tensor, scale: float, *, in_float64: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row (L,) and column (S,) of ``scale * a @ b.T``, float64.

    The (L, S) matrix is never stored. Products are float32, accurate to ``n 2^-24 |scale| |a| |b|``
    with ``n = min(D, 64) + D / 64 + 5`` (bfloat16: ``min(D, 128) + D / 128 + 6``), or float64, which
    takes about ten times as long.
    """
    a, b = with_contiguous_rows(a), with_contiguous_rows(b)
    rows = torch.empty(a.shape[0], dtype=torch.float64)
    columns = torch.empty(b.shape[0], dtype=torch.float64)
    _C.log_sum_exp_cpu(
        as_matrix(a),
        as_matrix(b),
        scale,
        _C.Dtype.float64 if in_float64 else _C.Dtype.float32,
        rows.data_ptr(),
        columns.data_ptr(),
        torch.get_num_threads(),
    )
    return rows, columns
