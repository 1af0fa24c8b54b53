"""Deformable attention: a weighted gather at fractional cells.

Values and upstream gradients are normal, weights a softmax. Queries of an encoder are the cells of all
levels, and their points lie around them, two cells off in each coordinate on average; those of a decoder
lie anywhere. transformers is the path of its models without a kernel, `grid_sample` for every level; the
same formula is the peer in 1-D and 3-D, where nobody else has one. A rate counts what has to be moved:
inputs and outputs once, gradients included, whatever is read again.
"""

import pytest
import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from benchmarks.answers import GradientCheck
from benchmarks.harness import Harness
from benchmarks.memory import in_fresh_process, peak_memory_mb
from benchmarks.pyramids import PYRAMID, Attention, Case, Shapes, grid_sample, step_of
from benchmarks.timing import Contender, Work
from pyfeat import deform_attn

PACKAGES = ("transformers",)

ENCODER, DECODER = Case(PYRAMID, 0), Case(PYRAMID, 300)
VOLUME = Case(((32, 32, 32), (16, 16, 16), (8, 8, 8)), 4_096)
SEQUENCE = Case(((4_096,), (2_048,), (1_024,), (512,)), 0)
TINY = Case(((6, 5), (3, 2)), 0)
TINY_VOLUME, TINY_SEQUENCE = Case(((4, 3, 2),), 5), Case(((9,), (4,)), 0)


@pytest.mark.sizes("case", full=[ENCODER, DECODER], quick=[TINY])
def test_forward(harness: Harness, case: Case, quick: bool) -> None:
    """2-D, forward, float32.

    `deform_attn` without gradients.
    """
    _race(harness, case, {"transformers": transformers}, backward=False, compiles=not quick)


@pytest.mark.sizes("case", full=[ENCODER, DECODER], quick=[TINY])
def test_backward(harness: Harness, case: Case, quick: bool) -> None:
    """2-D, forward and backward, float32.

    Gradients by values, locations and weights.
    """
    _race(harness, case, {"transformers": transformers}, backward=True, compiles=not quick)


@pytest.mark.sizes("case", full=[VOLUME], quick=[TINY_VOLUME])
def test_volume(harness: Harness, case: Case, quick: bool) -> None:
    """3-D, forward and backward, float32.

    Eight cells around every point.
    """
    _race(harness, case, {"grid_sample": grid_sample}, backward=True, compiles=not quick)


@pytest.mark.sizes("case", full=[SEQUENCE], quick=[TINY_SEQUENCE])
def test_sequence(harness: Harness, case: Case, quick: bool) -> None:
    """1-D, forward and backward, float32.

    `grid_sample` takes a sequence as an image of one row.
    """
    _race(harness, case, {"grid_sample": grid_sample}, backward=True, compiles=not quick)


@pytest.mark.sizes("case", full=[ENCODER], quick=[TINY])
def test_extra_memory(harness: Harness, case: Case) -> None:
    """Extra memory, forward and backward.

    Growth of the peak resident memory beyond the inputs, the output and the gradients, in a process of
    its own.
    """
    names = ("pyfeat", "transformers")
    values = {name: in_fresh_process(extra_memory_mb, name, case) for name in names}
    harness.values(case, values, unit="MB")


def extra_memory_mb(name: str, case: Case) -> float:
    """Beyond what is returned; for a fresh process."""
    attention = {"pyfeat": ours, "transformers": transformers}[name]
    step_of(attention, TINY, backward=True)()  # loads libraries and starts threads
    step = step_of(attention, case, backward=True)
    kept: list[object] = []
    peak = peak_memory_mb(lambda: kept.append(step()))
    returned = sum(x.numel() * x.element_size() for x in kept[0])  # type: ignore[attr-defined]
    return peak - returned / 2**20


def ours(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    return deform_attn(value, shapes, locations, weights)


def transformers(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    starts = torch.zeros(len(shapes), dtype=torch.int64)
    output: Tensor = MultiScaleDeformableAttention()(
        value, torch.tensor(shapes), list(shapes), starts, locations, weights, 64
    )
    return output


def _race(
    harness: Harness,
    case: Case,
    peers: dict[str, Attention],
    *,
    backward: bool,
    compiles: bool,
) -> None:
    """Against a peer, which is compiled as well if so wanted."""
    attentions: dict[str, Attention] = {"pyfeat": ours, **peers}
    if compiles:
        attentions |= {f"{name}, compiled": torch.compile(peer) for name, peer in peers.items()}
    work = Work(case.num_bytes(backward=backward), "read")
    contenders = [
        Contender(name, step_of(attention, case, backward=backward), name == "pyfeat", work)
        for name, attention in attentions.items()
    ]
    exact = step_of(grid_sample, case, backward=backward, dtype=torch.float64)
    harness.race(case, contenders, check=GradientCheck(exact))
