"""The device layer, emulated as the manuals define it, and what the emulation finds in kernels."""

import subprocess
from pathlib import Path

import pytest

from tests.support_emulation import emulated_program

NATIVE = Path(__file__).parent / "native"


def test_the_device_layer_does_what_plain_sums_do() -> None:
    program = emulated_program(NATIVE / "check_device.cu")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr


def test_the_emulated_module_is_that_of_the_bindings() -> None:
    support = pytest.importorskip("tests.support_cuda")
    if support.EMULATION is None:
        pytest.skip("there is a GPU")
    from pyfeat import _cuda

    assert _cuda.__version__ == "emulated"
    assert _cuda.architectures() == ["80-real", "90a-real"]
    assert _cuda.driver_version() == _cuda.runtime_version() == 13000
