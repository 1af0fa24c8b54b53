import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from pyfeat import _C

ROOT = Path(__file__).parents[1]
FLAGS = "-std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
ARM = "aarch64-linux-gnu-g++"
DOT = ["-march=armv8.2-a+dotprod"]


class Engine(NamedTuple):
    """Sources of its check and of its kernels, and how those that are checked are compiled."""

    check: str
    kernels: str
    flags: tuple[str, ...]


SIMILARITY = Engine("tests/native/check_kernels.cpp", "csrc/cpu/similarity/kernels.cpp", ("-O3",))
# More optimisation takes five times as long, and is checked in the module itself.
SAMPLING = Engine(
    "tests/native/check_sampling.cpp",
    "csrc/cpu/sampling/kernels.cpp",
    ("-O1", "-DPYFEAT_CHECKED_SAMPLING"),
)
# Compiler, instruction set, its flags and the engine.
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Links the check of one instruction set; what several have in common is compiled once."""
    folder = tmp_path_factory.mktemp("native")
    compiled: dict[tuple[str, ...], Path] = {}

    def compile_one(command: tuple[str, ...]) -> None:
        run([*command, "-o", str(compiled[command])])

    def build(compiler: str, isa: str, flags: Sequence[str], engine: Engine = SIMILARITY) -> Path:
        common = (compiler, *FLAGS.split(), f"-I{ROOT / 'csrc'}", "-c")
        own = (f"-DPYFEAT_ISA_{isa.upper()}", *engine.flags, *flags)
        commands = [
            (*common, *own, str(ROOT / engine.kernels)),
            (*common, "-O1", str(ROOT / engine.check)),
            (*common, "-O1", "-DPYFEAT_ISA_SCALAR", str(ROOT / engine.kernels)),
            (*common, f"-DPYFEAT_CHECKED={isa}", *engine.flags, f"{ROOT}/tests/native/checked.cpp"),
        ]
        missing = [command for command in commands if command not in compiled]
        for command in missing:
            compiled[command] = folder / f"{len(compiled)}.o"
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, missing))
        program = folder / f"check_{len(compiled)}"
        objects = [str(compiled[command]) for command in commands]
        static = [flag for flag in flags if flag == "-static"]
        run([compiler, *static, *objects, "-o", str(program)])
        return program

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "isa", "flags"),
    [(SIMILARITY, "neon", []), (SIMILARITY, "neon_dot", DOT), (SAMPLING, "neon", [])],
)
def test_arm_kernels_are_right_under_emulation(
    engine: Engine, isa: str, flags: list[str], build: Build
) -> None:
    for tool in (ARM, "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = build(ARM, isa, [*flags, "-static"], engine)
    run(["qemu-aarch64", "-cpu", "max", str(program)])


@pytest.mark.slow
def test_byte_products_of_narrow_registers_are_right_in_their_wide_encoding(
    build: Build,
) -> None:
    # AVX-VNNI is the same operation as that of AVX-512 VNNI on half registers.
    if "avx512_vnni" not in _C.isas():
        pytest.skip("this processor has no AVX-512 VNNI")
    flags = ["-mavx2", "-mfma", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256"]
    run([str(build("c++", "avx2_vnni", flags))])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa != "scalar"])
def test_kernels_of_this_machine_are_right_on_their_own(isa: str, build: Build) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86 processor")
    run([str(build("c++", isa, x86_flags(isa)))])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa in ("avx2", "avx512")])
def test_sampling_kernels_of_this_machine_are_right_on_their_own(isa: str, build: Build) -> None:
    run([str(build("c++", isa, x86_flags(isa), SAMPLING))])


@pytest.mark.slow
def test_points_and_queries_lie_on_levels_as_by_definition(tmp_path: Path) -> None:
    # Conversions that are not defined have no answer to be compared with.
    strict = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover"]
    program = str(tmp_path / "check")
    source = str(ROOT / "tests/native/check_levels.cpp")
    run(["c++", *FLAGS.split(), *strict, f"-I{ROOT / 'csrc'}", source, "-o", program])
    run([program])


@pytest.mark.slow
def test_matrix_units_add_up_as_their_manual_says(build: Build) -> None:
    if "avx512_bf16" not in _C.isas():
        pytest.skip("this processor has no AVX-512 BF16")
    emulation = ["-DPYFEAT_EMULATED_AMX", f"-I{ROOT / 'tests/native'}"]
    emulated = run([str(build("c++", "amx", [*x86_flags("amx"), *emulation]))])
    if "amx" in _C.isas():
        assert run([str(build("c++", "amx", x86_flags("amx")))]) == emulated


def x86_flags(isa: str) -> list[str]:
    wide = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
    flags = ["-mavx2", "-mfma", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags += wide if isa.startswith("avx512") or isa == "amx" else []
    flags += ["-mavxvnni"] if isa == "avx2_vnni" else []
    flags += ["-mavx512vnni"] if isa in ("avx512_vnni", "avx512_bf16", "amx") else []
    flags += ["-mavx512bf16"] if isa in ("avx512_bf16", "amx") else []
    flags += ["-mamx-tile", "-mamx-int8", "-mamx-bf16"] if isa == "amx" else []
    return flags


def run(command: list[str]) -> str:
    """What the command printed; fails with that."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
