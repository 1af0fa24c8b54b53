"""Sinkhorn-Knopp: prototypes for features such that all prototypes are used alike."""

import torch
import torch.distributed as dist
from torch import Tensor

from pyfeat._backends import Backend
from pyfeat._checks import check_features, check_finite, distance_dtype_of
from pyfeat._contrast import Pairs
from pyfeat._ranks import Ranks
from pyfeat.losses._arguments import checked_features, positive_number
from pyfeat.losses._assignment import Assignment
from pyfeat.losses._group import largest_over, meeting, outside_graphs, sum_over
from pyfeat.losses._reduction import chosen_backend, sums_over

# Of the scores in float64 at a time: what a core's cache holds, and on a GPU what keeps it busy.
_CHUNK_BYTES, _GPU_CHUNK_BYTES = 1 << 20, 64 << 20


@outside_graphs
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Assignments of a batch to prototypes by Sinkhorn-Knopp, for scores at hand.

    Scales the columns and then the rows of ``exp(scores / epsilon)`` to equal sums, ``iterations``
    times, in logarithms: equal to the usual loop and free of overflow at any ``epsilon``. Without
    the scores, see ``sinkhorn_assignment``.

    Args:
        scores: (B, K) float32, float64, float16 or bfloat16, finite, K >= 1. B may be 0.
        epsilon: In [1e-30, 1e30], the temperature.
        iterations: >= 1.
        group: Processes whose batches, of any sizes, are assigned together; None: this one alone.

    Returns:
        (B, K) float32, float64 for float64 scores; rows sum to 1. No gradient.

    Raises:
        TypeError: If scores are not float, or iterations no integer.
        ValueError: If a shape or value is out of range, or a score is NaN or infinite; on several
            processes also if arguments differ.
        RuntimeError: If another process has raised.

    Precision: float64 inside, rounded once.
    Memory: the result, and a workspace of a few MB for K up to 100,000.
    Source: Cuturi, Sinkhorn distances, NeurIPS 2013, arXiv:1306.0895; as in Caron et al., SwAV,
    NeurIPS 2020, arXiv:2006.09882.

    Examples:
        >>> sinkhorn(torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.0, 0.1]]), epsilon=0.1)
        tensor([[0.6921, 0.3079],
                [0.6921, 0.3079],
                [0.1006, 0.8994]])
    """
    op = "sinkhorn"
    with meeting(op, group) as met:
        check_features(op, "scores", scores)
        check_finite(op, "scores", scores.detach())
        check_iterations(op, iterations)
        if scores.shape[1] == 0:
            message = f"{op}: scores must have at least one column, got shape {tuple(scores.shape)}"
            raise ValueError(message)
        s = scores.detach()
        temperature = float(positive_number(op, "epsilon", epsilon, s))
        met.tell(s, s[:0], torch.ones(()), epsilon=temperature, iterations=iterations)
    num_bytes = _CHUNK_BYTES if s.device.type == "cpu" else _GPU_CHUNK_BYTES
    chunk_size = max(1, num_bytes // (8 * s.shape[1]))
    chunks = torch.split(s, chunk_size)
    lse = s.new_full((s.shape[1],), -torch.inf, dtype=torch.float64)
    for chunk in chunks:
        lse = torch.logaddexp(lse, torch.logsumexp(chunk.double() / temperature, dim=0))
    columns = -_log_sum_exp_over(lse, met.ranks)
    for _ in range(iterations - 1):
        # Half the exponentials of log-sum-exps, and no underflow: where columns sum to 1, the
        # largest entry of each is at least 1 / B and a row sums to at most K, so that none of these
        # sums is below 1 / (B K).
        sums = torch.zeros_like(columns)
        for chunk in chunks:
            sums += torch.softmax((chunk.double() / temperature).add_(columns), dim=1).sum(dim=0)
        columns = columns - sum_over(sums, met.ranks).log()
    out = torch.empty_like(s, dtype=distance_dtype_of(s), memory_format=torch.contiguous_format)
    for part, chunk in zip(torch.split(out, chunk_size), chunks, strict=True):
        part.copy_(torch.softmax((chunk.double() / temperature).add_(columns), dim=1))
    return out


@outside_graphs
def sinkhorn_assignment(
    features: Tensor,
    prototypes: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    queue: Tensor | None = None,
    normalize: bool = False,
    group: "dist.ProcessGroup | None" = None,
    backend: Backend | None = None,
) -> Assignment:
    """Assignments of features to prototypes by Sinkhorn-Knopp, without their scores.

    Those of ``sinkhorn(features @ prototypes.T)``, given by two vectors.

    Args:
        features: (B, D) float32, float64, float16 or bfloat16, finite. B may be 0.
        prototypes: (K, D), dtype and device of ``features``, K >= 1.
        epsilon: > 0, the temperature; at least 1e-6 |features| |prototypes| for the longest of them
            (1e-14 in float64), so that rounding does not decide.
        iterations: >= 1.
        queue: (E, D), further features that take part in the balance but are not returned.
        normalize: Divide all vectors by their length; zero vectors stay zero.
        group: Processes whose batches, of any sizes, are assigned together; None: this one alone.
        backend: Backend to run; None takes the fastest that supports the inputs.

    Returns:
        An ``Assignment``: ``mean(values)`` multiplies with it, ``probabilities()`` is the matrix.

    Raises:
        TypeError: If features are not float, or iterations no integer.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite; on
            several processes also if arguments differ.
        RuntimeError: If another process has raised.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: products in float32, sums in float64, potentials of columns rounded to float32:
    relative errors of a few times 1e-7 / epsilon for vectors of unit length.
    Memory: O((B + E + K) D); the (B, K) scores are never stored.
    Source: as ``sinkhorn``.

    Examples:
        >>> prototypes = torch.eye(2)
        >>> features = torch.tensor([[0.3, 0.1], [0.2, 0.0], [0.0, 0.1]])
        >>> sinkhorn_assignment(features, prototypes, epsilon=0.1).mean(prototypes)
        tensor([[0.6921, 0.3079],
                [0.6921, 0.3079],
                [0.1006, 0.8994]])
    """
    op = "sinkhorn_assignment"
    named = [("features", features), ("prototypes", prototypes)]
    named += [] if queue is None else [("queue", queue)]
    with meeting(op, group) as met:
        x, w, *extra = (y.detach() for y in checked_features(op, *named, normalize=normalize))
        check_prototypes(op, "prototypes", w)
        check_iterations(op, iterations)
        everything = torch.cat([x, *extra]) if extra else x
        scale = assignment_scale(op, "epsilon", epsilon, everything, w)
        met.tell(everything, w, scale, num_prototypes=len(w), iterations=iterations)
    columns = balanced_columns(op, everything, w, scale, iterations, met.ranks, backend)
    return softmax_assignment(op, x, w, scale, columns, backend)


@torch.no_grad()
def balanced_columns(
    op: str,
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    iterations: int,
    ranks: Ranks | None,
    backend: Backend | None,
) -> Tensor:
    """(K,) of the dtype of distances, added to scores such that rows use all columns alike.

    One iteration is ``columns_k = -logsumexp_i(S_ik + rows_i)`` and then
    ``rows_i = -logsumexp_k(S_ik + columns_k)``, but for constants that cancel.
    """

    def lse(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        """Log-sum-exps of ``scale * a @ b.T + bias``, float64."""
        # Rounded near 0, where float32 has more digits.
        middle = bias.mean() if len(bias) else bias.sum()
        pairs = Pairs((bias - middle).to(distance_dtype_of(a)))
        sums = sums_over(op, a, b, scale, pairs, columns=False, backend=backend)
        return sums.row_lse + middle

    rows = features.new_zeros(len(features), dtype=torch.float64)
    columns = -_log_sum_exp_over(lse(prototypes, features, rows), ranks)
    for _ in range(iterations - 1):
        rows = -lse(features, prototypes, columns)
        columns = -_log_sum_exp_over(lse(prototypes, features, rows), ranks)
    # Of no features at all they are not finite.
    columns = columns.where(columns.isfinite(), 0.0)
    return (columns - columns.mean()).to(distance_dtype_of(features))


def _log_sum_exp_over(lse: Tensor, ranks: Ranks | None) -> Tensor:
    """Of all ranks together, from the float64 log-sum-exp of each; NaN if all are -inf."""
    if ranks is None:
        return lse
    largest = largest_over(lse.clone(), ranks)
    return sum_over((lse - largest).exp(), ranks).log() + largest


@torch.no_grad()
def softmax_assignment(
    op: str,
    features: Tensor,
    prototypes: Tensor,
    scale: Tensor,
    columns: Tensor,
    backend: Backend | None,
) -> Assignment:
    chosen = chosen_backend(op, backend, features)
    sums = sums_over(op, features, prototypes, scale, Pairs(columns), backend=chosen)
    return Assignment(features, prototypes, scale, columns, sums.row_lse, chosen)


def assignment_scale(
    op: str, name: str, temperature: float | Tensor, features: Tensor, prototypes: Tensor
) -> Tensor:
    """1 / temperature, () float64 without a gradient.

    Raises:
        ValueError: If scores over the temperature would be so large that rounding decides.
    """
    scale = 1.0 / positive_number(op, name, temperature, features).detach().double()
    lengths = [
        torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.float64)
        for x in (features, prototypes)
    ]
    if len(features) == 0:
        return scale
    largest = float(lengths[0].max() * lengths[1].max())
    # A logarithm of a probability is then off by 0.1 or so.
    limit = 1e-14 if features.dtype == torch.float64 else 1e-6
    if largest * float(scale) * limit > 1.0:
        message = (
            f"{op}: {name} must be at least {limit} |features| |prototypes| for the longest, "
            f"{limit * largest:.3g}, got {1.0 / float(scale):.3g}"
        )
        raise ValueError(message)
    return scale


def check_iterations(op: str, iterations: int, name: str = "iterations") -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        message = f"{op}: {name} must be an integer, got {iterations!r}"
        raise TypeError(message)
    if iterations < 1:
        message = f"{op}: {name} must be at least 1, got {iterations}"
        raise ValueError(message)


def check_prototypes(op: str, name: str, prototypes: Tensor) -> None:
    if len(prototypes) == 0:
        message = f"{op}: {name} must have at least one row, got shape {tuple(prototypes.shape)}"
        raise ValueError(message)
