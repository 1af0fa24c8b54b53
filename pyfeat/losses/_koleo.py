"""A regulariser that spreads the features of a batch."""

import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._backends import BACKENDS, Backend
from pyfeat._checks import check_choice
from pyfeat.losses._arguments import checked_features, positive_number
from pyfeat.losses._reduction import Reduction, reduced
from pyfeat.search import knn


def koleo(
    features: Tensor,
    *,
    epsilon: float = 1e-8,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Kozachenko-Leonenko loss: every row pushes its nearest other row away.

    ``loss_i = -ln(d_i + epsilon)``, d_i being the Euclidean distance of row i to its nearest other
    row, the one of the lower index among equals. A single row has loss 0. Duplicates have the
    finite loss ``-ln(epsilon)`` and, as no direction leads apart, no gradient from each other.

    Args:
        features: (N, D) float32, float64, float16 or bfloat16, finite. N may be 0.
        epsilon: In [1e-30, 1e30].
        normalize: Divide all vectors by their length, in float32 at least; zero vectors stay zero.
        reduction: "none" returns the loss of every row.
        backend: Backend that searches, as in ``pyfeat.knn``.

    Returns:
        () float32, float64 for float64 features, or (N,) with reduction "none".

    Raises:
        TypeError: If features are not float.
        ValueError: If shapes disagree, a value is out of range, or a feature is NaN or infinite.
        NotImplementedError: If no backend, or not the one asked for, supports the inputs.

    Precision: neighbours and distances as in ``pyfeat.knn``, those of float64 brute force;
    gradients in float32, to both ends of every distance.
    Memory: O(N D); the (N, N) distances are never stored.
    Source: Sablayrolles et al., Spreading vectors for similarity search, ICLR 2019,
    arXiv:1806.03198; as in Oquab et al., DINOv2, 2023, arXiv:2304.07193.

    Examples:
        >>> koleo(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        tensor(-0.3466)
    """
    op = "koleo"
    (x,) = checked_features(op, ("features", features), normalize=False)
    offset = float(positive_number(op, "epsilon", epsilon, x))
    # Neighbours of 16-bit unit vectors would lie on a grid of 5e-4 or 4e-3.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalize:
        (x,) = checked_features(op, ("features", x), normalize=True)
    check_choice(op, "backend", backend, (None, *BACKENDS))
    if len(x) < 2:
        losses = 0.0 * x.double().sum(dim=1)
    elif backend == "reference":
        losses = reference.koleo(x, offset)
    else:
        # The nearest of all is the row itself or, at the same distance of 0, a duplicate.
        nearest = knn(x, x, 2, backend=backend).distances[:, 1]
        losses = -torch.log(nearest.double() + offset)
    return reduced(op, losses, None, reduction, x)
