"""The CUDA module is loaded on first use, and says why it cannot be."""

import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pyfeat
from pyfeat._backends import BACKENDS, select_backend
from pyfeat._cuda_ops import loading
from pyfeat._cuda_ops.loading import architecture_obstacles, missing_for_cuda
from pyfeat._cuda_ops.served import SERVED

RELEASE = ["80-real", "86-real", "89-real", "90a-real", "100-real", "120-real", "90-virtual"]
BUILT, NEWER_DRIVER, OLD_DRIVER = 13000, 13010, 12080


@pytest.fixture(autouse=True)
def _nothing_is_known_beforehand() -> Iterator[None]:
    loading._why_not_loaded.cache_clear()
    yield
    loading._why_not_loaded.cache_clear()


@pytest.mark.parametrize(
    "capability",
    [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1), (15, 0)],
)
def test_a_release_runs_on_every_gpu_from_ampere_on(capability: tuple[int, int]) -> None:
    assert architecture_obstacles(capability, RELEASE, True) == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 1)])
def test_machine_code_needs_no_new_driver(capability: tuple[int, int]) -> None:
    assert architecture_obstacles(capability, RELEASE, False) == []


@pytest.mark.parametrize(
    ("capability", "architectures", "driver_reads_ptx", "reason"),
    [
        ((7, 5), RELEASE, True, "built for 80-real, .*, the GPU has compute capability 7.5"),
        ((11, 0), RELEASE, False, "capability 11.0, and the driver is older than their PTX"),
        ((8, 0), ["86-real"], True, "built for 86-real, the GPU has compute capability 8.0"),
        ((9, 0), ["80-real"], True, "built for 80-real, the GPU"),
        ((9, 1), ["90a-real"], True, "built for 90a-real, the GPU has compute capability 9.1"),
        ((10, 0), ["90a"], True, "built for 90a, the GPU has compute capability 10.0"),
        ((8, 0), ["90-virtual"], True, "built for 90-virtual, the GPU"),
    ],
)
def test_a_gpu_that_nothing_was_built_for_is_refused(
    capability: tuple[int, int], architectures: list[str], driver_reads_ptx: bool, reason: str
) -> None:
    (found,) = architecture_obstacles(capability, architectures, driver_reads_ptx)
    assert re.search(reason, found)


def test_machine_code_and_ptx_of_one_name_are_both_there() -> None:
    assert architecture_obstacles((8, 6), ["80"], False) == []
    assert architecture_obstacles((9, 0), ["80"], True) == []


def test_a_build_without_cuda_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    (reason,) = missing_for_cuda()
    assert "pip install -C cmake.define.PYFEAT_CUDA=ON" in reason
    report: Any = pyfeat.info()
    assert report["backends"]["cuda"] == f"missing: {reason}"
    assert report["cuda_build"] is None


def test_a_module_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: object())

    monkeypatch.delattr(pyfeat, "_cuda", raising=False)
    monkeypatch.setitem(sys.modules, "pyfeat._cuda", None)  # an import of it fails
    (reason,) = missing_for_cuda()
    assert reason.startswith("pyfeat._cuda cannot be loaded: ")


@pytest.mark.parametrize(
    ("driver", "gpu", "reason"),
    [
        (0, None, "there is no NVIDIA driver"),
        (OLD_DRIVER, (8, 0), "the driver supports CUDA 12.8, kernels need 13.0"),
        (BUILT, None, "torch sees no CUDA GPU"),
        (BUILT, (7, 5), "kernels were built for"),
        (NEWER_DRIVER, (9, 0), None),
        (NEWER_DRIVER, (11, 0), None),
    ],
)
def test_driver_and_gpu_are_asked(
    driver: int, gpu: tuple[int, int] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = SimpleNamespace(
        runtime_version=lambda: BUILT,
        driver_version=lambda: driver,
        architectures=lambda: RELEASE,
    )
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    monkeypatch.setattr(pyfeat, "_cuda", module, raising=False)
    monkeypatch.setitem(sys.modules, "pyfeat._cuda", module)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    missing = missing_for_cuda()
    assert len(missing) == (reason is not None)
    assert all(each.startswith(reason or "") for each in missing)
    assert loading.build_report() == {"cuda": "13.0", "architectures": RELEASE}


def test_cuda_is_tried_before_triton() -> None:
    assert BACKENDS == ("cpu", "cuda", "triton", "reference")


@pytest.mark.parametrize(
    "op", ["knn", "range_search", "info_nce", "deform_attn", "match", "sinkhorn"]
)
def test_every_op_takes_the_backend_and_says_why_not(op: str) -> None:
    lacks = "" if op in SERVED else f"it has no {op}; "
    with pytest.raises(NotImplementedError) as caught:
        select_backend(op, "cuda", torch.zeros(2, 2))
    assert str(caught.value) == (
        f"{op}: backend 'cuda' does not support these inputs (cuda: {lacks}inputs are on cpu)"
    )


def test_importing_pyfeat_loads_no_cuda_module() -> None:
    program = "import pyfeat, sys; pyfeat.info; assert 'pyfeat._cuda' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
