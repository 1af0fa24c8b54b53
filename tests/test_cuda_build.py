"""The CUDA module as nvcc builds it: resources, instructions, symbols, and its import without a GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support_cuda_build import ARCHS, Kernel, cuda_module_path, cuda_program, kernels_in

pytestmark = pytest.mark.slow

NATIVE = Path(__file__).parent / "native"

# Kernels by name, and what must be among their instructions: for both architectures, or by each.
# Every kernel of the module is listed.
MMA, WGMMA = "HMMA.16816", "HGMMA.64x"
ASYNC_COPY, BULK_COPY = "LDGSTS.E.BYPASS.128", "UBLKCP"
Instructions = tuple[str, ...] | dict[int, tuple[str, ...]]
MODULE_KERNELS: dict[str, Instructions] = {
    "count_terms_kernel": (),
    "gather_kernel": ("SHFL.IDX",),
    "gather_terms_kernel": ("VOTE", "SHFL.BFLY"),
    "gradients_kernel": ("SHFL.IDX", "SHFL.BFLY"),
    "gradient_terms_kernel": ("DMUL",),
    "merge_parts_kernel": ("DMUL", "DADD"),
    "pack_16_bits_kernel": (),
    "pack_float32_kernel": (),
    "pack_memory_kernel": ("DFMA", "SHFL.BFLY"),
    "pack_queries_kernel": ("DFMA", "SHFL.BFLY"),
    "place_terms_kernel": ("ATOMG.E.ADD.STRONG.GPU",),
    "rank_all_kernel": ("DFMA", "ATOMG.E.CAS.STRONG.GPU"),
    "rank_listed_kernel": ("DFMA", "SHFL.BFLY"),
    "threshold_kernel": ("SHFL.BFLY",),
    "tile_products_float32": ("FFMA", ASYNC_COPY),
    "tile_products_mma_f16": (f"{MMA}.F32", "LDSM.16.M88.4", ASYNC_COPY),
    "tile_products_mma": {80: (f"{MMA}.F32.BF16", "LDSM.16.M88.4", ASYNC_COPY), 90: ()},
    "tile_products_wgmma": {80: (), 90: (f"{WGMMA}256x16.F32.BF16", BULK_COPY, "SYNCS")},
    "write_neighbours_kernel": (),
}
DEVICE_KERNELS: dict[str, Instructions] = {
    "multiply_mma": (f"{MMA}.F32.BF16", "LDSM.16.M88.4", ASYNC_COPY),
    "multiply_wgmma": {80: (), 90: (f"{WGMMA}256x16.F32.BF16", BULK_COPY, "SYNCS")},
    "combine": ("SHFL.BFLY", "VOTE", "REDUX.MAX.S32", "BAR.RED.POPC"),
    "exchange": ("BAR.SYNC",),
    "add_up": ("E.ADD.64.STRONG.GPU", "E.MAX.64.STRONG.GPU", "ATOMG.E.ADD"),
    "convert": ("F2F.F32.F64.RM", "F2F.F32.F64.RP", "F2F.F32.F64.RZ", "DADD.RP"),
}


@pytest.fixture(scope="module")
def module() -> Path:
    return cuda_module_path()


@pytest.fixture(scope="module")
def module_kernels(module: Path) -> list[Kernel]:
    return kernels_in(module)


@pytest.fixture(scope="module")
def device_kernels() -> list[Kernel]:
    return kernels_in(cuda_program(NATIVE / "check_device.cu"))


def faults_of(kernels: list[Kernel], expected: dict[str, Instructions]) -> list[str]:
    """What is not as it must be: spills, stack frames, instructions that are not there."""
    faults = [
        f"{name} is not in the binary" for name in expected.keys() - {k.name for k in kernels}
    ]
    for kernel in kernels:
        place = f"{kernel.name} for sm_{kernel.arch}"
        if kernel.usage["STACK"] or kernel.usage["LOCAL"]:
            faults.append(f"{place} spills or has a stack: {kernel.usage}")
        if kernel.name not in expected:
            faults.append(f"{place} is not listed")
            continue
        wanted = expected[kernel.name]
        wanted = wanted[kernel.arch] if isinstance(wanted, dict) else wanted
        faults += [f"{place} has no {name}" for name in wanted if name not in kernel.instructions]
    return faults


def test_kernels_are_as_lean_as_they_are_written(module_kernels: list[Kernel]) -> None:
    assert faults_of(module_kernels, MODULE_KERNELS) == []


@pytest.mark.parametrize(
    ("name", "instruction", "archs"),
    [("gather", "LDG.E.128", (80, 90)), ("gradients", "REDG.E.ADD.F32x4", (90,))],
)
def test_channels_are_read_and_added_16_bytes_at_a_time(
    name: str, instruction: str, archs: tuple[int, ...], module_kernels: list[Kernel]
) -> None:
    for arch in archs:
        made = [k for k in module_kernels if (k.arch, k.name) == (arch, f"{name}_kernel")]
        # Of three dtypes in three dimensions; others are read one by one.
        assert sum(instruction in kernel.instructions for kernel in made) == 9


def test_every_source_of_kernels_is_in_the_build(module_kernels: list[Kernel]) -> None:
    cmake = (NATIVE.parents[1] / "CMakeLists.txt").read_text()
    sources = (NATIVE.parents[1] / "csrc/cuda").rglob("*.cu")
    missing = [path.name for path in sources if f"/{path.name}" not in cmake]
    assert missing == []
    assert {kernel.arch for kernel in module_kernels} == (set(ARCHS) if MODULE_KERNELS else set())


def test_the_device_layer_is_made_of_the_instructions_it_names(
    device_kernels: list[Kernel],
) -> None:
    assert {kernel.arch for kernel in device_kernels} == set(ARCHS)
    assert faults_of(device_kernels, DEVICE_KERNELS) == []


def test_faults_of_a_kernel_are_found(device_kernels: list[Kernel]) -> None:
    kernel = next(k for k in device_kernels if k.name == "combine")
    usage = {**kernel.usage, "STACK": 16}
    spilling = Kernel(kernel.arch, kernel.name, usage, kernel.instructions)
    assert "has a stack" in faults_of([spilling], {"combine": ("SHFL",)})[0]
    assert faults_of([kernel], {"combine": (MMA,)}) == [
        f"combine for sm_{kernel.arch} has no {MMA}"
    ]
    assert faults_of([kernel], {}) == [f"combine for sm_{kernel.arch} is not listed"]
    assert faults_of([], {"combine": ()}) == ["combine is not in the binary"]


def test_nothing_of_torch_openmp_or_a_shared_runtime_is_needed(module: Path) -> None:
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    dynamic = subprocess.run(
        ["readelf", "--dynamic", module], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed
    assert all(re.match(r"(libstdc\+\+|libgcc_s|libc|libm|ld-linux)", name) for name in needed)
    symbols = subprocess.run(
        ["nm", "--dynamic", module], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r" [A-Z] (PyInit\w+)", symbols) == ["PyInit__cuda"]
    assert re.findall(r"\w*(?:c10|torch|GOMP|omp_get|cudaMalloc|cudaLaunch)\w*", symbols) == []


def test_it_loads_without_a_driver_and_says_why_it_is_off(module: Path) -> None:
    program = f"""
import importlib.util, sys
import pyfeat
spec = importlib.util.spec_from_file_location("pyfeat._cuda", {str(module)!r})
sys.modules["pyfeat._cuda"] = pyfeat._cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pyfeat._cuda)
report = pyfeat.info()
print(pyfeat._cuda.driver_version(), report["cuda_build"]["architectures"])
print(report["backends"]["cuda"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    versions, why = done.stdout.splitlines()
    if not versions.startswith("0 "):
        pytest.skip("there is a driver")
    assert versions == "0 ['80-real', '90a-real']"
    assert why == "missing: there is no NVIDIA driver"


@pytest.mark.gpu
def test_the_device_layer_does_what_plain_sums_do_on_a_gpu() -> None:
    program = cuda_program(NATIVE / "check_device.cu")
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("right\n"), done.stdout
