"""A body, which every route makes in its own way, and the backbone around it."""

import abc
import hashlib
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Body(nn.Module, abc.ABC):
    """Normalised images in, one (B, C, h, w) map per layer out."""

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __init__(self, layers: tuple[str, ...], digest: str) -> None:
        super().__init__()
        self.layers = layers
        self.digest = digest

    def size_obstacle(self, height: int, width: int) -> str | None:
        """Say what images must be where this size does not suit the network, else None."""
        return None

    def fingerprint(self) -> str:
        """Return the hash of the weights as they were loaded."""
        return self.digest

    @abc.abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps, in the order of ``layers``."""


class Network:
    """A Backbone: a body, with normalisation, precision and compilation around it."""

    def __init__(
        self,
        name: str,
        body: Body,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        compile: bool,
    ) -> None:
        self.name = name
        self.layers = body.layers
        self._body = body
        self._mean = torch.tensor(body.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(body.std, device=device).view(-1, 1, 1)
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        self._run = torch.compile(self._forward, dynamic=False) if compile else self._forward

    def __call__(self, images: Tensor) -> list[Tensor]:
        if not isinstance(images, Tensor):
            message = f"backbone: images must be a Tensor, got {type(images).__name__}"
            raise TypeError(message)
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            shape = tuple(images.shape)
            message = f"backbone: images must have shape (B, 3, H, W), none 0, got {shape}"
            raise ValueError(message)
        if images.dtype != torch.float32:
            message = f"backbone: images must be float32 in [0, 1], got {images.dtype}"
            raise TypeError(message)
        height, width = images.shape[2:]
        if obstacle := self._body.size_obstacle(height, width):
            message = f"backbone: images must {obstacle}, got {height} x {width}"
            raise ValueError(message)
        # Not inference_mode: its tensors cannot be written to or trained on afterwards, neither
        # the maps nor what a module given by the user may cache in its forward pass.
        with torch.no_grad():
            return self._run(images.to(self._device))

    def fingerprint(self) -> str:
        return self._body.fingerprint()

    def _forward(self, images: Tensor) -> list[Tensor]:
        normalised = (images - self._mean) / self._std
        normalised = normalised.to(self._dtype, memory_format=self._memory_format)
        maps: list[Tensor] = self._body(normalised)
        return [features.float() for features in maps]


def hash_weights(module: nn.Module, skip: Collection[str] = ()) -> str:
    """Return the SHA-256 of names, shapes and bytes of the weights that are not skipped."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name not in skip and isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_device(device: str | torch.device) -> torch.device:
    """Return the device with its index, as tensors report it."""
    return torch.empty(0, device=device).device
