"""The Triton kernels for the tests: on an NVIDIA GPU where there is one, else interpreted.

Triton's interpreter executes the same source in NumPy: slowly, so sizes are small.
"""

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfeat import _contrast_cuda, _softplus
from pyfeat._pairs import Pairs

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is missing", allow_module_level=True)

# Largest relative error of a number that is rounded to the dtype.
UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("euclidean", "sqeuclidean", "cosine", "inner_product")


def _import_interpreted() -> None:
    """Import triton so that it interprets, which its modules decide once, when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        similarity = importlib.import_module("pyfeat._triton.similarity")
        interpreter = importlib.import_module("triton.runtime.interpreter")
        standard = importlib.import_module("triton.language.standard")
        importlib.import_module("pyfeat._triton.contrast")
        importlib.import_module("pyfeat._triton.sampling_gradient")
        similarity.knn(torch.zeros(1, 1), torch.zeros(1, 1), 1, "euclidean")  # imports the rest
    if not isinstance(standard.cdiv, interpreter.InterpretedFunction):
        message = f"triton was imported before {__name__}, which {similarity.__name__} needs first"
        raise RuntimeError(message)

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = id(self.fn.__globals__)
        if scope not in patched:
            patched.add(scope)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    # The interpreter patches triton.language at every call of a function inside of a kernel, which
    # takes most of its time; once for each module is enough.
    interpreter.InterpretedFunction.__call__ = call


if DEVICE == "cpu":
    _import_interpreted()
similarity: Any = importlib.import_module("pyfeat._triton.similarity")
frame: Any = importlib.import_module("pyfeat._frame")
pack: Any = importlib.import_module("pyfeat._triton.pack")
shortlist: Any = importlib.import_module("pyfeat._triton.shortlist")
rank: Any = importlib.import_module("pyfeat._triton.rank")
contrast: Any = importlib.import_module("pyfeat._triton.contrast")
triton_product_kernels: Any = importlib.import_module("pyfeat._triton.contrast_products")
triton_sums_kernels: Any = importlib.import_module("pyfeat._triton.contrast_sums")
contrast_tiles: Any = importlib.import_module("pyfeat._triton.contrast_tiles")
tiles: Any = importlib.import_module("pyfeat._triton.tiles")
tile_table: Any = importlib.import_module("pyfeat._triton.tile_table")
sampling: Any = importlib.import_module("pyfeat._triton.sampling")
sampling_arguments: Any = importlib.import_module("pyfeat._triton.sampling_arguments")
sampling_gradient: Any = importlib.import_module("pyfeat._triton.sampling_gradient")
sampling_sorted: Any = importlib.import_module("pyfeat._triton.sampling_sorted")


def triton_knn(
    queries: Tensor, memory: Tensor, k: int, metric: str, *, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The launcher, on DEVICE, for tensors of the CPU."""
    distances, indices = similarity.knn(
        queries.to(DEVICE),
        memory.to(DEVICE),
        k,
        metric,
        allowed=None if allowed is None else allowed.to(DEVICE),
    )
    return distances.cpu(), indices.cpu()


def moved(pairs: Pairs) -> Pairs:
    """To DEVICE; what is one tensor stays one."""
    tensors = {id(x): x.to(DEVICE) for x in pairs[:5] if isinstance(x, Tensor)}
    return Pairs(*(tensors.get(id(x), x) for x in pairs))  # type: ignore[arg-type]


def masks_of(pairs: Pairs, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which pairs are positive, and which are left out, (L, S) each."""
    positive = left_out = torch.zeros((num_rows, num_columns), dtype=torch.bool)
    if pairs.row_ids is not None and pairs.column_ids is not None:
        positive = pairs.row_ids[:, None] == pairs.column_ids
    if pairs.row_groups is not None and pairs.column_groups is not None:
        left_out = pairs.row_groups[:, None] == pairs.column_groups
    left_out = left_out & ~(positive & pairs.keep_positives)
    return positive & ~left_out, left_out


class TritonOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the ops over pairs as on a GPU, on tensors of any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        launchers = {
            torch.ops.pyfeat.pair_sums.default: _contrast_cuda.forward,
            torch.ops.pyfeat.pair_sums_backward.default: _contrast_cuda.backward,
            torch.ops.pyfeat.weighted_features.default: _contrast_cuda.weighted,
            torch.ops.pyfeat.pair_softplus.default: _softplus._run_forward,
            torch.ops.pyfeat.pair_softplus_backward.default: _softplus._run_backward,
        }
        return launchers.get(func, func)(*args, **(kwargs or {}))
