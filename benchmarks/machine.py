"""What the numbers depend on: this machine, its measured peaks, and the versions that ran."""

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import pyfeat
from benchmarks.records import UNITS, Peak
from pyfeat import _C

# Of the processor's flags, those that decide how fast features are multiplied.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")


def use_threads(num_threads: int) -> None:
    """Give every OpenMP and BLAS loaded so far, and torch, the same number of threads."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(num_threads)
    threadpool_limits(limits=num_threads)


@dataclass(frozen=True)
class Peaks:
    """Measured peaks by resource, or why there are none."""

    rates: dict[str, Peak]
    missing: str = ""

    def __or__(self, other: "Peaks") -> "Peaks":
        """The higher of two measurements: other work on the machine only ever lowers one."""
        if not self.rates or not other.rates:
            return other if other.rates else self
        both = {
            name: max(peak, other.rates.get(name, peak), key=lambda each: each.rate)
            for name, peak in self.rates.items()
        }
        return Peaks(both)


def measure_peaks(num_threads: int, *, quick: bool = False) -> Peaks:
    """Compile and run ``peak.cpp`` with the compiler of this system (``$CXX``, or c++)."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return Peaks({}, "no C++ compiler")
    source = Path(__file__).with_name("peak.cpp")
    arguments = [num_threads, *((0.003, 16) if quick else (0.1, 512))]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        try:
            _output([compiler, *flags, "-o", str(program), str(source)])
        except (OSError, subprocess.CalledProcessError):
            return Peaks({}, "peak.cpp does not compile")
        try:
            printed = _output([str(program), *map(str, arguments)])
        except (OSError, subprocess.CalledProcessError):
            return Peaks({}, "peak.cpp does not run")
    return Peaks(dict(_parse_peak(line) for line in printed.splitlines()))


def describe_machine(
    num_threads: int, peaks: Peaks, packages: Collection[str] = (), load: float = 0.0
) -> list[str]:
    """Lines of Markdown: processor, peaks, versions, commit and date.

    Args:
        num_threads: Of every contender.
        peaks: As measured.
        packages: Names of distributions whose versions count, beside torch and numpy.
        load: Average number of processes that ran in the minute before.
    """
    flags = _cpuinfo("flags").split()
    versions = ", ".join(
        f"{package} {package_version(package)}" for package in ("torch", "numpy", *sorted(packages))
    )
    return [
        f"processor: {processor_name()}, "
        f"{os.cpu_count()} logical processors, {num_threads} threads for every contender; "
        f"load by other work before the run {load:.1f}",
        f"caches: {', '.join(_caches()) or 'unknown'}",
        f"instruction sets: {', '.join(_C.isas())}; the processor has "
        f"{', '.join(flag for flag in FLAGS if flag in flags) or 'none of those looked for'}",
        f"measured peak: {', '.join(_peak_lines(peaks)) or f'not measured ({peaks.missing})'}",
        f"versions: pyfeat {pyfeat.__version__}, {versions}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"commit: {commit_name()}, {datetime.now(timezone.utc):%Y-%m-%d}",
    ]


def _peak_lines(peaks: Peaks) -> Iterable[str]:
    for resource, peak in peaks.rates.items():
        yield f"{resource} {peak.rate:.0f} {UNITS[resource]} ({peak.how})"


def _parse_peak(line: str) -> tuple[str, Peak]:
    """``118.2 float32 vfmadd, 512 bits`` as the name and the rest."""
    rate, resource, how = line.split(maxsplit=2)
    return resource, Peak(float(rate), how)


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def processor_name() -> str:
    """As the system calls it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _caches() -> Iterable[str]:
    """Level, kind and size of each cache that the first processor sees (Linux)."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (
            (folder / name).read_text().strip() for name in ("level", "type", "size")
        )
        letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
        yield f"L{level}{letter} {size}"


def package_version(package: str) -> str:
    """Of a distribution, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def commit_name(*written: str) -> str:
    """Of this checkout, marked if it is dirty.

    Args:
        written: Paths from its root whose changes do not count, such as those of figures.
    """
    paths = [":/", *(f":(top,exclude){path}" for path in written)]
    try:
        name = _output(["git", "rev-parse", "--short=12", "HEAD"]).strip()
        changed = _output(["git", "status", "--porcelain", "--untracked-files=no", "--", *paths])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _output(command: Sequence[str]) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout
