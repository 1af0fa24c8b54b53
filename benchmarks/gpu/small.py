"""Every op once on each GPU backend, at sizes off the tiles: for ``compute-sanitizer``.

``python -m benchmarks.gpu.small``; with ``--rehearse`` by the CPU's kernels.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import pyfeat
from benchmarks.gpu.setting import Setting, backend_states
from pyfeat._backends import Backend
from pyfeat.losses import clip_loss, nt_xent, siglip_loss, supcon_loss

# The cells of two levels, by the number of axes.
_LEVELS: dict[int, list[tuple[int, ...]]] = {
    1: [(7,), (4,)],
    2: [(5, 6), (1, 3)],
    3: [(3, 2, 4), (2, 1, 3)],
}


def small_calls(backend: Backend, device: torch.device) -> dict[str, Callable[[], object]]:
    """By name."""

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=device).to(dtype)

    queries, memory = normal(37, 45), normal(301, 45)
    calls: dict[str, Callable[[], object]] = {
        f"knn, k {k}": lambda k=k: pyfeat.knn(queries, memory, k, backend=backend)  # type: ignore[misc]
        for k in (1, 9, 64)
    }
    for dtype in (torch.float32, torch.bfloat16):
        a, b = normal(131, 40, dtype=dtype), normal(131, 40, dtype=dtype)
        labels = torch.arange(131, device=device) % 7
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "clip_loss": lambda x, y: clip_loss(x, y, 0.5, backend=backend),
            "siglip_loss": lambda x, y: siglip_loss(x, y, 0.5, -1.0, backend=backend),
            "nt_xent": lambda x, y: nt_xent(x, y, temperature=2.0, backend=backend),
            "supcon_loss": lambda x, y, labels=labels: supcon_loss(  # type: ignore[misc]
                x + y, labels, temperature=2.0, backend=backend
            ),
        }
        for name, loss in losses.items():
            calls[f"{name}, {dtype}"] = lambda f=loss, a=a, b=b: _gradients(f, a, b)  # type: ignore[misc]
        for ndim, shapes in _LEVELS.items():
            cells = sum(torch.Size(shape).numel() for shape in shapes)
            value = normal(2, cells, 3, 8, dtype=dtype)
            weights = normal(2, 19, 3, 2, 4, dtype=dtype)
            locations = torch.rand(2, 19, 3, 2, 4, ndim, device=device)

            def attend(
                v: Tensor,
                p: Tensor,
                w: Tensor,
                shapes: list[tuple[int, ...]] = shapes,
            ) -> Tensor:
                return pyfeat.deform_attn(v, shapes, p, w, softmax=True, backend=backend).sum()

            calls[f"deform_attn in {ndim}-D, {dtype}"] = (
                lambda f=attend, v=value, p=locations, w=weights: _gradients(f, v, p, w)  # type: ignore[misc]
            )
    return calls


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    setting = Setting.of(rehearse="--rehearse" in arguments)
    states = backend_states()
    for backend in setting.backends:
        if states[backend] != "available":
            print(f"{backend}: {states[backend]}")
            continue
        for name, call in small_calls(backend, setting.device).items():
            call()
            print(f"{backend}: {name}", flush=True)
    if not setting.rehearsed:
        torch.cuda.synchronize()
    return 0


def _gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
