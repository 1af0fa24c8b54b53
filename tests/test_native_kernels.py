"""Kernels of instruction sets that this machine lacks: cross-compiled and run under an emulator."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from pyfeat import _C

ROOT = Path(__file__).parents[1]
# The check of an engine, and its kernels.
SIMILARITY = (ROOT / "tests/native/check_kernels.cpp", ROOT / "csrc/cpu/similarity/kernels.cpp")
SAMPLING = (ROOT / "tests/native/check_sampling.cpp", ROOT / "csrc/cpu/sampling/kernels.cpp")
FLAGS = "-O3 -std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror"
ARM = "aarch64-linux-gnu-g++"
DOT = ["-march=armv8.2-a+dotprod"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "isa", "flags"),
    [(SIMILARITY, "neon", []), (SIMILARITY, "neon_dot", DOT), (SAMPLING, "neon", [])],
)
def test_arm_kernels_are_right_under_emulation(
    sources: tuple[Path, Path], isa: str, flags: list[str], tmp_path: Path
) -> None:
    for tool in (ARM, "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = build(ARM, isa, [*flags, "-static"], tmp_path, sources)
    run(["qemu-aarch64", "-cpu", "max", str(program)])


@pytest.mark.slow
def test_byte_products_of_narrow_registers_are_right_in_their_wide_encoding(
    tmp_path: Path,
) -> None:
    # AVX-VNNI is the same operation as that of AVX-512 VNNI on half registers.
    if "avx512_vnni" not in _C.isas():
        pytest.skip("this processor has no AVX-512 VNNI")
    flags = ["-mavx2", "-mfma", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=256"]
    run([str(build("c++", "avx2_vnni", flags, tmp_path))])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa != "scalar"])
def test_kernels_of_this_machine_are_right_on_their_own(isa: str, tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86 processor")
    run([str(build("c++", isa, x86_flags(isa), tmp_path))])


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in _C.isas() if isa in ("avx2", "avx512")])
def test_sampling_kernels_of_this_machine_are_right_on_their_own(isa: str, tmp_path: Path) -> None:
    run([str(build("c++", isa, x86_flags(isa), tmp_path, SAMPLING))])


@pytest.mark.slow
def test_matrix_units_add_up_as_their_manual_says(tmp_path: Path) -> None:
    if "avx512_bf16" not in _C.isas():
        pytest.skip("this processor has no AVX-512 BF16")
    emulation = ["-DPYFEAT_EMULATED_AMX", f"-I{SIMILARITY[0].parent}"]
    emulated = run([str(build("c++", "amx", [*x86_flags("amx"), *emulation], tmp_path))])
    if "amx" in _C.isas():
        assert run([str(build("c++", "amx", x86_flags("amx"), tmp_path))]) == emulated


def x86_flags(isa: str) -> list[str]:
    wide = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
    flags = ["-mavx2", "-mfma", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags += wide if isa.startswith("avx512") or isa == "amx" else []
    flags += ["-mavxvnni"] if isa == "avx2_vnni" else []
    flags += ["-mavx512vnni"] if isa in ("avx512_vnni", "avx512_bf16", "amx") else []
    flags += ["-mavx512bf16"] if isa in ("avx512_bf16", "amx") else []
    flags += ["-mamx-tile", "-mamx-int8", "-mamx-bf16"] if isa == "amx" else []
    return flags


def build(
    compiler: str,
    isa: str,
    flags: list[str],
    folder: Path,
    sources: tuple[Path, Path] = SIMILARITY,
) -> Path:
    """The check of one instruction set, linked with its kernels and the scalar ones."""
    program = folder / f"check_{isa}"
    common = [compiler, *FLAGS.split(), f"-I{ROOT / 'csrc'}"]
    objects = []
    for name, source, own in (
        ("check", sources[0], [f"-DPYFEAT_CHECKED={isa}"]),
        ("scalar", sources[1], ["-DPYFEAT_ISA_SCALAR"]),
        ("kernels", sources[1], [f"-DPYFEAT_ISA_{isa.upper()}", *flags]),
    ):
        objects.append(str(folder / f"{name}.o"))
        run([*common, *own, "-c", str(source), "-o", objects[-1]])
    static = [flag for flag in flags if flag == "-static"]
    run([*common, *static, *objects, "-o", str(program)])
    return program


def run(command: list[str]) -> str:
    """What the command printed; fails with that."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
