"""Modules of the user, by forward hooks on their submodules."""

import copy
import functools

import torch
from torch import Tensor, nn

from pyfeat._backbones.body import Body, Network, hash_weights, to_device
from pyfeat._backbones.layers import OP, check_known, to_map


class _LastLayerReached(BaseException):
    """Ends a forward pass; not an Exception, so that no handler in the module swallows it."""


class _Hooked(Body):
    """Any module, its submodules' outputs taken by forward hooks.

    Hooks on a module that belongs to the user exist only during a call. On a copy they stay,
    because compiled code must not see them change; it needs no early stop either, since the
    compiler drops what no map depends on.
    """

    def __init__(
        self, module: nn.Module, layers: tuple[str, ...], digest: str | None, *, compile: bool
    ) -> None:
        super().__init__(layers, digest or "")
        self.module = module
        self.compiled = compile
        self.taps: dict[str, Tensor] = {}
        self.size = (0, 0)
        if compile:
            self.attach()

    def fingerprint(self) -> str:
        return self.digest or hash_weights(self.module)

    def forward(self, images: Tensor) -> list[Tensor]:
        self.taps, self.size = {}, (images.shape[2], images.shape[3])
        if self.compiled:
            self.module(images)
        else:
            self.run_and_restore(images)
        taps, self.taps = self.taps, {}
        if len(taps) < len(self.layers):
            unreached = [layer for layer in self.layers if layer not in taps]
            message = f"{OP}: layers must run in the forward pass, got {unreached}, which do not"
            raise ValueError(message)
        return [taps[layer] for layer in self.layers]

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        def keep(layer: str, _module: nn.Module, _inputs: object, output: object) -> None:
            if layer in self.taps:
                return
            # A copy: the next submodule may work in place.
            self.taps[layer] = to_map(output, layer, self.size, None).clone()
            if len(self.taps) == len(self.layers) and not self.compiled:
                raise _LastLayerReached

        return [
            self.module.get_submodule(layer).register_forward_hook(functools.partial(keep, layer))
            for layer in self.layers
        ]

    def run_and_restore(self, images: Tensor) -> None:
        training = [(module, module.training) for module in self.module.modules()]
        handles = self.attach()
        try:
            self.module.eval()
            self.module(images)
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training:
                module.training = mode


def from_module(
    module: nn.Module,
    layers: tuple[str, ...] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    compile: bool,
) -> Network:
    """Take maps from a module, which is copied if it must move, change dtype or be compiled."""
    if layers is None:
        message = f"{OP}: layers must name submodules when spec is a module, got None"
        raise ValueError(message)
    name = f"module:{type(module).__name__}"
    check_known(layers, [n for n, _ in module.named_modules(remove_duplicate=False)], name)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    old = tensors[0] if tensors else torch.empty(0)
    device, dtype = to_device(device or old.device), dtype or old.dtype
    digest = None  # the user may go on training the module
    if compile or device != old.device or dtype != old.dtype:
        digest = hash_weights(module)
        module = copy.deepcopy(module).to(device, dtype).eval().requires_grad_(False)
    body = _Hooked(module, layers, digest, compile=compile)
    return Network(name, body, device, dtype, torch.contiguous_format, compile)
