"""Whether the compiled module can be loaded, and what stands in the way of its kernels.

``pyfeat._cuda`` is imported here, when a backend is chosen, and by the launchers, which are imported
when they are called.
"""

import functools
from importlib.util import find_spec

import torch

_NOT_BUILT = (
    "pyfeat was built without CUDA kernels: "
    "pip install -C cmake.define.PYFEAT_CUDA=ON --no-binary pyfeat-kernels pyfeat-kernels"
)


@functools.cache
def _why_not_loaded() -> str | None:
    if find_spec("pyfeat._cuda") is None:
        return _NOT_BUILT
    try:
        from pyfeat import _cuda  # noqa: F401
    except ImportError as error:
        return f"pyfeat._cuda cannot be loaded: {error}"
    return None


def missing_for_cuda(device: torch.device | None = None) -> list[str]:
    """Why the kernels cannot run on ``device``, the current one if None."""
    reason = _why_not_loaded()
    if reason is not None:
        return [reason]
    if torch.version.hip is not None:
        return ["torch was built for AMD GPUs"]
    from pyfeat import _cuda

    built, driver = _cuda.runtime_version(), _cuda.driver_version()
    if driver == 0:
        return ["there is no NVIDIA driver"]
    if driver // 1000 < built // 1000:
        return [f"the driver supports CUDA {_version(driver)}, kernels need {_version(built)}"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA GPU"]
    return architecture_obstacles(
        torch.cuda.get_device_capability(device), _cuda.architectures(), driver >= built
    )


def architecture_obstacles(
    capability: tuple[int, int], architectures: list[str], driver_reads_ptx: bool
) -> list[str]:
    """Why a GPU of this capability cannot run what was compiled for ``architectures``.

    Machine code ("80-real") runs on GPUs of its major version and the same or a later minor one;
    with an "a" ("90a-real") on that one GPU only. PTX ("90-virtual") is compiled by the driver for
    any later GPU, if the driver is as new as the compiler that wrote it.

    Examples:
        >>> architecture_obstacles((8, 9), ["80-real", "90a-real"], True)
        []
        >>> architecture_obstacles((7, 5), ["80-real"], True)
        ['kernels were built for 80-real, the GPU has compute capability 7.5']
    """
    ptx = False
    for name in architectures:
        number, _, kind = name.partition("-")
        exact = not number[-1].isdigit()
        version = int(number[:-1] if exact else number)
        built_for = (version // 10, version % 10)
        if kind != "virtual" and (
            built_for == capability
            or (not exact and built_for[0] == capability[0] and built_for <= capability)
        ):
            return []
        ptx |= kind != "real" and not exact and built_for <= capability
    names = ", ".join(architectures)
    got = f"the GPU has compute capability {capability[0]}.{capability[1]}"
    if ptx and not driver_reads_ptx:
        return [f"kernels were built for {names}, {got}, and the driver is older than their PTX"]
    return [] if ptx else [f"kernels were built for {names}, {got}"]


def build_report() -> dict[str, object] | None:
    """CUDA version and architectures of ``pyfeat._cuda``; None where it cannot be loaded."""
    if _why_not_loaded() is not None:
        return None
    from pyfeat import _cuda

    return {"cuda": _version(_cuda.runtime_version()), "architectures": _cuda.architectures()}


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
