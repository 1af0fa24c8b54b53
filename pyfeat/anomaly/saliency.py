"""Where an image stands out: three sources of the masks of ``EAR``, behind one interface."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import hash_weights
from pyfeat._checks import check_choice
from pyfeat.anomaly.patchcore import PatchCore
from pyfeat.features import Backbone, load_backbone


class Saliency(abc.ABC):
    """Where images stand out. Equal images must give equal maps.

    Attributes:
        kind: Its name in a saved model; "" is for one's own, which ``EAR.load`` must be given.
    """

    kind: ClassVar[str] = ""

    def fit(self, images: Tensor) -> None:
        """Learn from normal images (N, 3, H, W) float in [0, 1]; not all sources do."""
        return

    @abc.abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Compute maps (B, h, w) of any grid, higher where images (B, 3, H, W) stand out more."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return what tells it from another, such as a hash of its weights."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments that ``load`` needs, as JSON can store them."""
        return {}

    def write_into(self, folder: Path) -> None:
        """Write what was learned into an existing folder."""
        return


class AttentionSaliency(Saliency):
    """Attention of the class token of a vision transformer's last block to the patches.

    Args:
        network: A ``pyfeat.ssl.networks.ViT``, or "run:<folder>" of ``pyfeat train``, such as one
            trained by DINO on the same images; its masks follow what it has learned to look at.
        heads: "mean" of the heads, or their "max" at each patch.

    Raises:
        TypeError: If the network has no ``class_attention``.

    Source: the maps of Caron et al., DINO, ICCV 2021, arXiv:2104.14294.
    """

    kind = "attention"

    def __init__(self, network: nn.Module | str, *, heads: Literal["mean", "max"] = "mean") -> None:
        check_choice("AttentionSaliency", "heads", heads, ("mean", "max"))
        self.spec = network if isinstance(network, str) else None
        if isinstance(network, str):
            if not network.startswith("run:"):
                message = (
                    f"AttentionSaliency: network must be a ViT or 'run:<folder>', got {network!r}"
                )
                raise ValueError(message)
            from pyfeat.ssl.runs import Run

            network = Run(network.removeprefix("run:")).backbone()
        if not hasattr(network, "class_attention"):
            message = (
                f"AttentionSaliency: network must be a ViT of pyfeat.ssl, got "
                f"{type(network).__name__}"
            )
            raise TypeError(message)
        self.network, self.heads = network.eval(), heads

    def __call__(self, images: Tensor) -> Tensor:
        """See the base class."""
        network: Any = self.network
        if network.options.in_channels == 1:
            images = images.mean(dim=1, keepdim=True)
        with torch.no_grad():
            shares: Tensor = network.class_attention(images.to(network.cls_token.device)).cpu()
        return shares.mean(dim=1) if self.heads == "mean" else shares.amax(dim=1)

    def fingerprint(self) -> str:
        """See the base class."""
        return hash_weights(self.network)

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        return {"network": self.spec, "heads": self.heads}


class EnergySaliency(Saliency):
    """Length of the features of a backbone's map, cell by cell.

    Args:
        backbone: As ``pyfeat.features.load_backbone``.
        layers: One stage; None takes the last of the backbone's default.
        device: Of the backbone.
        dtype: Of the backbone.
    """

    kind = "energy"

    def __init__(
        self,
        backbone: str | nn.Module | Backbone = "efficientnet_lite0",
        *,
        layers: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.backbone = load_backbone(backbone, layers=layers, device=device, dtype=dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """See the base class."""
        lengths: Tensor = self.backbone(images)[-1].norm(dim=1)
        return lengths.cpu()

    def fingerprint(self) -> str:
        """See the base class."""
        return self.backbone.fingerprint()

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        named = not self.backbone.name.startswith("module:")
        name = self.backbone.name if named else None
        return {"backbone": name, "layers": list(self.backbone.layers)}


class MemorySaliency(Saliency):
    """Distance of the patches to a memory of normal ones, by ``PatchCore``.

    Args:
        backbone: As ``pyfeat.features.load_backbone``.
        layers: As ``PatchCore``.
        coreset_ratio: As ``PatchCore``.
        options: Further arguments of ``PatchCore``; its ``image_size`` is that of the images.
    """

    kind = "memory"

    def __init__(
        self,
        backbone: str | nn.Module | Backbone = "efficientnet_lite0",
        *,
        layers: Sequence[str] | None = None,
        coreset_ratio: float = 0.1,
        **options: Any,
    ) -> None:
        self._options: dict[str, Any] = {
            "backbone": backbone,
            "layers": layers,
            "coreset_ratio": coreset_ratio,
            **options,
        }
        self.model: PatchCore | None = None

    def fit(self, images: Tensor) -> None:
        """See the base class."""
        height, width = images.shape[2:]
        model = PatchCore(**self._options, image_size=(height, width))
        self.model = model.fit(image.float() for image in images)

    def __call__(self, images: Tensor) -> Tensor:
        """See the base class."""
        if self.model is None:
            message = "MemorySaliency: it must be fitted first, got no memory"
            raise ValueError(message)
        return self.model.score(images.cpu()).maps

    def fingerprint(self) -> str:
        """See the base class."""
        return cast(PatchCore, self.model).backbone.fingerprint()

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        name = cast(PatchCore, self.model).backbone.name
        return {"backbone": None if name.startswith("module:") else name}

    def write_into(self, folder: Path) -> None:
        """See the base class."""
        cast(PatchCore, self.model).write_into(folder)

    @classmethod
    def read_from(
        cls, folder: Path, backbone: nn.Module | Backbone | None, dtype: torch.dtype | None = None
    ) -> "MemorySaliency":
        """Read what ``write_into`` wrote; arguments and errors as ``PatchCore.load``."""
        saliency = cls()
        saliency.model = PatchCore.load(folder, backbone=backbone, dtype=dtype)
        return saliency
