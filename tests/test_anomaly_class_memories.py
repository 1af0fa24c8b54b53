"""Memories of classes: rings that never mix, and that survive a file."""

from pathlib import Path

import pytest
import torch

from pyfeat.anomaly.class_memories import ClassMemories


def numbered(first: int, count: int, sign: int = 1) -> torch.Tensor:
    return sign * torch.arange(first, first + count)[:, None].float().expand(-1, 2)


def filled() -> ClassMemories:
    memories = ClassMemories(5, 2)
    memories.enqueue("a", numbered(1, 4), sample=10)
    memories.enqueue("b/é", numbered(1, 3, -1), sample=20)
    memories.enqueue("a", numbered(5, 3), sample=11)
    return memories


def test_rings_hold_the_latest_rows_of_their_own_class() -> None:
    memories = filled()
    assert memories.categories == ["a", "b/é"]
    assert sorted(memories.rows("a")[:, 0].tolist()) == [3, 4, 5, 6, 7]
    assert memories.rows("b/é")[:, 0].tolist() == [-1, -2, -3]
    held = dict(zip(memories.rows("a")[:, 0].tolist(), memories.samples("a").tolist(), strict=True))
    assert held == {3: 10, 4: 10, 5: 11, 6: 11, 7: 11}
    assert memories.rows("c").shape == (0, 2)
    assert memories.samples("c").shape == (0,)
    assert [memories.fill(name) for name in ("a", "b/é", "c")] == [1.0, 0.6, 0.0]


def test_rows_are_detached_and_masked() -> None:
    memories = ClassMemories(5, 2)
    features = numbered(1, 3).clone().requires_grad_()
    memories.enqueue("a", features, sample=0, mask=torch.tensor([True, False, True]))
    assert memories.rows("a")[:, 0].tolist() == [1, 3]
    assert not memories.rows("a").requires_grad


def test_memories_go_on_after_a_file_as_if_there_had_been_none(tmp_path: Path) -> None:
    memories = filled()
    memories.save(tmp_path / "memories.safetensors")
    loaded = ClassMemories.load(tmp_path / "memories.safetensors")
    for each in (memories, loaded):
        each.enqueue("a", numbered(8, 2), sample=12)
        each.enqueue("c", numbered(1, 1), sample=30)
    assert loaded.categories == memories.categories
    for name in memories.categories:
        assert torch.equal(loaded.rows(name), memories.rows(name))
        assert torch.equal(loaded.samples(name), memories.samples(name))


def test_a_class_is_not_kept_for_rows_that_were_refused() -> None:
    memories = ClassMemories(5, 2)
    with pytest.raises(ValueError, match="features must be finite"):
        memories.enqueue("a", torch.full((1, 2), torch.nan), sample=0)
    assert memories.categories == []


def test_wrong_sizes_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ClassMemories: capacity must be at least 1, got 0"):
        ClassMemories(0, 2)
    with pytest.raises(TypeError, match=r"ClassMemories: dim must be an integer, got 2.5"):
        ClassMemories(2, 2.5)  # type: ignore[arg-type]
    path = tmp_path / "memories.safetensors"
    filled().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"ClassMemories.load: path must be a whole safetensors"):
        ClassMemories.load(path)
