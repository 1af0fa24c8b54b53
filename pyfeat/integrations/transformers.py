"""Deformable attention of transformers, computed by ``deform_attn``."""

import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from pyfeat._extras import require
from pyfeat.attention import deform_attn

_OP = "transformers.patch"
_LAYER = "MultiScaleDeformableAttention"
_FUNCTION = "multi_scale_deformable_attention"
_FUNCTION_V2 = "multi_scale_deformable_attention_v2"
_HELD = "ms_deformable_attn_core"  # a function that instances keep from when they were made

_lock = threading.Lock()
# (owner, name, what was there or None, what is there), in the order in which they were replaced
_replaced: list[tuple[Any, str, Any, Any]] = []
_models: tuple[str, ...] = ()


def patch() -> tuple[str, ...]:
    """Let the models of transformers compute deformable attention with ``deform_attn``.

    Whatever the installed transformers has of it, in whichever model: the layer
    ``MultiScaleDeformableAttention`` (Deformable DETR, RT-DETR, Grounding DINO, OmDet, LW-DETR and
    more), and the functions of Mask2Former and OneFormer, of RT-DETRv2, D-FINE and DEIMv2. It holds
    for models made before and after; a layer that the package ``kernels`` has replaced in one model
    stays so, and versions without that layer first try a compiled kernel of theirs, unless the
    config has ``disable_custom_kernels``. A second call changes nothing.

    Returns:
        The names of the models, such as "deformable_detr", sorted.

    Raises:
        ImportError: If transformers is not installed.
        RuntimeError: If this transformers has no such layer or function, or one with other arguments:
            then nothing is replaced.

    Precision: as ``deform_attn``; models agree with what they computed before up to rounding.

    Examples:
        >>> "deformable_detr" in patch()
        True
        >>> unpatch()
    """
    global _models
    transformers = require("transformers", extra="hf", op=_OP)
    with _lock:
        if not _replaced:
            modules = _modules_with_attention(transformers)
            changes = [change for module in modules.values() for change in _changes(module)]
            if not changes:
                message = (
                    f"{_OP}: transformers must have {_LAYER}, {_FUNCTION} or {_FUNCTION_V2} in a "
                    f"model, got version {transformers.__version__} without"
                )
                raise RuntimeError(message)
            for owner, name, replacement in changes:
                _replaced.append((owner, name, vars(owner).get(name), replacement))
                setattr(owner, name, replacement)
            _models = tuple(sorted(modules))
        return _models


def unpatch() -> None:
    """Put back what ``patch`` replaced; without a patch, do nothing.

    What somebody else has put in its place since stays.

    Examples:
        >>> unpatch()
    """
    global _models
    with _lock:
        for owner, name, original, replacement in reversed(_replaced):
            if vars(owner).get(name) is not replacement:
                continue
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _replaced.clear()
        _models = ()


def _modules_with_attention(transformers: ModuleType) -> dict[str, ModuleType]:
    """The modules of transformers, by model, whose text has a name that can be replaced."""
    names = [f"class {_LAYER}(", f"def {_FUNCTION}(", f"def {_FUNCTION_V2}("]
    modules = {}
    for path in sorted(Path(str(transformers.__file__)).parent.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if any(name in text for name in names):
            model = path.parent.name
            modules[model] = importlib.import_module(f"transformers.models.{model}.{path.stem}")
    return modules


def _changes(module: ModuleType) -> list[tuple[Any, str, Any]]:
    """What to replace in a module: owner, name, replacement."""
    changes: list[tuple[Any, str, Any]] = []
    if (layer := getattr(module, _LAYER, None)) is not None and hasattr(layer, "forward"):
        _check_arguments(module, layer.forward, _layer_forward)
        changes.append((layer, "forward", _layer_forward))
    if (function := getattr(module, _FUNCTION, None)) is not None:
        _check_arguments(module, function, _attention)
        changes.append((module, _FUNCTION, _attention))
    if (function := getattr(module, _FUNCTION_V2, None)) is not None:
        _check_arguments(module, function, _attention_v2)
        holders = [kind for kind in vars(module).values() if _holds_function(module, kind)]
        changes += [(kind, _HELD, _held_function()) for kind in holders]
        if not holders:
            changes.append((module, _FUNCTION_V2, _attention_v2))
    return changes


def _check_arguments(
    module: ModuleType, original: Callable[..., Any], replacement: Callable[..., Any]
) -> None:
    found, known = (list(inspect.signature(f).parameters) for f in (original, replacement))
    if found != known:
        message = (
            f"{_OP}: {module.__name__}.{original.__qualname__} must take ({', '.join(known)}), "
            f"got ({', '.join(found)})"
        )
        raise RuntimeError(message)


def _holds_function(module: ModuleType, kind: object) -> bool:
    if not inspect.isclass(kind) or kind.__module__ != module.__name__:
        return False
    code = getattr(vars(kind).get("__init__"), "__code__", None)
    return code is not None and _HELD in code.co_names


def _held_function() -> property:
    """Of a class: what its instances hold stays theirs, and is not what they get."""

    def hold(self: Any, function: Any) -> None:
        vars(self)[_HELD] = function

    return property(lambda self: _attention_v2, hold)


def _layer_forward(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[Sequence[int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    return _attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _attention(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def _attention_v2(
    value: Tensor,
    value_spatial_shapes: Tensor | Sequence[Sequence[int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    discrete = method == "discrete"
    return deform_attn(
        value,
        value_spatial_shapes,
        # No gradient, not one of zeros, which weight decay would tell from none.
        sampling_locations.detach() if discrete else sampling_locations,
        attention_weights,
        num_points=num_points_list,
        sampling="discrete" if discrete else "linear",
    )
