"""Small networks that adapt the patches of one modality, and the losses that train them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pyfeat._checks import check_choice
from pyfeat.bank_distance import bank_min_distance
from pyfeat.losses import info_nce

Negatives = Literal["batch", "sample"]
# Of adaptors' features, whose variance is 1 on average when training begins.
_LEAST_VARIANCE = 1e-3


@dataclass(frozen=True)
class Adaptation:
    """How adaptors are trained.

    The loss is ``local_alignment LA + global_alignment GA + compactness (LC + global_compactness GC)``,
    summed over modalities:

    - LA: symmetric InfoNCE between the patches of two modalities, heads on top, times twice the
      temperature; patches without a point neither count nor are they negatives.
    - GA: the same between the means of the patches of samples.
    - LC: mean distance of a patch to the nearest row of a memory of earlier patches of its class, of
      other samples, at most ``max_distance``.
    - GC: the same for means.

    Certain in the published code are the weights (0.9 of compactness), the temperature, the capacities,
    the bound, the betas and a learning rate of 3e-4 for batches of 8. It takes some 40 steps, each of 16
    batches, and begins with compactness after 60 batches. The loss on rotated views, which the paper does
    not have, is left out. Our choices:

    - some hundred steps of one batch each for sixty samples, at 5e-4, and compactness after the first
      pass;
    - residual branches that begin at 0, so that training begins with the features as they are;
    - distances, and their bound, in root mean squares of features less their mean, in place of the units
      of the published extractors; compactness then weighs 0.3;
    - LC and GC relative to what an adaptor makes of the spread of patches along all directions: else they
      are least where patches shrink alike, or where all but a few directions do;
    - negatives of the same sample, as the paper is read: those of others are told apart by light and
      pose, which compactness is to remove;
    - no sample is compared with its own earlier patches, which a memory as large as the set would always
      find nearest.

    Attributes:
        epochs: Passes over the samples.
        batch_size: Samples of a step.
        learning_rate: Of AdamW, at its highest.
        warmup: Share of the steps in which it rises, in [0, 1); then it falls by a cosine.
        weight_decay: Of AdamW.
        local_alignment: Weight, >= 0; takes two modalities.
        global_alignment: Weight, >= 0; likewise.
        compactness: Weight, >= 0.
        global_compactness: Weight of means relative to patches, >= 0.
        temperature: Of InfoNCE, > 0.
        negatives: Patches that are negatives of a patch: of its own "sample", as the paper is read, or of
            the "batch", as in the code.
        relative: Divide LC and GC by how much wider adaptors make the patches of the batch spread.
        capacity: Patches of a class that are remembered; no more than one pass has.
        global_capacity: Means of a class that are remembered.
        start_step: First step with compactness; None: that after one pass over the samples.
        start_fill: Share of a memory that must be taken before its class is compared with it.
        max_distance: Beyond it patches are not pulled; see above.
        projection: Features of the heads.
        heads: Of attention, at most; the largest number that divides the features is taken.
    """

    epochs: int = 12
    batch_size: int = 8
    learning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    local_alignment: float = 1.0
    global_alignment: float = 0.1
    compactness: float = 0.3
    global_compactness: float = 0.4
    temperature: float = 1.0
    negatives: Negatives = "sample"
    relative: bool = True
    capacity: int = 60_000
    global_capacity: int = 100
    start_step: int | None = None
    start_fill: float = 0.95
    max_distance: float = 1.0
    projection: int = 512
    heads: int = 12

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "capacity", "global_capacity", "projection", "heads")
        for name in counts:
            self._check(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("local_alignment", "global_alignment", "compactness", "global_compactness"):
            self._check(name, 0 <= getattr(self, name) < float("inf"), "be finite and at least 0")
        for name in ("learning_rate", "temperature", "max_distance"):
            self._check(name, 0 < getattr(self, name) < float("inf"), "be positive and finite")
        self._check("warmup", 0 <= self.warmup < 1, "be in [0, 1)")
        self._check("weight_decay", self.weight_decay >= 0, "be at least 0")
        self._check("start_fill", 0 < self.start_fill <= 1, "be in (0, 1]")
        self._check("start_step", (self.start_step or 0) >= 0, "be at least 0")
        check_choice("Adaptation", "negatives", self.negatives, get_args(Negatives))

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            message = f"Adaptation: {name} must {expected}, got {getattr(self, name)!r}"
            raise ValueError(message)


class Adaptor(nn.Module):
    """A pre-norm transformer block without positions over the patches of a sample.

    It begins as the identity: the last layers of both residual branches are 0.

    Args:
        dim: Features of a patch.
        heads: Of attention, at most; the largest number that divides ``dim`` is taken.
    """

    def __init__(self, dim: int, heads: int = 12) -> None:
        super().__init__()
        self.heads = next(h for h in range(min(heads, dim), 0, -1) if dim % h == 0)
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        for layer in (self.project, self.narrow):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Adapt patches (B, N, D) to (B, N, D)."""
        size = patches.shape
        heads = self.query_key_value(self.attention_norm(patches))
        q, k, v = heads.view(*size[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, d]
        mixed = functional.scaled_dot_product_attention(q, k, v)
        patches = patches + self.project(mixed.transpose(1, 2).reshape(size))
        hidden = functional.gelu(self.widen(self.mlp_norm(patches)))
        adapted: Tensor = patches + self.narrow(hidden)
        return adapted


def means_of(patches: Tensor, valid: Tensor) -> Tensor:
    """Mean (B, D) of the valid (B, N) patches (B, N, D); at least one of every sample is."""
    weights = valid.to(patches)[:, :, None]  # [B, N, 1]
    return (patches * weights).sum(dim=1) / weights.sum(dim=1)


def spread_of(patches: Tensor, valid: Tensor) -> Tensor:
    """Geometric mean () of the spreads of valid patches (B, N, D) along all their directions.

    Unlike their root mean square it does not grow where one direction grows and all others shrink.

    Precision: covariances in float64, plus 0.001 for directions in which patches are all alike.
    Memory: some 16 D (D + 2 N) bytes.
    """
    spread: Tensor = _Spread.apply(patches, valid)  # type: ignore[no-untyped-call]
    return spread


class _Spread(torch.autograd.Function):
    """By hand, sample by sample: else all patches would be kept again, in float64."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, valid: Tensor) -> Tensor:
        count, dim = int(valid.sum()), patches.shape[2]
        total = patches.new_zeros(dim, dtype=torch.float64)
        covariance = patches.new_zeros((dim, dim), dtype=torch.float64)
        for rows, mask in zip(patches, valid, strict=True):
            total += rows[mask].double().sum(dim=0)
        mean = total / count
        for rows, mask in zip(patches, valid, strict=True):
            centred = rows[mask].double() - mean
            covariance.addmm_(centred.mT, centred, alpha=1 / count)
        covariance.diagonal().add_(_LEAST_VARIANCE)
        factor = torch.linalg.cholesky(covariance)  # its diagonal: the root of the determinant
        spread: Tensor = factor.diagonal().log().mean().exp()
        ctx.save_for_backward(patches, valid, mean, factor, spread)
        return spread.to(patches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        patches, valid, mean, factor, spread = ctx.saved_tensors
        # Of exp(log det C / 2 D) by a row x of C = sum of (x - mean)(x - mean)' / n; that of the
        # mean is 0, as all x - mean together are.
        towards = torch.cholesky_inverse(factor) * (gradient * spread / (valid.sum() * len(mean)))
        found = torch.zeros_like(patches)
        for place, (rows, mask) in enumerate(zip(patches, valid, strict=True)):
            found[place, mask] = ((rows[mask].double() - mean) @ towards).to(patches)
        return found, None


def alignment(
    first: Tensor,
    second: Tensor,
    valid: Tensor,
    *,
    temperature: float,
    negatives: Negatives = "batch",
) -> Tensor:
    """Symmetric InfoNCE between the valid patches of two modalities, times twice the temperature.

    Args:
        first: (B, N, P) outputs of a head; scaled to unit length here.
        second: (B, N, P), of the other one.
        valid: (B, N) bool: which patches count; the others are no negatives either.
        temperature: > 0.
        negatives: See ``Adaptation``.

    Returns:
        () float32; 0 where a patch has no other to be told from.

    Memory: as ``info_nce``: no matrix of all pairs of patches.
    """
    if negatives == "batch":
        groups = [(first[valid], second[valid])]
    else:
        groups = [(a[v], b[v]) for a, b, v in zip(first, second, valid, strict=True)]
    losses = [
        info_nce(a, b, temperature=temperature, symmetric=True, normalize=True) * len(a)
        for a, b in groups
    ]
    return 2 * temperature * torch.stack(losses).sum() / valid.sum()


def compactness(
    patches: Tensor,
    valid: Tensor,
    samples: Tensor,
    memories: Sequence[tuple[Tensor, Tensor] | None],
    max_distance: float,
) -> Tensor:
    """Mean distance of valid patches to the nearest row of a memory, of another sample.

    Args:
        patches: (B, N, D).
        valid: (B, N) bool.
        samples: (B,) int64 numbers of the samples.
        memories: (B,): rows (n, D) and the samples (n,) they are of; None where a class has not enough.
        max_distance: In feature units.

    Returns:
        () float32: over the patches that have a memory; 0 if none has.
    """
    total, count = patches.new_zeros(()), 0
    for own, mask, sample, memory in zip(patches, valid, samples, memories, strict=True):
        if memory is None:
            continue
        rows, of_samples = memory
        others = of_samples != sample
        if others.any():
            total = total + bank_min_distance(
                own, rows, mask=mask, bank_mask=others, max_distance=max_distance, reduction="sum"
            )
            count += int(mask.sum())
    return total / max(count, 1)
