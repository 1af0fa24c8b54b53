"""All races on a GPU, the targets first: those at the end are left out where time runs out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.eager_losses import Batch
from benchmarks.gpu.attention import attention_entrants
from benchmarks.gpu.losses import (
    Family,
    clip_family,
    loss_entrants,
    siglip_family,
    supcon_family,
)
from benchmarks.gpu.search import search_entrants
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.turns import Entrant
from benchmarks.harness import Shape
from benchmarks.pyramids import PYRAMID, Case

SEARCH = "Search, float32"
CLIP = "CLIP, forward and backward"
SIGLIP = "SigLIP, forward and backward"
SUPCON = "SupCon, forward and backward"
FORWARD = "Deformable attention, forward"
BACKWARD = "Deformable attention, forward and backward"

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Race:
    """One case of a section. ``entrants`` makes inputs and the exact answer, which takes its time."""

    section: str
    case: str
    entrants: Callable[[Setting], list[Entrant]]


def all_races(*, tiny: bool) -> list[Race]:
    """In the order in which they are run.

    Args:
        tiny: At sizes of a rehearsal, one of each kind.
    """
    half, single = torch.bfloat16, torch.float32
    clip, siglip, supcon = clip_family(), siglip_family(), supcon_family()
    encoder, decoder = (_case(Case(PYRAMID, queries, batch=8), tiny) for queries in (0, 300))
    volume, sequence = _case(_VOLUME, tiny), _case(_SEQUENCE, tiny)
    races = [
        _search(Shape(12_544, 65_536, 1_536), tiny),
        _loss(CLIP, clip, Batch(65_536, 768), half, tiny),
        *(_attention(encoder, dtype, way) for dtype in (single, half) for way in (False, True)),
        _attention(encoder, single, True, compiles=True),
        _loss(CLIP, clip, Batch(32_768, 768), half, tiny, compiles=True),
        _search(Shape(784, 16_384, 1_536, 9), tiny),
        _search(Shape(1, 1_000_000, 128, 10), tiny),
        _loss(CLIP, clip, Batch(8_192, 512), single, tiny),
        _loss(SIGLIP, siglip, Batch(16_384, 768), half, tiny),
        _attention(decoder, single, True),
        _attention(volume, single, True),
        _search(Shape(4_096, 262_144, 128, 10), tiny),
        _search(Shape(12_544, 65_536, 384), tiny),
        _search(Shape(12_544, 65_536, 384), tiny, patch_like=True),
        _loss(SUPCON, supcon, Batch(8_192, 256), half, tiny),
        _loss(SIGLIP, siglip, Batch(16_384, 768), half, tiny, compiles=True),
        _loss(SUPCON, supcon, Batch(8_192, 256), half, tiny, compiles=True),
        _attention(sequence, single, True),
    ]
    # Tiny ones of different size are the same.
    return list({(race.section, race.case): race for race in races}.values())


_VOLUME = Case(((32, 32, 32), (16, 16, 16), (8, 8, 8)), 4_096)
_SEQUENCE = Case(((4_096,), (2_048,), (1_024,), (512,)), 0)
_TINY_LEVELS = {1: ((9,), (4,)), 2: ((6, 5), (3, 2)), 3: ((4, 3, 2),)}


def _case(case: Case, tiny: bool) -> Case:
    if not tiny:
        return case
    shapes = _TINY_LEVELS[len(case.shapes[0])]
    return case._replace(shapes=shapes, num_queries=min(case.num_queries, 5), batch=1)


def _search(shape: Shape, tiny: bool, *, patch_like: bool = False) -> Race:
    shape = Shape(8, 64, 16, shape.k) if tiny else shape
    case = f"{shape}, patch-like" if patch_like else str(shape)
    return Race(SEARCH, case, partial(search_entrants, shape=shape, patch_like=patch_like))


def _attention(case: Case, dtype: torch.dtype, backward: bool, *, compiles: bool = False) -> Race:
    make = partial(attention_entrants, case=case, dtype=dtype, backward=backward, compiles=compiles)
    section = BACKWARD if backward else FORWARD
    return Race(section, _label(f"{case}, {_DTYPES[dtype]} values", compiles), make)


def _loss(
    section: str,
    family: Family,
    batch: Batch,
    dtype: torch.dtype,
    tiny: bool,
    *,
    compiles: bool = False,
) -> Race:
    batch = Batch(40, 16) if tiny else batch
    make = partial(loss_entrants, family=family, batch=batch, dtype=dtype, compiles=compiles)
    return Race(section, _label(f"{batch}, {_DTYPES[dtype]}", compiles), make)


def _label(case: str, compiles: bool) -> str:
    """Races with what has been compiled are apart: compiling takes long."""
    return f"{case}, compiled" if compiles else case
