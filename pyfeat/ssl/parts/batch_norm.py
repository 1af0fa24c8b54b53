"""Batch normalisation with the statistics of all processes, on the CPU too."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pyfeat.ssl.parts.processes import sum_over_processes


class BatchNorm(nn.modules.batchnorm._NormBase):
    """``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one, over the batches of all processes.

    Alone it calls torch's kernel. On several processes the statistics in training are those of the
    rows of all, of any numbers: what a network computes does not depend on how many share a batch.
    ``SyncBatchNorm`` does so on GPUs only. Outside training nothing is exchanged.

    Args:
        num_features: C.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics.
        affine: Learn a scale and a shift.

    Raises:
        ValueError: In training, if there is but one value a channel in all processes.

    Precision: statistics in float32, float64 for float64 input.

    Examples:
        >>> BatchNorm(1)(torch.tensor([[0.0], [2.0]])).detach()
        tensor([[-1.0000],
                [ 1.0000]])
    """

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same."""
        if x.ndim < 2 or x.shape[1] != self.num_features:
            got = tuple(x.shape)
            message = f"BatchNorm: x must have shape (B, {self.num_features}, ...), got {got}"
            raise ValueError(message)
        together = self.training and dist.is_available() and dist.is_initialized()
        if not together or dist.get_world_size() == 1:
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            return functional.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum or 0.0,
                self.eps,
            )
        return self._over_processes(x)

    def _over_processes(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        count = wide.new_tensor([x.numel() / max(1, self.num_features)])
        sums = sum_over_processes(torch.cat([wide.sum(axes), count]))
        total = sums[-1].detach()
        if total <= 1:
            message = "BatchNorm: x must have more than one value a channel, got one in training"
            raise ValueError(message)
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        squares = sum_over_processes(centred.square().sum(axes))
        var = squares / total
        self._remember(mean.detach(), (squares / (total - 1)).detach())
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        normalized: Tensor = y.to(x.dtype)
        return normalized

    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        momentum = self.momentum or 0.0
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            if running is not None:
                running.lerp_(value.to(running.dtype), momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
