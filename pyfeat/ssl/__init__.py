"""Self-supervised training: unlabelled images, volumes and captions in, a backbone out.

``fit(load_config("run.yaml"))`` is what ``pyfeat train run.yaml`` does. The names are loaded when they are
first used; they take the extra ``train``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pyfeat._extras import require

if TYPE_CHECKING:
    from pyfeat.ssl.config import Config, load_config, make_config
    from pyfeat.ssl.data.source import Source
    from pyfeat.ssl.hand_over import Export, export
    from pyfeat.ssl.objectives.base import NonFiniteLossError, Objective, Plan
    from pyfeat.ssl.registry import NETWORKS, OBJECTIVES, SOURCES
    from pyfeat.ssl.runs import Run
    from pyfeat.ssl.training import fit

__all__ = [
    "NETWORKS",
    "OBJECTIVES",
    "SOURCES",
    "Config",
    "Export",
    "NonFiniteLossError",
    "Objective",
    "Plan",
    "Run",
    "Source",
    "export",
    "fit",
    "load_config",
    "make_config",
]

_MODULES = {
    "config": ("Config", "load_config", "make_config"),
    "data.source": ("Source",),
    "hand_over": ("Export", "export"),
    "objectives.base": ("NonFiniteLossError", "Objective", "Plan"),
    "registry": ("NETWORKS", "OBJECTIVES", "SOURCES"),
    "runs": ("Run",),
    "training": ("fit",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            require("lightning", extra="train", op=f"pyfeat.ssl.{name}")
            return getattr(importlib.import_module(f"pyfeat.ssl.{module}"), name)
    message = f"module 'pyfeat.ssl' has no attribute {name!r}"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
