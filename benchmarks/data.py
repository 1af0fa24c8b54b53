"""Features to search in, made from a seed."""

import torch
from torch import Tensor


def normal_features(num_rows: int, dim: int, seed: int = 0) -> Tensor:
    """(rows, D) float32, standard normal."""
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def patch_like_features(
    num_rows: int, dim: int, *, clusters: int = 300, rank: int = 8, seed: int = 0
) -> Tensor:
    """(rows, D) float32 that lie like patch features of images of one kind of object.

    Row = centre + smooth surface + noise:

    - as parts of an object repeat, rows belong to one of ``clusters`` centres, of sizes that fall off
      like 1 / sqrt(rank of the cluster);
    - as neighbouring patches and similar images change smoothly, each cluster is the image of
      ``rank`` latent coordinates under a linear and a sine map of its own, with scales that halve
      every two coordinates, so that few directions carry the variance;
    - a hundredth of the noise is white, and its scale is log-normal from row to row: few rows are odd;
    - centres share a mean far from zero and vary in a quarter of D directions, as activations do.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    directions = normal(max(1, dim // 4), dim) / dim**0.5
    centres = 1.0 + normal(clusters, len(directions)) @ directions  # [clusters, D]
    scales = 0.5 ** (torch.arange(rank) / 2)  # [rank]
    linear, wave = 0.2 * normal(2, clusters, rank, dim) / dim**0.5
    sizes = torch.arange(1, clusters + 1) ** -0.5
    owners = torch.multinomial(sizes, num_rows, replacement=True, generator=generator)

    features = torch.empty(num_rows, dim)
    for cluster in range(clusters):
        rows = (owners == cluster).nonzero().squeeze(1)
        latent = normal(len(rows), rank) * scales
        features[rows] = centres[cluster] + latent @ linear[cluster] + latent.sin() @ wave[cluster]
    odd = (0.7 * normal(num_rows, 1)).exp()
    features += 0.01 * odd * normal(num_rows, dim) / dim**0.5
    return features
