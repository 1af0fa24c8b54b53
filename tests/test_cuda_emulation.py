"""The device layer, emulated as the manuals define it, and what the emulation finds in kernels."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support_emulation import emulated_program

NATIVE = Path(__file__).parent / "native"


def test_the_device_layer_does_what_plain_sums_do() -> None:
    program = emulated_program(NATIVE / "check_device.cu")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr


# What the emulation says of the kernels of check_emulation.cu, threads in ascending order and in
# descending order.
RACE = "races with thread"
FAULTS = {
    "part_at_a_barrier": "32 at a barrier of the block .*; 32 at ended",
    "part_at_a_shuffle": "while lane .* is at a (shuffle|barrier of the warp)",
    "leave_before_a_vote": "a ballot, which lane 7 has left without",
    "shuffle_without_oneself": "a shuffle without the calling lane in its mask 0000ffff",
    "wait_for_too_many": "threads wait for each other: 64 at a named barrier",
    "read_past_the_end": "a read of 4 bytes outside of all buffers, 0 bytes past the end of one",
    "write_before_the_beginning": "a write of 4 bytes outside of all buffers",
    "read_unaligned": "an address that is not aligned for its type",
    "index_past_an_array": "an index past an array",
    "overflow_an_integer": "a product of integers that overflows",
    "convert_what_is_too_large": "a conversion to an integer that cannot hold it",
    "write_past_shared_memory": "a write of 4 bytes at 256 of 256 bytes of shared memory",
    "read_unwritten_shared_memory": "shared byte .*, which nobody has written",
    "read_without_a_barrier": f"which nobody has written|{RACE}",
    "overwrite_without_a_barrier": RACE,
    "take_a_shuffle_for_a_barrier": RACE,
    "take_a_warp_for_a_block": "which nobody has written",
    "write_the_same_buffer": f"a write of global byte 0 {RACE}",
    "write_from_two_blocks": "a write of global byte 0 races with block . of the grid",
    "count_without_atomics": "races with (block 0 of the grid|thread 2 of the block)",
    "publish_without_a_fence": "a read of global byte .* races with block . of the grid",
    "read_before_the_wait": "a read of shared byte .*, whose copy is on its way",
    "wait_for_too_few": "a read of shared byte .*, whose copy is on its way",
    "wait_without_a_barrier": "which nobody has written",
    "copy_over_what_is_read": f"shared byte .* {RACE}|shared byte .*, whose copy is on its way",
    "copy_to_unaligned": "a copy of 16 bytes from or to an address that is no multiple of it",
    "copy_from_past_the_end": "a read of 16 bytes outside of all buffers",
    "use_a_barrier_before_it_is_seen": f"which nobody has written|{RACE}",
    "copy_with_an_unfenced_barrier": "a barrier that its maker has not fenced",
    "read_a_bulk_before_the_wait": "a read of shared byte .*, whose copy is on its way",
    "expect_too_much": "threads wait for each other: 64 at a barrier in shared memory",
    "multiply_without_a_fence": "products of a warpgroup without a fence before",
    "multiply_what_is_not_published": "which no proxy fence published",
    "multiply_without_a_commit": "ends before its warpgroup's products have been waited for",
    "overwrite_operands": f"which no proxy fence published|{RACE}",
    "multiply_unaligned": "a descriptor that is not one of 128-byte swizzle",
}
# Kernels without a fault, and what they write.
RIGHT = {"publish_with_a_fence": 2, "take_turns": 8, "read_products_early": 2}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    program = emulated_program(NATIVE / "check_emulation.cu")
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("order", ["", " backwards"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, order: str, outcomes: dict[str, str]) -> None:
    said = outcomes[name + order]
    assert re.search(FAULTS[name], said), said
    assert f", in pyfeat::cuda::(anonymous namespace)::{name}(int*) at check_emulation.cu" in said


@pytest.mark.parametrize("order", ["", " backwards"])
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_goes_through(name: str, order: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name + order] == f"nothing, and has {RIGHT[name]}"


def test_every_kernel_of_the_check_is_listed(outcomes: dict[str, str]) -> None:
    assert len(outcomes) == 2 * len({*FAULTS, *RIGHT})


def test_the_emulated_module_is_that_of_the_bindings() -> None:
    support = pytest.importorskip("tests.support_cuda")
    if support.EMULATION is None:
        pytest.skip("there is a GPU")
    from pyfeat import _cuda

    assert _cuda.__version__ == "emulated"
    assert _cuda.architectures() == ["80-real", "90a-real"]
    assert _cuda.driver_version() == _cuda.runtime_version() == 13000
