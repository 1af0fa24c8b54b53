import importlib.util
import os
import sys
from collections.abc import Iterator

import pytest
import torch

# Whoever imports Triton first decides how it runs.
if importlib.util.find_spec("triton") is not None:
    importlib.import_module("tests.support_triton")

# Without it, cuBLAS has no deterministic algorithms. It is read when a device is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# Files that take longest: processes take files in this order, and what ends last should be short.
_LONG = (
    "test_cuda_build",
    "test_triton_compile",
    "test_ssl_training",
    "test_coexistence",
    "test_triton_search",
    "test_cli",
    "test_gpu_benchmarks",
    "test_benchmarks",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that need no GPU but use one where there is one, instead of the interpreter, as gpu."""
    rank = {stem: i for i, stem in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(_LONG)))
    for item in items:
        module = item.getparent(pytest.Module)
        if module is not None and getattr(module.obj, "DEVICE", "cpu") == "cuda":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """An output element that no kernel wrote shows up as NaN instead of a lucky zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _emulated_kernels_touch_tensors_of_one_test() -> Iterator[None]:
    yield
    support = sys.modules.get("tests.support_cuda")
    if support is not None and support.EMULATION is not None:
        support.EMULATION.forget_all()
