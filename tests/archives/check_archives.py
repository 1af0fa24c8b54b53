"""What the archives of a release may hold: ``python tests/archives/check_archives.py dist/*``.

Names what is wrong with a wheel or an sdist and exits with 1. Of compiled modules it reads what
they need from the machine they come to: no torch, no second OpenMP, no CUDA runtime, no symbol
that a system of the promised age lacks.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

DISTRIBUTION = "pyfeat_kernels"
SUFFIXES = {".py", ".pyi", ".html", ".json", ".so", ".pyd"}
DEPENDENCIES = {"numpy", "torch"}
EXTRAS = {"anomaly", "bank", "demo", "gpu", "hf", "onnx", "timm", "train"}
SIZE_LIMIT = 10_000_000  # bytes of a wheel
SIZE_LIMIT_CUDA = 100_000_000  # what PyPI takes

# Libraries that every Linux with a C++ runtime has.
NEEDED = {
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"),
    *("libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
# The newest symbols of manylinux_2_28: what AlmaLinux 8 has.
CEILINGS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# Symbols that carry a newer version when built on a newer system and are not needed, or exist in
# an older version, when built on the oldest: those of libpthread, libdl and librt (moved in glibc
# 2.34), of libm without errno (2.29), and what headers of newer compilers call.
RENEWED = re.compile(
    r"(pthread|sem|timer)_\w+|dl(m?open|v?sym|close|error|addr1?|info)|shm_(open|unlink)"
    r"|(exp|exp2|log|log2|pow)f?"
    r"|__libc_single_threaded|__isoc23_\w+|f?stat(64)?|__libc_start_main"
    r"|_ZSt28__throw_bad_array_new_lengthv|_ZNSt18condition_variable\w+"
    r"|_ZNSt7__cxx1119basic_ostringstream\w+C1Ev|_ZNSt15__exception_ptr13exception_ptr\w+"
    r"|_ZSt25__throw_bad_function_callv|__cxa_call_terminate"
)
UNVERSIONED = re.compile(r"_?Py\w+|_ITM_\w+|__gmon_start__|__cxa_finalize|__tls_get_addr")


def wheel_problems(path: Path, *, modules: Iterable[str] = ("_C",)) -> list[str]:
    """What is wrong with a wheel that carries the compiled ``modules``, ``_cuda`` if it has it."""
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        problems = name_problems(names)
        compiled = [name for name in names if PurePosixPath(name).suffix in {".so", ".pyd"}]
        found = sorted(PurePosixPath(name).name.partition(".")[0] for name in compiled)
        if found not in (sorted(modules), sorted({*modules, "_cuda"})):
            problems.append(f"compiled modules must be {sorted(modules)}, got {found}")
        limit = SIZE_LIMIT_CUDA if "_cuda" in found else SIZE_LIMIT
        if path.stat().st_size > limit:
            problems.append(f"size must be at most {limit} bytes, got {path.stat().st_size}")
        metadata = [name for name in names if name.endswith(".dist-info/METADATA")]
        for name in metadata:
            problems += metadata_problems(Parser().parsestr(wheel.read(name).decode()))
        with tempfile.TemporaryDirectory() as folder:
            for name in compiled:
                problems += module_problems(Path(wheel.extract(name, folder)))
    return problems


def name_problems(names: list[str]) -> list[str]:
    """What is wrong with the names of the files in a wheel."""
    problems = []
    info = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    top_level = {name.partition("/")[0] for name in names} - info
    if top_level != {"pyfeat"} or len(info) != 1:
        problems.append(f"top level must be pyfeat and its dist-info, got {top_level | info}")
    for name in names:
        inside = name.startswith("pyfeat/")
        if inside and PurePosixPath(name).suffix not in SUFFIXES and name != "pyfeat/py.typed":
            problems.append(f"{name}: no such file belongs in a wheel")
    folder = next(iter(info), "")
    for name in (
        *("pyfeat/__init__.py", "pyfeat/py.typed", "pyfeat/_C.pyi", "pyfeat/_triton/tiles.json"),
        *(f"{folder}/METADATA", f"{folder}/RECORD", f"{folder}/entry_points.txt"),
        f"{folder}/licenses/LICENSE",
    ):
        if name not in names:
            problems.append(f"{name}: missing")
    return problems


def metadata_problems(metadata: Message) -> list[str]:
    """What is wrong with the metadata of a wheel."""
    requirements = metadata.get_all("Requires-Dist", [])
    needed = {re.split(r"[\s<>=!~\[;(]", text)[0] for text in requirements if "extra" not in text}
    pairs: dict[str, tuple[object, object]] = {
        "name": (metadata["Name"], DISTRIBUTION.replace("_", "-")),
        "Python": (metadata["Requires-Python"], ">=3.10"),
        "licence": (metadata["License-Expression"], "Apache-2.0"),
        "dependencies": (needed, DEPENDENCIES),
        "extras": (set(metadata.get_all("Provides-Extra", [])), EXTRAS),
    }
    return [
        f"metadata: {name} must be {expected}, got {got}"
        for name, (got, expected) in pairs.items()
        if got != expected
    ]


def module_problems(path: Path) -> list[str]:
    """What is wrong with a compiled module; those of other formats than ELF are not read."""
    if path.read_bytes()[:4] != b"\x7fELF":
        return []
    problems = []
    dynamic = _output("readelf", "--dynamic", "--wide", path)
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if library not in NEEDED:
            problems.append(f"must not need {library}")
    if "(RPATH)" in dynamic or "(RUNPATH)" in dynamic:
        problems.append("must not name a place to find libraries in")
    initialiser = f"PyInit_{path.name.partition('.')[0]}"
    exported = set(_symbols(path, "--defined-only")) - {"_init", "_fini"}
    if exported != {initialiser}:
        problems.append(f"must export {initialiser} alone, got {sorted(exported)[:5]}")
    for symbol in _symbols(path, "--undefined-only"):
        name, _, version = symbol.partition("@")
        family, _, number = version.lstrip("@").partition("_")
        if not version:
            if not UNVERSIONED.fullmatch(name):
                problems.append(f"must not use {name}")
        elif family not in CEILINGS:
            problems.append(f"must not use {symbol}")
        elif _numbers(number) > CEILINGS[family] and not RENEWED.fullmatch(name):
            problems.append(f"{symbol} is newer than manylinux_2_28")
    return [f"{path.name}: {problem}" for problem in problems]


def sdist_problems(path: Path) -> list[str]:
    """What is wrong with a source distribution: all that a build takes, nothing that it makes."""
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    top_level = {name.partition("/")[0] for name in names}
    problems = [
        f"{name}: missing"
        for name in (
            *("CMakeLists.txt", "LICENSE", "Makefile", "PKG-INFO", "README.md", "pyproject.toml"),
            *("csrc/bindings.cpp", "pyfeat/__init__.py", "pyfeat/py.typed", "pyfeat/_C.pyi"),
            *("tests/conftest.py", "benchmarks/RESULTS.md", "tests/archives/smoke.py"),
        )
        if name not in names
    ]
    problems += [
        f"{name}: must not be part of an sdist"
        for name in sorted(top_level & {"build", "dist", "demo", ".venv", ".git", ".github"})
    ]
    return problems + [
        f"{name}: must not be part of an sdist"
        for name in sorted(names)
        if PurePosixPath(name).suffix in {".so", ".pyd", ".pyc", ".o", ".a"}
    ]


def _symbols(path: Path, kind: str) -> list[str]:
    listed = _output("nm", "--dynamic", "--with-symbol-versions", kind, path)
    return [line.split()[-1] for line in listed.splitlines()]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def main() -> int:
    """Print the problems of each archive; 1 if there is any, or if there is no archive."""
    parser = argparse.ArgumentParser(description="Check wheels and sdists of pyfeat.")
    parser.add_argument("archives", nargs="+", type=Path)
    found = False
    for path in parser.parse_args().archives:
        problems = wheel_problems(path) if path.suffix == ".whl" else sdist_problems(path)
        found |= bool(problems)
        print(f"{path.name}: {'; '.join(problems) or 'as it should be'}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
