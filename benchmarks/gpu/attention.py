"""Deformable attention on a GPU."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.judges import GradientJudge
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.turns import Entrant, import_peer
from benchmarks.pyramids import Attention, Case, Shapes, grid_sample, step_of
from benchmarks.timing import Work
from pyfeat import deform_attn
from pyfeat._backends import Backend


def attention_entrants(
    setting: Setting, case: Case, dtype: torch.dtype, *, backward: bool, compiles: bool = False
) -> list[Entrant]:
    """Our backends and the peers, or with ``compiles`` transformers, compiled, instead of all.

    Values and weights are of ``dtype``, locations float32: but for those peers that want one dtype.
    """
    step = partial(step_of, case=case, backward=backward, dtype=dtype, device=setting.device)
    exact = step_of(
        grid_sample, case, backward=backward, dtype=torch.float64, device=setting.device
    )
    peers: dict[str, Callable[[], Callable[[], object]]]
    if compiles:
        peers = {"transformers, compiled": lambda: step(setting.compiled(transformers(case)))}
    elif len(case.shapes[0]) == 2:
        peers = {
            "transformers": lambda: step(transformers(case)),
            "deformops": lambda: step(deformops(case, setting.device)),
        }
    else:
        peers = {"grid_sample": lambda: step(grid_sample)}
    return GradientJudge(exact, dtype).entrants(
        setting,
        lambda backend: step(partial(_ours, backend=backend)),
        peers,
        Work(case.num_bytes(backward=backward, value_bytes=dtype.itemsize), "copy"),
    )


def transformers(case: Case) -> Attention:
    """The path of its models without a kernel, ``grid_sample`` for every level; one dtype for all."""
    models = import_peer("transformers.models.deformable_detr.modeling_deformable_detr")
    module = models.MultiScaleDeformableAttention()
    sizes, starts = torch.tensor(case.shapes), torch.tensor(_starts(case))

    def attend(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        locations = locations.to(value.dtype)
        output: Tensor = module(value, sizes, list(shapes), starts, locations, weights, 64)
        return output

    return attend


def deformops(case: Case, device: torch.device) -> Attention:
    """Its best backend for the inputs."""
    msda = import_peer("deformops.registry").msda
    sizes, starts = (torch.tensor(x, device=device) for x in (case.shapes, _starts(case)))

    def attend(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = msda(value, sizes, starts, locations, weights.flatten(3))
        return output

    return attend


def _starts(case: Case) -> list[int]:
    """The first cell of each level."""
    counts = [math.prod(shape) for shape in case.shapes]
    return [sum(counts[:level]) for level in range(len(counts))]


def _ours(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, *, backend: Backend
) -> Tensor:
    return deform_attn(value, shapes, locations, weights, backend=backend)
