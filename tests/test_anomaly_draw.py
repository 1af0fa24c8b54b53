"""An even draw from a stream."""

import math

import pytest
import torch
from torch import Tensor

from pyfeat.anomaly.draw import Draw


def drawn(count: int | None, seed: int, total: int, batch: int) -> tuple[Tensor, Tensor]:
    """What a draw from rows [i, -i] with ids i leaves, offered ``batch`` at a time."""
    draw = Draw(count, seed)
    for begin in range(0, total, batch):
        ids = torch.arange(begin, min(begin + batch, total))
        draw.add(torch.stack([ids, -ids], dim=1).float(), ids)
    return draw.result()


@pytest.mark.parametrize("count", [1, 20, 149, 150, 151, None])
def test_a_draw_keeps_items_with_their_ids_in_the_order_of_the_stream(count: int | None) -> None:
    features, ids = drawn(count, 1, 150, 7)
    assert len(ids) == min(count or 150, 150)
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert torch.equal(features, torch.stack([ids, -ids], dim=1).float())


@pytest.mark.parametrize("batch", [1, 3, 40, 150])
def test_the_size_of_the_offers_does_not_change_the_draw(batch: int) -> None:
    assert torch.equal(drawn(20, 5, 150, batch)[1], drawn(20, 5, 150, 11)[1])


def test_the_seed_decides_the_draw() -> None:
    assert torch.equal(drawn(20, 5, 150, 7)[1], drawn(20, 5, 150, 7)[1])
    assert not torch.equal(drawn(20, 5, 150, 7)[1], drawn(20, 6, 150, 7)[1])


def test_every_item_is_as_likely_as_any_other() -> None:
    counts = torch.zeros(30)
    for seed in range(1000):
        counts[drawn(10, seed, 30, 4)[1]] += 1
    # 333 each on average, with a variance of 1000 x 1/3 x 2/3: 5 standard deviations.
    assert (counts - 1000 / 3).abs().max() < 5 * math.sqrt(1000 * 2 / 9)


def test_a_draw_holds_no_more_than_twice_what_it_keeps() -> None:
    draw = Draw(10, 0)
    for _ in range(50):
        draw.add(torch.zeros(6, 2), torch.zeros(6))
        assert sum(len(part[0]) for part in draw._parts) <= 2 * 10
