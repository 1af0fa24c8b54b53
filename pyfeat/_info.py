"""What this machine has, and why the rest is missing."""

from importlib.util import find_spec

import torch

from pyfeat import _C
from pyfeat._backends import backend_report
from pyfeat._cuda_ops.loading import build_report

# Module that shows an extra to be installed, by extra.
_EXTRAS = {
    "bank": "safetensors",
    "anomaly": "sklearn",
    "demo": "elpv_dataset",
    "train": "lightning",
    "hf": "transformers",
    "timm": "timm",
    "gpu": "triton",
}


def info() -> dict[str, object]:
    """Versions, instruction sets, threads, backends and extras of this installation.

    Returns:
        ``version`` and ``torch``; ``instruction_sets``, slowest first, the last one is used;
        ``precisions`` of their tiles, likewise; ``threads``, as ``torch.get_num_threads()``;
        ``backends``, each "available" or why it is missing; ``cuda_build``, the CUDA version and the
        architectures of the CUDA kernels, None without them; ``extras``, each "installed" or the
        command that installs it.

    Examples:
        >>> info()["backends"]["cpu"]
        'available'
    """
    return {
        "version": _C.__version__,
        "torch": torch.__version__,
        "instruction_sets": _C.isas(),
        "threads": torch.get_num_threads(),
        "precisions": _C.precisions(),
        "backends": backend_report(),
        "cuda_build": build_report(),
        "extras": {
            extra: "installed"
            if find_spec(module)
            else f"missing: pip install 'pyfeat-kernels[{extra}]'"
            for extra, module in _EXTRAS.items()
        },
    }
