"""The Triton kernels for the tests: on an NVIDIA GPU where there is one, else interpreted.

Triton's interpreter executes the same source in NumPy: slowly, so sizes are small.
"""

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is missing", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("euclidean", "sqeuclidean", "cosine", "inner_product")


def _import_interpreted() -> None:
    """Import triton so that it interprets, which its modules decide once, when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        similarity = importlib.import_module("pyfeat._triton.similarity")
        interpreter = importlib.import_module("triton.runtime.interpreter")
        standard = importlib.import_module("triton.language.standard")
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
frame: Any = importlib.import_module("pyfeat._triton.frame")
pack: Any = importlib.import_module("pyfeat._triton.pack")
shortlist: Any = importlib.import_module("pyfeat._triton.shortlist")
rank: Any = importlib.import_module("pyfeat._triton.rank")


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
