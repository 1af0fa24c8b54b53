"""What the compiler makes of the Triton kernels; needs no GPU.

The launchers run on meta tensors, so that what is compiled is what would be launched. That happens in
a process of its own: in this one, Triton may be set to interpret. Each branch of each kernel, each
dtype and each tile is compiled for some launch; ``benchmarks.prove_compilation`` compiles all launches.
"""

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pyfeat._pairs import Pairs, WeightedSide

ARCHS = (80, 90)
EVERY_LAUNCH = "PYFEAT_EVERY_LAUNCH"  # of the environment: compile what all launches ask for
# Bytes of shared memory that one program may have.
SHARED_MEMORY = {
    80: 99 << 10,
    90: 227 << 10,
}  # 99 KB on consumer GPUs, which share the table of 8.0

_SEARCH_KERNELS = {
    "_group_scores_kernel",
    "_mark_groups_kernel",
    "_pack_memory_kernel",
    "_pack_queries_kernel",
    "_rank_marked_kernel",
}
_CONTRAST_KERNELS = {
    "_add_product_kernel",
    "_gradient_terms_kernel",
    "_merge_sums_kernel",
    "_pair_gradient_kernel",
    "_pair_sums_kernel",
    "_softplus_kernel",
}
_SAMPLING_KERNELS = {
    "_corner_terms_kernel",
    "_gather_terms_kernel",
    "_sampled_sums_kernel",
    "_sampling_gradients_kernel",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing"),
]

Kernel = dict[str, Any]


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """For each architecture what waits for its compiler, which runs beside those of the others."""

    def compile_for(arch: int, cache: Path) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ, TRITON_CACHE_DIR=str(cache))
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.run(
            [sys.executable, "-m", "tests.test_triton_compile", str(arch)],
            cwd=Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    pool = ThreadPoolExecutor(len(ARCHS))
    # pytest numbers its folders without a lock, so they are made here and not in the threads.
    return {
        arch: pool.submit(compile_for, arch, tmp_path_factory.mktemp("triton")) for arch in ARCHS
    }


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def compiled(request: pytest.FixtureRequest, compilers: dict[int, Any]) -> tuple[int, list[Kernel]]:
    """The architecture, and what came out of the compiler for it."""
    done = compilers[request.param].result()
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_without_spills(compiled: tuple[int, list[Kernel]]) -> None:
    arch, kernels = compiled
    names = _SEARCH_KERNELS | _CONTRAST_KERNELS | _SAMPLING_KERNELS
    assert {kernel["name"] for kernel in kernels} == names
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= SHARED_MEMORY[arch], kernel


def test_products_run_on_tensor_cores(compiled: tuple[int, list[Kernel]]) -> None:
    arch, kernels = compiled
    tiles = set()
    for kernel in kernels:
        if kernel["name"] == "_group_scores_kernel":
            tiles.add(kernel["constants"]["BLOCK_Q"])
            # Warp groups multiply 64 queries at a time; fewer go through the older instruction.
            grouped = arch == 90 and kernel["constants"]["BLOCK_Q"] >= 64
            assert kernel["instructions"]["wgmma" if grouped else "mma.sync"] > 0, kernel
    assert tiles == {16, 64, 128}


@pytest.mark.parametrize("name", ["pair_sums", "pair_gradient", "softplus", "add_product"])
def test_products_of_16_bits_run_on_tensor_cores_and_those_of_32_do_not(
    name: str, compiled: tuple[int, list[Kernel]]
) -> None:
    arch, kernels = compiled
    multiplying = [kernel for kernel in kernels if kernel["name"] == f"_{name}_kernel"]
    assert {kernel["dtypes"][0] for kernel in multiplying} == {"*bf16", "*fp16", "*fp32"}
    for kernel in multiplying:
        instructions = kernel["instructions"]
        used = instructions["wgmma" if arch == 90 else "mma.sync"]
        assert (used > 0) == (kernel["dtypes"][0] != "*fp32"), kernel
        assert instructions["tf32"] == 0, kernel


def test_no_multiplication_is_fused_with_an_addition_in_float64(
    compiled: tuple[int, list[Kernel]],
) -> None:
    # A fused x * factor - q would not be 0 for a query that equals a row.
    for kernel in compiled[1]:
        if kernel["name"] in _SEARCH_KERNELS:
            assert kernel["instructions"]["contracted"] == 0, kernel


def test_corners_are_read_and_added_to_16_bytes_at_a_time(
    compiled: tuple[int, list[Kernel]],
) -> None:
    arch, kernels = compiled
    for kernel in kernels:
        constants = kernel["constants"]
        if constants.get("D") != 32 or "*fp64" in kernel["dtypes"]:
            continue
        if kernel["name"] == "_gather_terms_kernel":
            assert kernel["instructions"]["ld.v4"] > 0, kernel
        else:
            corners = 1 if constants["DISCRETE"] else 2 ** constants["N"]
            assert kernel["instructions"]["ld.v4"] >= corners, kernel
            # Before compute capability 9.0 there are additions of single floats only.
            if arch == 90 and constants.get("SCATTERS"):
                assert kernel["instructions"]["red.v4"] >= corners, kernel


def _search_launches(arch: int, every: bool) -> None:
    """What covers every tile, group size, metric, dtype and kind of mask."""
    from pyfeat._triton import similarity

    metrics = ("euclidean", "cosine", "inner_product")
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    numbers = (1, 9, 64)
    masked = list(itertools.product((1, 33, 500), ("none", "rows", "pairs")))
    kinds = list(itertools.product(metrics, dtypes, numbers))
    if not every:  # other combinations on each architecture
        turn = ARCHS.index(arch)
        turned = dtypes[turn:] + dtypes[:turn], numbers[2 * turn :] + numbers[: 2 * turn]
        kinds, masked = list(zip(metrics, *turned, strict=True)), [masked[i] for i in (2, 3, 7)]
    cases: list[tuple[int, int, int, int, str, torch.dtype, str]] = [
        (784, 16_384, 384, k, metric, dtype, "none") for metric, dtype, k in kinds
    ]
    cases += [(count, 70_000, 384, 4, "euclidean", torch.float32, mask) for count, mask in masked]
    cases += [(1, 1, 1, 1, "euclidean", torch.float32, "pairs")]
    for num_queries, num_rows, dim, k, metric, dtype, mask in cases:
        shape = {"rows": (num_rows,), "pairs": (num_queries, num_rows)}.get(mask)
        similarity.knn(
            torch.empty((num_queries, dim), dtype=dtype, device="meta"),
            torch.empty((num_rows, dim), dtype=dtype, device="meta"),
            k,
            metric,
            allowed=torch.empty(shape, dtype=torch.bool, device="meta") if shape else None,
        )


def _contrast_launches(arch: int, every: bool) -> None:
    """What covers every tile and dtype, with all that may be said of pairs, and with nothing."""
    from pyfeat._gpu import contrast
    from pyfeat._triton import contrast as kernels

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def pairs_of(kind: str, count: int) -> Pairs:
        ids = empty(count, dtype=torch.int32)
        return {
            "none": Pairs(),
            "clip": Pairs(None, ids, ids, separate_positives=True),
            "itself": Pairs(None, ids, ids, ids, ids, only_positives=True),
            "all": Pairs(empty(count, dtype=torch.float32), ids, ids, ids, ids, True, True),
        }[kind]

    cases = [(4096, 512, torch.bfloat16, kind) for kind in ("all", "itself")]
    cases += [(4096, 512, torch.float32, "clip"), (4096, 512, torch.float16, "clip")]
    cases += [(200, 512, torch.bfloat16, "all")]
    if every or arch == 90:
        cases += [(4096, 112, torch.bfloat16, "clip"), (200, 512, torch.float32, "all")]
    if every:
        cases += [(4096, 512, torch.bfloat16, kind) for kind in ("none", "clip")]
        cases += [(4096, 512, torch.float32, "all"), (200, 512, torch.float32, "clip")]
    for count, dim, dtype, kind in cases:
        features = empty(count, dim, dtype=dtype)
        pairs, itself = pairs_of(kind, count), kind == "itself"
        inputs = (kernels, features, features, empty(), pairs)
        side = WeightedSide(*(empty(count) for _ in range(3)))
        columns = kind in ("clip", "all")
        contrast.pair_sums(*inputs, columns=columns, largest=kind == "all", itself=itself)
        wanted = contrast.Wanted(True, not itself, itself)
        contrast.pair_gradients(*inputs, side, side if columns else None, wanted)
        if kind in ("none", "all"):
            continue
        for gradient in (False, True) if every or kind == "all" else (True,):
            wanted = contrast.Wanted(gradient, gradient)
            contrast.pair_softplus(*inputs[:4], empty(), pairs, side.lse, wanted)


def _sampling_launches(arch: int, every: bool) -> None:
    """What covers all dimensions, dtypes and modes, few queries and the cells of levels."""
    from pyfeat import _sampling_cuda

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    line: list[tuple[int, ...]] = [(4096,), (100,)]
    plane: list[tuple[int, ...]] = [(80, 60), (40, 30), (20, 15)]
    space: list[tuple[int, ...]] = [(16, 24, 32), (8, 9, 7)]
    wide: list[tuple[int, ...]] = [(1024, 512, 256)]  # offsets pass 2^31
    zeros, border = (False, False, False, True), (True, True, False, False)
    discrete = (False, False, True, True)
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    cases = [(plane, 32, single, 0, zeros), (space, 32, half, 0, zeros)]
    cases += [(line, 32, single, 300, border), (plane, 32, torch.float16, 300, discrete)]
    cases += [(plane, 1024, single, 900, zeros)]
    if every or arch == 90:
        cases += [(wide, 32, single, 300, border), (plane, 5, single, 900, zeros)]
    if every or arch == 80:
        cases += [(space, 32, double, 0, zeros)]
    if every:
        cases += [(plane, 32, half, 0, zeros), (space, 32, single, 0, zeros)]
        cases += [(plane, 32, single, 300, border)]
    for shapes, dim, dtype, num_queries, modes in cases:
        cells = sum(math.prod(shape) for shape in shapes)
        rows = (2, num_queries or cells, 8, 4 * len(shapes))
        arguments = (
            empty(2, cells, 8, dim, dtype=dtype),
            [size for shape in shapes for size in shape],
            [4] * len(shapes),
            empty(*rows, len(shapes[0]), dtype=torch.promote_types(dtype, single)),
            empty(*rows, dtype=dtype),
            *modes,
            "triton",
        )
        grad_output = empty(*rows[:2], 8 * dim, dtype=dtype)
        sorted_too = dtype in (single, double) and (every or shapes is not line)
        for sorts in (False, True) if sorted_too else (False,):
            torch.use_deterministic_algorithms(sorts)
            _sampling_cuda.forward(*arguments)
            _sampling_cuda.backward(*arguments, grad_output, True, True, True)
    torch.use_deterministic_algorithms(False)


def _specialised(kernel: Any, values: dict[str, Any]) -> tuple[dict[str, str], Any, Any]:
    """Signature, constants and attributes as Triton derives them from the values of a launch."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        fixed = parameter.do_not_specialize
        aligned = False
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            from triton.runtime.jit import mangle_type

            signature[parameter.name] = mangle_type(value)
            aligned = True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = not fixed and value % 16 == 0
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _compile(arch: int, kernel: Any, values: dict[str, Any], options: dict[str, Any]) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialised(kernel, values)
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    with Path(os.environ["TRITON_CACHE_DIR"], "kernel.ptx").open("w") as file:
        file.write(ptx)
    command = [get_ptxas(arch).path, "-v", "--fmad=false", "--regAllocOptLevel=2"]  # as Triton does
    command += [f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}", file.name, "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "name": kernel.__name__,
        "constants": {kernel.params[place].name: value for (place,), value in constants.items()},
        "dtypes": [kind for kind in signature.values() if kind.startswith("*")],
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", log)[0]),
        "shared_bytes": built.metadata.shared,
        "instructions": {
            "mma.sync": ptx.count("mma.sync"),
            "wgmma": ptx.count("wgmma.mma_async"),
            "tf32": ptx.count("tf32"),
            "ld.v4": ptx.count("ld.global.v4.b32"),
            "red.v4": ptx.count("red.global.gpu.relaxed.add.v4.f32"),
            "contracted": ptx.count("fma.rn.f64"),
        },
    }


def _compile_all(arch: int) -> None:
    """Print one line of JSON for each kernel that some launch asks for."""
    from triton.runtime.jit import JITFunction

    from pyfeat._triton import tiles

    recorded: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        key = f"{self.__name__} {_specialised(self, values)} {options}"
        recorded.setdefault(key, (self, values, options))

    JITFunction.run = record
    tiles._major_capability = lambda device: arch // 10
    for launches in (_search_launches, _contrast_launches, _sampling_launches):
        launches(arch, EVERY_LAUNCH in os.environ)
    for kernel, values, options in recorded.values():
        sys.stdout.write(json.dumps(_compile(arch, kernel, values, options)) + "\n")


if __name__ == "__main__":
    _compile_all(int(sys.argv[1]))
