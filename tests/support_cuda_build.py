"""What nvcc makes of the CUDA kernels; needs no GPU.

The module is built by CMake as for a release, with warnings as errors, for two architectures, into
``build/cuda_tests``, where later runs find it; only what has changed is compiled anew.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/cuda_tests"
ARCHS = {80: "sm_80", 90: "sm_90a"}

_FLAGS = (
    *("-std=c++17", "--fmad=false", "--expt-relaxed-constexpr", "--Werror=all-warnings"),
    *("-Xcompiler=-Wall,-Wextra,-Wconversion,-Werror", f"-I{ROOT / 'csrc'}", "--threads=2"),
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    arch: int
    name: str  # without namespaces and arguments
    usage: dict[str, int]  # REG, STACK, SHARED, LOCAL in bytes
    instructions: str  # of the machine


def nvcc() -> str:
    """The compiler; skips the test where there is none."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not installed")
    return compiler


def cuda_module_path() -> Path:
    """``_cuda``, built for both architectures."""
    nvcc()
    cmake = _tool("cmake")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11 is not installed: pip install --group dev")
    import pybind11

    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "SKBUILD_PROJECT_VERSION": "0.0.0",
        "PYFEAT_CUDA": "ON",
        "PYFEAT_CUDA_ARCHITECTURES": "80-real;90a-real",
        "PYFEAT_WARNINGS_AS_ERRORS": "ON",
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": _python(),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defined = [f"-D{name}={value}" for name, value in options.items()]
        configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *defined]
        stamp = BUILD / "configured"
        if not stamp.exists() or stamp.read_text() != "\n".join(configure):
            (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
            _run(configure)
            stamp.write_text("\n".join(configure))
        jobs = str(min(2, os.cpu_count() or 1))
        _run([cmake, "--build", str(BUILD), "--target", "_cuda", "--parallel", jobs])
    (module,) = BUILD.glob("_cuda*.so")
    return module


def cuda_program(source: Path) -> Path:
    """A program of one file of kernels, for both architectures."""
    program = BUILD / source.stem
    sources = [source, ROOT / "csrc/cuda/launch.cpp"]
    read = [*sources, *(ROOT / "csrc/cuda").rglob("*.cuh"), *(ROOT / "csrc/cuda").rglob("*.hpp")]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in read)
        if not program.exists() or program.stat().st_mtime < newest:
            _run([nvcc(), *_FLAGS, *map(str, sources), "-o", str(program)])
    return program


@cache
def kernels_in(binary: Path) -> list[Kernel]:
    """Every kernel of a program or module, with what it takes and what it is."""
    cuobjdump = str(_cuobjdump())
    listed = subprocess.run(
        [cuobjdump, "--list-elf", binary], capture_output=True, text=True, check=False
    )
    if "does not contain device code" in listed.stdout + listed.stderr:
        return []
    usages = _sections(_run([cuobjdump, "--dump-resource-usage", str(binary)]), r"Function (\S+):")
    listings = _sections(_run([cuobjdump, "--dump-sass", str(binary)]), r"Function : (\S+)")
    kernels = []
    for (arch, symbol), text in usages.items():
        usage = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}
        kernels.append(Kernel(arch, _plain_name(symbol), usage, listings[arch, symbol]))
    return kernels


def _sections(text: str, header: str) -> dict[tuple[int, str], str]:
    """The text of each function of each architecture, by its mangled name."""
    sections = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        arch = int(re.sub(r"\D", "", part.split("\n", 1)[0]))
        pieces = re.split(header, part)
        for symbol, body in zip(pieces[1::2], pieces[2::2], strict=True):
            sections[arch, symbol] = body
    return sections


def _plain_name(symbol: str) -> str:
    """The last of the nested names of a mangled one."""
    names, at = [], 2
    at += symbol[at] == "N"
    while match := re.compile(r"\d+").match(symbol, at):
        at = match.end() + int(match[0])
        names.append(symbol[match.end() : at])
    return names[-1]


def _cuobjdump() -> Path:
    """That of the toolkit, or the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("cuobjdump is not installed, nor triton, which brings it")
    folder = Path(spec.origin).parent / "backends/nvidia/bin"
    if not (folder / "cuobjdump").exists():
        pytest.skip("this triton does not bring cuobjdump")
    # It looks for nvdisasm on the path.
    os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}{folder}"
    return folder / "cuobjdump"


def _python() -> str:
    """What this interpreter was installed as: CMake asks it for its headers."""
    name = f"python3.{sys.version_info.minor}"
    installed = Path(sysconfig.get_config_var("BINDIR") or "", name)
    return str(installed if installed.exists() else sys.executable)


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout
