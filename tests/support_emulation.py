"""CUDA emulated on a CPU: kernels, launchers and bindings of csrc/cuda, compiled by a C++ compiler.

What the toolkit and ``csrc/cuda/device`` provide comes from ``tests/native/emulated_cuda``, whose
``emulation.hpp`` says what it checks. Objects are kept in ``build/emulated_cuda`` under the hash of
what they were made of.
"""

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/cuda"
EMULATION = ROOT / "tests/native/emulated_cuda"
_KEPT = ROOT / "build/emulated_cuda"

_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"),
    *(f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"),
    *("-DPYFEAT_EMULATED_CUDA", '-DPYFEAT_VERSION="emulated"'),
    '-DPYFEAT_CUDA_ARCHITECTURES="80-real,90a-real"',
)
# Every access of a kernel calls a hook; lines are for messages.
_UNDEFINED = (
    "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
)
_KERNEL_FLAGS = (
    *("-x", "c++", "-O1", "-g1", "-fno-threadsafe-statics"),
    *("-fsanitize=thread", f"-fsanitize={_UNDEFINED}", "--param", "tsan-distinguish-volatile=1"),
)
_MODULE_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def emulated_program(source: Path) -> Path:
    """A program of one file of kernels."""
    sources = [source, CUDA / "launch.cpp", *sorted(EMULATION.glob("*.cpp"))]
    return _linked(source.stem, sources, ("-rdynamic",))


def emulated_module() -> ModuleType:
    """``pyfeat._cuda`` of the kernels as they are, in place of any other."""
    sources = [*CUDA.rglob("*.cu"), *CUDA.rglob("*.cpp"), *EMULATION.glob("*.cpp")]
    path = _linked("_cuda" + _MODULE_SUFFIX, sorted(sources), ("-shared", "-Wl,-Bsymbolic"))
    spec = importlib.util.spec_from_file_location("pyfeat._cuda", path)
    if spec is None or spec.loader is None:
        message = f"{path} is no module"
        raise RuntimeError(message)
    sys.modules.pop("pyfeat._cuda", None)  # pybind11 would give it again
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pyfeat._cuda"] = module
    vars(importlib.import_module("pyfeat"))["_cuda"] = module
    return module


class Emulation:
    """What tests can ask of an emulated module."""

    def __init__(self, module: ModuleType) -> None:
        self._library = ctypes.CDLL(str(module.__file__))

    def allow(self, tensor: Tensor) -> None:
        """Let kernels touch the elements of ``tensor``."""
        if tensor.numel() > 0:
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self._library.emulated_cuda_allow(
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_size_t((last + 1) * tensor.element_size()),
            )

    def forget_all(self) -> None:
        """No buffer may be touched."""
        self._library.emulated_cuda_forget_all()

    @contextmanager
    def device(
        self, *, capability: int = 90, multiprocessors: int = 2, backwards: bool = False
    ) -> Iterator[None]:
        """Another device; ``backwards``: blocks and threads run in descending order."""
        self._library.emulated_cuda_set_device(capability, multiprocessors, backwards)
        yield
        self._library.emulated_cuda_set_device(90, 2, False)


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++, whose hooks the emulation needs, is not installed")
    return compiler


@cache
def _headers_hash() -> str:
    headers = [
        path
        for folder in (ROOT / "csrc", EMULATION)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".hpp", ".h", ".cuh")
    ]
    return _hash(*(path.read_bytes() for path in headers))


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _binding_flags() -> tuple[str, ...]:
    """Headers of pybind11: those that torch brings are always there."""
    torch_headers = Path(torch.__file__).parent / "include"
    python_headers = sysconfig.get_paths()["include"]
    return ("-O0", "-isystem", str(torch_headers), "-isystem", python_headers)


def _flags_of(source: Path) -> tuple[str, ...]:
    if source.suffix == ".cu":
        return (*_FLAGS, *_KERNEL_FLAGS)
    if source.stem.startswith("bindings"):
        return (*_FLAGS, *_binding_flags())
    return (*_FLAGS, "-O2")


def _object_of(source: Path) -> Path:
    flags = _flags_of(source)
    key = _hash(_headers_hash().encode(), source.read_bytes(), " ".join(flags).encode())
    path = _KEPT / f"{source.stem}-{key}.o"
    if not path.exists():
        unfinished = path.with_suffix(".part")
        _run([_compiler(), *flags, "-c", str(source), "-o", str(unfinished)])
        unfinished.rename(path)
    return path


def _linked(name: str, sources: list[Path], flags: tuple[str, ...]) -> Path:
    _KEPT.mkdir(parents=True, exist_ok=True)
    with (_KEPT / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, others find what it built
        objects = list(pool.map(_object_of, sources))
        folder = _KEPT / _hash(*(str(path).encode() for path in objects))
        path = folder / name
        if not path.exists():
            folder.mkdir(exist_ok=True)
            unfinished = folder / f"{name}.part"
            _run([_compiler(), *flags, *map(str, objects), "-ldl", "-o", str(unfinished)])
            unfinished.rename(path)
        return path


def _run(command: list[str]) -> None:
    done: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stderr}", pytrace=False)
