"""The tiles of the Triton kernels come from a file, which only whoever asks for it measures again."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import tune as tuning
from benchmarks.gpu.clock import HostClock
from benchmarks.gpu.tune import Slot, tune
from tests.support_triton import DEVICE, contrast_tiles, shortlist, tile_table, tiles

KERNELS = {"search", "search, masked", "pairs, 2 bytes", "pairs, 4 bytes"}
SHARED_BYTES = {"8.0": 99 << 10, "9.0": 227 << 10}


class TileClock(HostClock):
    """A tile takes as many seconds as it has stages."""

    def __init__(self, kernels: dict[str, Any]) -> None:
        super().__init__()
        self._kernels = kernels

    def seconds(self, run: Callable[[], object], *, cold: bool) -> float:
        return float(self._kernels["search"][0].num_stages)


def _tuned(candidates: Sequence[tuple[int, ...]], call: Callable[[Any], list[Tensor]]) -> Any:
    used = tiles.TileConfig(16, 128, 64, 4, 4)
    kernels = {"search": (used, used)}
    slot = Slot("search", 0, list(candidates), lambda: call(kernels["search"][0]))
    tune(slot, kernels, TileClock(kernels))
    assert kernels["search"][1] == used
    return kernels["search"][0]


def test_the_fastest_tile_with_the_same_answer_is_taken() -> None:
    def call(tile: Any) -> list[Tensor]:
        if tile.num_stages == 1:
            message = "out of shared memory"
            raise RuntimeError(message)
        return [torch.tensor(0.0 if tile.num_stages == 2 else 1.0)]

    candidates = [(16, 128, 64, 4, stages) for stages in (6, 4, 3, 2, 1)]
    assert _tuned(candidates, call).num_stages == 3
    assert _tuned(candidates[:2], call).num_stages == 4
    assert _tuned(candidates[3:], call).num_stages == 4


def test_a_tile_that_is_hardly_faster_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "GAIN", 0.7)
    assert _tuned([(16, 128, 64, 4, 3)], lambda tile: []).num_stages == 4


def test_the_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    tile_table.write_table(tile_table.read_table(tile_table.PATH), path)
    assert path.read_bytes() == tile_table.PATH.read_bytes()


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_every_tile_of_the_file_can_be_launched(capability: str) -> None:
    kernels = tile_table.read_table(tile_table.PATH)[capability]
    assert set(kernels) == KERNELS
    for kernel, configs in kernels.items():
        size = 4 if kernel == "pairs, 4 bytes" else 2
        for tile in configs:
            stages = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * size
            assert stages <= SHARED_BYTES[capability], tile
            assert tile.num_warps in (4, 8)
        if kernel.startswith("pairs"):
            assert [tile.block_m for tile in configs] == [tile.block_n for tile in configs]
            assert all(128 % tile.block_m == 0 for tile in configs)
        else:
            assert [tile.block_m for tile in configs] == [16, 64, 128]
            assert all(shortlist.ROW_MULTIPLE % tile.block_n == 0 for tile in configs)


def test_a_gpu_takes_the_tiles_of_its_capability_or_of_one_like_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = tile_table.read_table(tile_table.PATH)
    table["12.0"] = {"search": table["9.0"]["search"][:1]}
    monkeypatch.setattr(tile_table, "table", lambda: table)
    device = torch.device("cuda")
    for capability, name in (
        ((8, 0), "8.0"),
        ((8, 9), "8.0"),
        ((9, 0), "9.0"),
        ((10, 3), "9.0"),
        ((12, 0), "12.0"),
        ((12, 1), "8.0"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert tile_table.tiles_of("search", device) == table[name]["search"]


def test_launchers_take_their_tiles_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiles.TileConfig(32, 32, 16, 4, 1)
    monkeypatch.setattr(tile_table, "table", lambda: {"8.0": dict.fromkeys(KERNELS, (one,))})
    cpu, features = torch.device("cpu"), torch.zeros(4, 4)
    for masked in (False, True):
        assert shortlist.choose_tile(5, cpu, masked=masked) == one
    assert contrast_tiles.choose_tile(9, 9, features) == one
    assert contrast_tiles.gradient_tile(9, 9, features.bfloat16()) == one


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU would be measured")
def test_a_rehearsal_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tile_table.read_table(tile_table.PATH)
    monkeypatch.setattr(tile_table, "table", lambda: table)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    path = tmp_path / "tiles.json"
    assert tuning.main(["--rehearse", "--write", "--out", str(path)]) == 0
    written = tile_table.read_table(path)
    shipped = tile_table.read_table(tile_table.PATH)
    assert set(written) == set(shipped)
    assert written["9.0"] == shipped["9.0"]
    for kernel, configs in written["8.0"].items():
        sides = [tile.block_m for tile in configs]
        assert sides == [tile.block_m for tile in shipped["8.0"][kernel]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuning.main([]) == 2
    assert "torch sees no NVIDIA GPU" in capsys.readouterr().err
