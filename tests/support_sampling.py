"""Deformable attention by the kernels of GPUs, against the float64 reference.

Triton interprets its kernels where there is no GPU, and CUDA's are emulated: sizes are small.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfeat import _sampling_cuda, reference
from tests.support_attention import Inputs, gradients_of

MODES = [
    {},
    {"padding": "border", "align_corners": True, "softmax": True},
    {"align_corners": True, "softmax": True},
    {"padding": "border"},
    {"sampling": "discrete", "softmax": True},
]
ALL = (True, True, True)


class Kernels(NamedTuple):
    """Those of one backend, on tensors of the CPU."""

    backend: str
    device: str

    def arguments(self, inputs: Inputs, **modes: Any) -> tuple[Any, ...]:
        """Of the registered ops, on the device."""
        value, locations, weights = (x.to(self.device) for x in inputs.tensors())
        return (
            value,
            [size for shape in inputs.spatial_shapes for size in shape],
            inputs.num_points,
            locations,
            weights,
            modes.get("padding") == "border",
            modes.get("align_corners", False),
            modes.get("sampling") == "discrete",
            modes.get("softmax", False),
            self.backend,
        )

    def sums(self, inputs: Inputs, **modes: Any) -> Tensor:
        return _sampling_cuda.forward(*self.arguments(inputs, **modes)).cpu()

    def gradients(
        self,
        inputs: Inputs,
        grad_output: Tensor,
        needs: tuple[bool, bool, bool] = ALL,
        **modes: Any,
    ) -> list[Tensor]:
        given = (*self.arguments(inputs, **modes), grad_output.to(self.device), *needs)
        return [x.cpu() for x in _sampling_cuda.backward(*given)]

    def all(self, inputs: Inputs, grad_output: Tensor, **modes: Any) -> list[Tensor]:
        return [self.sums(inputs, **modes), *self.gradients(inputs, grad_output, **modes)]

    @property
    def launched(self) -> list[str]:
        """What calls kernels."""
        if self.backend == "triton":
            names = ("._sampled_sums", "_gradient._sampling_gradients", "_sorted._corner_terms")
            return [f"pyfeat._triton.sampling{name}_kernel" for name in names]
        parts = ("", "_backward", "_count_terms", "_gather_terms")
        return [f"pyfeat._cuda.deform_attn{part}" for part in parts]

    @property
    def max_terms(self) -> str:
        """How many terms are sorted at a time."""
        module = "_triton.sampling_sorted" if self.backend == "triton" else "_cuda_ops.sampling"
        return f"pyfeat.{module}._MAX_TERMS"


class SamplingOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the ops of deformable attention by the kernels of a backend, on tensors of any device."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._backend = kernels.backend

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        launchers: dict[Any, Any] = {
            torch.ops.pyfeat.deform_attn.default: _sampling_cuda.forward,
            torch.ops.pyfeat.deform_attn_backward.default: _sampling_cuda.backward,
            torch.ops.pyfeat.deform_attn_second.default: _sampling_cuda.second,
        }
        if func in launchers:
            return launchers[func](*args[:9], self._backend, *args[10:])
        return func(*args, **(kwargs or {}))


def kernels_of(backend: str) -> Kernels:
    """Skips the test where they can neither run nor be emulated."""
    support = importlib.import_module(f"tests.support_{backend}")
    if backend == "cuda" and support.EMULATION is not None:
        support.EMULATION.forget_all()  # the tensors of other tests
    return Kernels(backend, support.DEVICE)


def reference_all(inputs: Inputs, grad_output: Tensor, **modes: Any) -> list[Tensor]:
    """The sums and the three gradients, in the dtype of the inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs.tensors()]
    value, locations, weights = leaves
    out = reference.deform_attn(
        value, inputs.spatial_shapes, locations, weights, num_points=inputs.num_points, **modes
    )
    return [out.detach(), *gradients_of(out, leaves, grad_output.to(out.dtype))]


def assert_right(kernels: Kernels, inputs: Inputs, dtype: torch.dtype, **modes: Any) -> None:
    """Fail unless errors are at most twice those of torch in float32, and of rounding to ``dtype``.

    ``inputs`` are float64; values and weights are rounded to ``dtype``, locations to float32.
    """
    working = torch.promote_types(dtype, torch.float32)
    rounded = inputs.to(dtype, working)
    batch, queries, heads = rounded.sampling_locations.shape[:3]
    grad_output = torch.randn(batch, queries, heads * rounded.value.shape[3]).to(dtype)
    exact = reference_all(rounded.to(torch.float64), grad_output, **modes)
    theirs = reference_all(rounded.to(working), grad_output, **modes)
    torch.use_deterministic_algorithms(False)
    mine = kernels.all(rounded, grad_output, **modes)
    torch.use_deterministic_algorithms(True, warn_only=True)
    mine += kernels.gradients(rounded, grad_output, (True, False, False), **modes)[:1]
    dtypes = (dtype, dtype, working, dtype, dtype)
    pairs = [*zip(exact, theirs, strict=True), (exact[1], theirs[1])]
    for found, (true, torchs), wanted in zip(mine, pairs, dtypes, strict=True):
        assert found.dtype == wanted
        assert found.shape == true.shape
        # In float64 torch is what is exact: allow for a sum in another order.
        unit = torch.finfo(working).eps * (8 if dtype == torch.float64 else 1)
        budget = 2 * (torchs.double() - true).abs().max() + unit * true.abs().max()
        if wanted != working:
            # The interpreter of Triton cuts off what does not fit into bfloat16.
            cuts = kernels == ("triton", "cpu") and dtype == torch.bfloat16
            rounding = torch.finfo(dtype).eps / 2 * (2 if cuts else 1)
            budget = budget + rounding * true.abs() + 2.0**-24
        error = (found.double() - true).abs()
        assert (error <= budget).all(), f"{float(error.max()):.2e} {float(true.abs().max()):.2e}"
