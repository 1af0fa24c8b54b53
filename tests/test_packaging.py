"""What is built, and what a release does with it. ``make test-wheel`` installs it for real."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import pyfeat
from pyfeat import _C, losses
from tests.archives import check_archives
from tests.archives.check_archives import (
    metadata_problems,
    module_problems,
    name_problems,
    sdist_problems,
    wheel_problems,
)

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Public functions that are no ops.
NO_OPS = {"cached_step", "info", "memory_budget", "set_memory_budget"}

elf = pytest.mark.skipif(sys.platform != "linux", reason="modules are ELF on Linux only")


def build(kind: str, folder: Path) -> Path:
    """The archive as the build makes it, a wheel without what CMake compiles."""
    program = (
        "import sys; from scikit_build_core import build; "
        f"print(build.build_{kind}(sys.argv[1], {{'wheel.cmake': 'false'}}))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build("wheel", tmp_path_factory.mktemp("wheel"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(_C.__file__, f"pyfeat/{Path(_C.__file__).name}")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


def sources(folder: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyd", ".pyc"}
    }


def test_the_wheel_is_as_it_should_be(wheel: Path) -> None:
    assert wheel_problems(wheel) == []


def test_the_wheel_holds_the_whole_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("pyfeat/")}
    assert names == sources("pyfeat") | {f"pyfeat/{Path(_C.__file__).name}"}


def test_the_sdist_is_as_it_should_be(sdist: Path) -> None:
    assert sdist_problems(sdist) == []
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "pyfeat", "tests", "benchmarks"):
        assert sources(folder) <= names


def test_a_build_downloads_nothing_by_itself() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert not re.search(r"FetchContent|ExternalProject|file\s*\(\s*DOWNLOAD|git clone", cmake)
    (requirements,) = re.findall(r"^requires = (\[.*\])", PROJECT, flags=re.MULTILINE)
    assert re.findall(r'"([\w-]+)', requirements) == ["scikit-build-core", "pybind11"]


def test_a_failed_build_says_which_compiler_to_install() -> None:
    (message,) = re.findall(r'messages.after-failure = """(.*?)"""', PROJECT, flags=re.DOTALL)
    for hint in ("apt install g++", "xcode-select --install", "Visual Studio", "--upgrade pip"):
        assert hint in message


@elf
@pytest.mark.parametrize("module", ["_C", "_cuda"])
def test_a_compiled_module_needs_nothing_that_others_may_lack(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"pyfeat.{module}", raising=False)  # an emulated one
    spec = find_spec(f"pyfeat.{module}")
    if spec is None:
        assert module == "_cuda"  # an option of the build
        return
    assert spec.origin is not None
    assert module_problems(Path(spec.origin)) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tests/test_search.py", "top level"),
        ("pyfeat_kernels.libs/libgomp.so.1", "top level"),
        ("pyfeat/csrc/bindings.cpp", "no such file belongs"),
        ("pyfeat/libcudart.so.12", "no such file belongs"),
    ],
)
def test_what_does_not_belong_in_a_wheel_is_found(wheel: Path, name: str, problem: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = name_problems([*archive.namelist(), name])
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize("name", ["pyfeat/py.typed", "pyfeat/_C.pyi", "pyfeat/__init__.py"])
def test_what_a_wheel_lacks_is_found(wheel: Path, name: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    names.remove(name)
    assert name_problems(names) == [f"{name}: missing"]


def test_a_wheel_without_its_module_or_too_large_is_refused(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_archives, "SIZE_LIMIT", 1000)
    assert ["size must be" in problem for problem in wheel_problems(wheel)] == [True]
    bare = build("wheel", tmp_path)
    assert "compiled modules must be ['_C'], got []" in wheel_problems(bare)


@pytest.mark.parametrize(
    ("header", "value", "problem"),
    [
        ("Requires-Python", ">=3.12", "Python must be >=3.10"),
        ("Requires-Dist", "scipy>=1", "dependencies must be"),
        ("Provides-Extra", "cuda12", "extras must be"),
        ("Name", "pyfeat", "name must be pyfeat-kernels"),
    ],
)
def test_wrong_metadata_is_found(header: str, value: str, problem: str) -> None:
    metadata = Message()
    right: dict[str, list[str]] = {
        "Name": ["pyfeat-kernels"],
        "Requires-Python": [">=3.10"],
        "License-Expression": ["Apache-2.0"],
        "Requires-Dist": ["torch>=2.6", "numpy>=1.24", 'timm>=1.0; extra == "timm"'],
        "Provides-Extra": sorted(check_archives.EXTRAS),
    }
    for name, values in right.items():
        repeated = header == name and name in {"Requires-Dist", "Provides-Extra"}
        for text in [*values, value] if repeated else values:
            metadata[name] = value if name == header and not repeated else text
    (found,) = metadata_problems(metadata)
    assert problem in found


@pytest.mark.parametrize(
    "name", ["pyfeat/_C.cpython-311-x86_64-linux-gnu.so", "build/CMakeCache.txt", "csrc/a.o"]
)
def test_what_does_not_belong_in_an_sdist_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, f"pyfeat_kernels-0.1.0/{name}")
    problems = sdist_problems(path)
    assert f"{name.removesuffix('/CMakeCache.txt')}: must not be part of an sdist" in problems
    assert "csrc/bindings.cpp: missing" in problems


BROKEN = {
    "a second OpenMP": ("int f(void) { return 0; }", ["-fopenmp", "-lgomp"], "libgomp.so.1"),
    "a place of libraries": ("", ["-Wl,-rpath,/opt/cuda"], "a place to find libraries"),
    "a symbol to see": ("int helper;", [], "must export PyInit__C alone"),
    "a symbol of torch": ("void c10_warn(void); void g(void) { c10_warn(); }", [], "c10_warn"),
    "a symbol of OpenMP": ("void GOMP_barrier(void); void g(void) { GOMP_barrier(); }", [], "GOMP"),
}


@elf
@pytest.mark.parametrize("fault", BROKEN)
def test_a_module_that_would_fail_elsewhere_is_found(tmp_path: Path, fault: str) -> None:
    code, options, problem = BROKEN[fault]
    source, module = tmp_path / "module.c", tmp_path / "_C.so"
    shown = '__attribute__((visibility("default"))) void PyInit__C(void) {}'
    source.write_text(f"{code}\n{shown}\n")
    hidden = [] if fault == "a symbol to see" else ["-fvisibility=hidden"]
    link = ["-Wl,--no-as-needed", *options]
    compiler = shutil.which("cc") or "gcc"
    command = [compiler, "-shared", "-fPIC", *hidden, str(source), "-o", str(module), *link]
    subprocess.run(command, check=True)
    (found,) = module_problems(module)
    assert problem in found


@elf
@pytest.mark.parametrize(
    ("symbol", "fine"),
    [
        ("memcpy@GLIBC_2.14", True),
        ("pthread_once@GLIBC_2.34", True),
        ("shm_open@GLIBC_2.34", True),
        ("arc4random@GLIBC_2.36", False),
        ("_ZSt10from_charsPKcS0_RdSt12chars_format@GLIBCXX_3.4.29", False),
        ("cudaMalloc@libcudart.so.12", False),
    ],
)
def test_symbols_newer_than_the_promised_systems_are_found(
    symbol: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def symbols(path: Path, kind: str) -> list[str]:
        return ["PyInit__C"] if kind == "--defined-only" else [symbol]

    monkeypatch.setattr(check_archives, "_symbols", symbols)
    assert (module_problems(Path(_C.__file__)) == []) == fine


def test_every_op_runs_from_an_installed_package(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(ROOT / "tests" / "archives" / "smoke.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as it should be") >= 7


def test_the_smoke_test_calls_every_op() -> None:
    program = (ROOT / "tests" / "archives" / "smoke.py").read_text(encoding="utf-8")
    for module in (pyfeat, losses):
        for name in module.__all__:
            if name.islower() and callable(getattr(module, name)) and name not in NO_OPS:
                assert f"{module.__name__.rpartition('.')[2]}.{name}(" in program, name


def test_the_smoke_test_fails_where_the_cuda_module_should_be_and_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pyfeat._cuda", raising=False)  # an emulated one
    if find_spec("pyfeat._cuda") is not None:
        return
    command = [sys.executable, "-I", str(ROOT / "tests" / "archives" / "smoke.py"), "--cuda"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "must carry the module pyfeat._cuda" in done.stderr


def test_wheels_are_built_for_every_python_that_the_metadata_names() -> None:
    (line,) = re.findall(r"^build = \[(.*)\]", PROJECT, flags=re.MULTILINE)
    built = [f"{major}.{minor}" for major, minor in re.findall(r'"cp(\d)(\d+)-\*"', line)]
    assert built == re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', PROJECT)
    tested = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f"python: {built}".replace("'", '"') in tested
    assert sysconfig.get_python_version() in built


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_their_actions_and_ask_for_little(path: Path) -> None:
    workflow: dict[str, Any] = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        allowed = {"id-token": "write"} if name == "publish" else {"contents": "read"}
        assert job["permissions"] == allowed, name
        for step in job.get("steps", []):
            used = step.get("uses")
            assert used is None or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", used), used
            assert "persist-credentials" in step.get("with", {}) or "checkout" not in (used or "")


def test_a_release_publishes_only_what_was_tested_and_checked() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    publish = workflow["jobs"]["publish"]
    assert set(publish["needs"]) == {"tests", "check"}
    assert "ref_type == 'tag'" in publish["if"]
    assert publish["environment"] == "pypi"
    assert len(publish["steps"]) == 2  # nothing is installed where the proof of identity is
