"""The losses as modules: options that stay the same from batch to batch, and learnable scales."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyfeat._contrast_blocks import without_autocast
from pyfeat.losses._nce import clip_loss, info_nce
from pyfeat.losses._self import nt_xent, supcon_loss
from pyfeat.losses._sigmoid import siglip_loss


class _Loss(nn.Module):
    """What a function of features computes with given options.

    Options and, for a batch, further arguments of ``forward`` are the keyword arguments of the
    function. Under autocast it computes as without; features of 16 bits are taken as they are.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        kind = inspect.Parameter.KEYWORD_ONLY
        known = [n for n, p in inspect.signature(function).parameters.items() if p.kind is kind]
        for name in options:
            if name not in known:
                message = (
                    f"{type(self).__name__}: options must be among {', '.join(known)}, got {name}"
                )
                raise TypeError(message)
        self._function, self.options = function, options

    def extra_repr(self) -> str:
        """Of the repr, what stands between the brackets."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _compute(self, *features: Any, **arguments: Any) -> Any:
        with without_autocast(features[0]):
            return self._function(*features, **{**self.options, **arguments})


class InfoNCELoss(_Loss):
    """``info_nce`` as a module.

    Args:
        temperature: > 0.
        **options: Keyword arguments of ``info_nce``, such as ``symmetric`` or ``normalize``.

    Raises:
        TypeError: If ``info_nce`` has no such argument; what it raises itself comes with a batch.

    Examples:
        >>> InfoNCELoss(1.0, normalize=True)
        InfoNCELoss(temperature=1.0, normalize=True)
        >>> InfoNCELoss(1.0)(torch.eye(2), torch.eye(2))
        tensor(0.3133)
    """

    def __init__(self, temperature: float = 0.1, **options: Any) -> None:
        super().__init__(info_nce, temperature=temperature, **options)

    def forward(self, queries: Tensor, keys: Tensor, **arguments: Any) -> Any:
        """As ``info_nce``, of which ``arguments`` are those of a batch, such as ``extra_keys``."""
        return self._compute(queries, keys, **arguments)


class NTXentLoss(_Loss):
    """``nt_xent`` as a module.

    Args:
        temperature: > 0.
        **options: Keyword arguments of ``nt_xent``, such as ``normalize``.

    Raises:
        TypeError: If ``nt_xent`` has no such argument; what it raises itself comes with a batch.

    Examples:
        >>> NTXentLoss(1.0)(torch.eye(2), torch.eye(2))
        tensor(0.5514)
    """

    def __init__(self, temperature: float = 0.5, **options: Any) -> None:
        super().__init__(nt_xent, temperature=temperature, **options)

    def forward(self, z1: Tensor, z2: Tensor, **arguments: Any) -> Any:
        """As ``nt_xent``."""
        return self._compute(z1, z2, **arguments)


class SupConLoss(_Loss):
    """``supcon_loss`` as a module.

    Args:
        temperature: > 0.
        **options: Keyword arguments of ``supcon_loss``, such as ``normalize``.

    Raises:
        TypeError: If ``supcon_loss`` has no such argument; what it raises itself comes with a batch.

    Examples:
        >>> SupConLoss(1.0)(torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 0, 1]))
        tensor(0.5514)
    """

    def __init__(self, temperature: float = 0.1, **options: Any) -> None:
        super().__init__(supcon_loss, temperature=temperature, **options)

    def forward(self, features: Tensor, labels: Tensor, **arguments: Any) -> Any:
        """As ``supcon_loss``."""
        return self._compute(features, labels, **arguments)


class _ScaledLoss(_Loss):
    """A loss with a learnable scale of the similarities, kept as its logarithm."""

    def __init__(
        self,
        function: Callable[..., Any],
        logit_scale: float,
        max_logit_scale: float | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(function, **options)
        most = math.inf if max_logit_scale is None else max_logit_scale
        if not 0.0 < logit_scale < math.inf or not logit_scale <= most:
            wanted = "positive and finite" if most == math.inf else f"in (0, {most}]"
            message = f"{type(self).__name__}: logit_scale must be {wanted}, got {logit_scale}"
            raise ValueError(message)
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))

    @property
    def scale(self) -> Tensor:
        """() float32: the scale itself, with its gradient."""
        log_scale: Tensor = self.logit_scale
        if self.max_logit_scale is not None:
            most = math.log(self.max_logit_scale)
            if self.training:
                # The parameter itself: above its maximum it would have no gradient to come back by.
                with torch.no_grad():
                    log_scale.clamp_(max=most)
            else:
                log_scale = log_scale.clamp(max=most)
        return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp()

    def extra_repr(self) -> str:
        """Of the repr, what stands between the brackets."""
        most = [] if self.max_logit_scale is None else [f"max_logit_scale={self.max_logit_scale}"]
        return ", ".join([*most, *filter(None, [super().extra_repr()])])


class CLIPLoss(_ScaledLoss):
    """``clip_loss`` with a learnable scale.

    The parameter ``logit_scale`` is the logarithm of ``scale``. In training, every forward pass begins by
    limiting it, as is usual after a step; in evaluation only ``scale`` is limited.

    Args:
        logit_scale: Of the similarities, to begin with; > 0, at most the maximum.
        max_logit_scale: None for no limit.
        **options: Keyword arguments of ``clip_loss``, such as ``normalize``.

    Raises:
        TypeError: If ``clip_loss`` has no such argument; what it raises itself comes with a batch.
        ValueError: If the scale is not positive, not finite, or above its maximum.

    Source: Radford et al., Learning transferable visual models from natural language supervision,
    ICML 2021, arXiv:2103.00020.

    Examples:
        >>> loss = CLIPLoss(normalize=True)
        >>> loss
        CLIPLoss(max_logit_scale=100.0, normalize=True)
        >>> loss.logit_scale
        Parameter containing:
        tensor(2.6593, requires_grad=True)
        >>> CLIPLoss(1.0)(torch.eye(2), torch.eye(2)).detach()
        tensor(0.3133)
    """

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        *,
        max_logit_scale: float | None = 100.0,
        **options: Any,
    ) -> None:
        super().__init__(clip_loss, logit_scale, max_logit_scale, options)

    def forward(self, image: Tensor, text: Tensor, **arguments: Any) -> Any:
        """As ``clip_loss``, of which ``arguments`` are those of a batch, such as ``image_ids``."""
        return self._compute(image, text, self.scale, **arguments)


class SigLIPLoss(_ScaledLoss):
    """``siglip_loss`` with a learnable scale and bias.

    The parameter ``logit_scale`` is the logarithm of ``scale``, as in ``CLIPLoss``; ``logit_bias`` is the
    bias itself.

    Args:
        logit_scale: Of the similarities, to begin with; > 0, at most the maximum.
        logit_bias: Of the similarities, to begin with; finite.
        max_logit_scale: None for no limit.
        **options: Keyword arguments of ``siglip_loss``, such as ``normalize``.

    Raises:
        TypeError: If ``siglip_loss`` has no such argument; what it raises itself comes with a batch.
        ValueError: If the scale is not positive, not finite, or above its maximum.

    Source: Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023, arXiv:2303.15343.

    Examples:
        >>> SigLIPLoss(1.0, 0.0)(torch.eye(2), torch.eye(2)).detach()
        tensor(1.0064)
    """

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        max_logit_scale: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(siglip_loss, logit_scale, max_logit_scale, options)
        self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))

    def forward(self, image: Tensor, text: Tensor, **arguments: Any) -> Any:
        """As ``siglip_loss``, of which ``arguments`` are those of a batch, such as ``image_ids``."""
        return self._compute(image, text, self.scale, self.logit_bias, **arguments)
