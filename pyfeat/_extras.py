"""Optional dependencies: imported on first use, and named clearly when they are missing."""

import importlib
from types import ModuleType


def require(module: str, *, extra: str, op: str) -> ModuleType:
    """Import ``module``, or say which extra of the distribution carries it.

    Args:
        module: Dotted name of the module.
        extra: Extra of ``pyfeat-kernels`` that installs it.
        op: What the caller was asked to do; opens the error message.

    Raises:
        ImportError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, one of its own dependencies is not
        message = (
            f"{op}: needs {error.name}, which is not installed; "
            f"run: pip install 'pyfeat-kernels[{extra}]'"
        )
        raise ImportError(message, name=error.name) from error
