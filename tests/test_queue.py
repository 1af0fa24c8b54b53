"""The queue of features against a plain list of the rows it was given."""

import copy
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from pyfeat.losses import FeatureQueue, info_nce
from tests.support_groups import leave_group


def ring(batches: list[Tensor], size: int) -> Tensor:
    """Rows of all batches as the queue must hold them."""
    rows = torch.cat(batches)
    places = torch.arange(len(rows)) % size
    held = torch.zeros(size, *rows.shape[1:], dtype=rows.dtype)
    for place, row in zip(places, rows, strict=True):  # later rows replace earlier ones
        held[place] = row
    return held[: min(len(rows), size)]


SIZES = {
    "never full": (20, [3, 4, 5]),
    "just full": (12, [5, 7, 0]),
    "around the end": (7, [5, 5, 5, 5]),
    "as large as the queue": (6, [2, 6, 6]),
    "larger than the queue": (5, [3, 12, 1, 23]),
    "of one row": (1, [1, 3, 1]),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_latest_rows_are_kept_with_their_ids(case: str) -> None:
    size, counts = SIZES[case]
    queue = FeatureQueue(size, 4, with_ids=True)
    batches = [torch.randn(n, 4) for n in counts]
    ids = torch.split(torch.arange(sum(counts)), counts)
    for i, batch in enumerate(batches):
        queue.enqueue(batch, ids[i])
        assert len(queue) == min(sum(counts[: i + 1]), size)
        assert torch.equal(queue.features, ring(batches[: i + 1], size))
        assert torch.equal(queue.ids, ring(list(ids[: i + 1]), size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_rounded_to_the_dtype_of_the_queue(dtype: torch.dtype) -> None:
    queue, batch = FeatureQueue(4, 3, dtype=dtype), torch.randn(3, 3)
    queue.enqueue(batch)
    assert queue.features.dtype == dtype
    assert torch.equal(queue.features, batch.to(dtype))


def test_a_mask_puts_in_a_part_of_the_batch() -> None:
    queue, batch = FeatureQueue(4, 3, with_ids=True), torch.randn(5, 3)
    mask = torch.tensor([True, False, False, True, True])
    queue.enqueue(batch, torch.arange(5), mask=mask)
    assert torch.equal(queue.features, batch[mask])
    assert torch.equal(queue.ids, torch.tensor([0, 3, 4]))
    queue.enqueue(batch, torch.arange(5), mask=torch.zeros(5, dtype=torch.bool))
    assert len(queue) == 3


def test_reset_empties_the_queue() -> None:
    queue = FeatureQueue(4, 3)
    queue.enqueue(torch.randn(6, 3))
    queue.reset()
    assert queue.features.shape == (0, 3)
    batch = torch.randn(2, 3)
    queue.enqueue(batch)
    assert torch.equal(queue.features, batch)


def test_nothing_is_copied_or_moved() -> None:
    queue = FeatureQueue(4, 3, with_ids=True)
    rows, ids = queue.rows.data_ptr(), queue.row_ids.data_ptr()  # type: ignore[union-attr]
    for count in (3, 3, 9):
        queue.enqueue(torch.randn(count, 3), torch.arange(count))
        assert queue.features.data_ptr() == rows
        assert queue.ids.data_ptr() == ids


def test_rows_are_detached() -> None:
    queue, batch = FeatureQueue(4, 3), torch.randn(2, 3, requires_grad=True)
    queue.enqueue(2 * batch)
    assert not queue.features.requires_grad
    assert torch.equal(queue.features, 2 * batch.detach())


# Checkpoints


def used_queue() -> FeatureQueue:
    queue = FeatureQueue(5, 3, with_ids=True)
    queue.enqueue(torch.randn(7, 3), torch.arange(7))
    return queue


def through_state_dict(queue: FeatureQueue) -> FeatureQueue:
    other = FeatureQueue(queue.size, queue.rows.shape[1], with_ids=True)
    other.load_state_dict(queue.state_dict())
    return other


def through_pickle(queue: FeatureQueue) -> FeatureQueue:
    copied: FeatureQueue = pickle.loads(pickle.dumps(queue))
    return copied


@pytest.mark.parametrize("again", [through_state_dict, through_pickle, copy.deepcopy])
def test_a_checkpoint_resumes_exactly(again: Callable[[FeatureQueue], FeatureQueue]) -> None:
    queue = used_queue()
    other, batch = again(queue), torch.randn(2, 3)
    assert torch.equal(other.features, queue.features)
    for each in (queue, other):
        each.enqueue(batch, torch.tensor([7, 8]))
    assert torch.equal(other.features, queue.features)
    assert torch.equal(other.ids, queue.ids)
    assert other.ids.tolist() == [5, 6, 7, 8, 4]


def test_a_half_full_queue_is_half_full_after_a_reload() -> None:
    queue = FeatureQueue(5, 3, with_ids=True)
    queue.enqueue(torch.randn(2, 3), torch.arange(2))
    assert len(through_state_dict(queue)) == 2


def test_a_queue_belongs_to_the_checkpoint_of_its_model() -> None:
    model = nn.Module()
    model.queue = FeatureQueue(5, 3, with_ids=True)
    assert set(model.state_dict()) == {"queue.rows", "queue.row_ids", "queue.num_enqueued"}
    assert not list(model.parameters())
    assert model.half().state_dict()["queue.rows"].dtype == torch.float16


def test_the_repr_says_how_full_it_is() -> None:
    assert repr(used_queue()) == "FeatureQueue(5, 3, dtype=float32, with_ids=True, filled=5)"


# As keys


def gradient(loss: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(loss, by)[0]


def test_rows_are_keys_of_no_query() -> None:
    queue, keys = used_queue(), torch.randn(4, 3)
    queries = torch.randn(4, 3, requires_grad=True)
    ids = torch.tensor([3, 90, 91, 92])
    loss = info_nce(
        queries,
        keys,
        extra_keys=queue.features,
        query_ids=ids,
        key_ids=torch.cat([ids, queue.ids]),
    )
    logits = 10.0 * queries.double() @ torch.cat([keys, queue.features]).double().T
    logits[0, 4 + 3] = -torch.inf  # id 3 lies at index 3
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gradient(loss, queries), gradient(expected, queries), rtol=1e-5, atol=1e-6
    )


def test_a_gradient_never_comes_from_overwritten_rows() -> None:
    queue = FeatureQueue(5, 3)
    queue.enqueue(torch.randn(5, 3))
    queries, keys = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    losses: list[Callable[[], Tensor]] = [
        lambda: info_nce(queries, queue.features),
        lambda: info_nce(queries, keys, extra_keys=queue.features),
    ]
    refused = 0
    for loss in losses:
        expected = gradient(loss(), queries)
        value = loss()
        queue.enqueue(torch.randn(3, 3))
        try:
            assert torch.equal(gradient(value, queries), expected)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 1  # the first loss keeps rows of the queue itself


def test_enqueueing_after_the_backward_pass_is_safe() -> None:
    queue = FeatureQueue(5, 3)
    queries = torch.randn(4, 3, requires_grad=True)
    for _ in range(3):
        keys = torch.randn(4, 3)
        loss = info_nce(queries, keys, extra_keys=queue.features)
        logits = 10.0 * queries @ torch.cat([keys, queue.features]).T
        expected = torch.nn.functional.cross_entropy(logits, torch.arange(4))
        torch.testing.assert_close(gradient(loss, queries), gradient(expected, queries))
        queue.enqueue(keys)


# Several processes

COUNTS = (3, 0, 8)  # rows of a rank in each of the batches; the other rank has two more


def batches_of(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(n + 2 * rank, 3, generator=generator), torch.arange(n + 2 * rank) + 100 * rank)
        for n in COUNTS
    ]


def enqueue_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    group, queue = dist.group.WORLD, FeatureQueue(9, 3, with_ids=True)
    states = []
    for features, ids in batches_of(rank):
        mask = ids % 100 != 1
        queue.enqueue(features, ids, mask=mask, group=group)
        states.append((queue.features.clone(), queue.ids.clone()))
    refusals = []
    for bad in (torch.zeros(2, 4 if rank else 3), torch.zeros(2, 3)):
        try:
            queue.enqueue(bad, torch.arange(2), group=group)
        except (ValueError, RuntimeError) as error:
            refusals.append(str(error))
        if rank:
            queue.num_enqueued += 1
    torch.save((states, refusals), folder / f"{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_all_ranks_put_in_the_rows_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(enqueue_on_rank, (tmp_path,), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    queue = FeatureQueue(9, 3, with_ids=True)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, batches in enumerate(zip(batches_of(0), batches_of(1), strict=True)):
        for features, ids in batches:
            queue.enqueue(features, ids, mask=ids % 100 != 1)
        for states, _ in found:
            assert torch.equal(states[i][0], queue.features)
            assert torch.equal(states[i][1], queue.ids)
    (_, refusals), (_, others) = found
    assert others[0].endswith("features must have shape (2, 3), got (2, 4)")
    assert refusals[0].endswith(f"got on rank 1: {others[0]}")
    assert "num_enqueued must be the same on all ranks, got 23 on rank 0 and 24" in refusals[1]
    assert others[1] == refusals[1]


def test_a_group_of_one_is_no_different(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 's'}", rank=0, world_size=1)
    try:
        queue, batch = FeatureQueue(3, 2, with_ids=True), torch.randn(5, 2)
        queue.enqueue(batch, torch.arange(5), group=dist.group.WORLD)
    finally:
        leave_group()
    assert torch.equal(queue.features, ring([batch], 3))
    assert torch.equal(queue.ids, torch.tensor([3, 4, 2]))


# Refusals


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, r"FeatureQueue: size must be at least 1, got 0"),
        ((2, -1), {}, ValueError, r"FeatureQueue: dim must be at least 1, got -1"),
        ((2.0, 3), {}, TypeError, r"FeatureQueue: size must be an integer, got 2\.0"),
        ((True, 3), {}, TypeError, r"FeatureQueue: size must be an integer, got True"),
        (
            (2, 3),
            {"dtype": torch.int64},
            TypeError,
            r"FeatureQueue: dtype must be float32 or float64 or float16 or bfloat16, got torch\.int64",
        ),
    ],
)
def test_a_queue_that_cannot_be_is_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FeatureQueue(*arguments, **options)


@pytest.mark.parametrize(
    ("with_ids", "arguments", "options", "error", "message"),
    [
        (
            False,
            (torch.zeros(2, 4),),
            {},
            ValueError,
            r"features must have shape \(2, 3\), got \(2, 4\)",
        ),
        (
            False,
            (torch.zeros(3),),
            {},
            ValueError,
            r"features must have shape \(N, D\), got \(3,\)",
        ),
        (False, (torch.zeros(2, 3).int(),), {}, TypeError, r"features must be float32 or .* int32"),
        (
            False,
            (torch.zeros(2, 3, device="meta"),),
            {},
            ValueError,
            r"features must be on cpu, got meta",
        ),
        (
            False,
            (torch.tensor([[0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]]),),
            {},
            ValueError,
            r"features must be finite, got NaN or infinity in row 1",
        ),
        (
            False,
            (torch.zeros(2, 3), torch.zeros(2).long()),
            {},
            ValueError,
            r"ids must be None for a queue without ids, got Tensor",
        ),
        (True, (torch.zeros(2, 3),), {}, ValueError, r"ids must be given, got NoneType"),
        (
            True,
            (torch.zeros(2, 3), torch.zeros(3).long()),
            {},
            ValueError,
            r"ids must have shape \(2,\), got \(3,\)",
        ),
        (
            True,
            (torch.zeros(2, 3), torch.zeros(2)),
            {},
            TypeError,
            r"ids must be int64, got float32",
        ),
        (
            False,
            (torch.zeros(2, 3),),
            {"mask": torch.zeros(2)},
            TypeError,
            r"mask must be bool, got float32",
        ),
        (
            False,
            (torch.zeros(2, 3),),
            {"mask": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            r"mask must have shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_the_queue_as_it_was(
    with_ids: bool,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    queue = FeatureQueue(4, 3, with_ids=with_ids)
    queue.enqueue(torch.ones(2, 3), torch.arange(2) if with_ids else None)
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises(error, match=f"FeatureQueue.enqueue: {message}"):
        queue.enqueue(*arguments, **options)
    after = queue.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_features_that_a_narrow_queue_cannot_hold_are_refused() -> None:
    queue = FeatureQueue(4, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinity in row 1"):
        queue.enqueue(torch.tensor([[1.0], [1e5]]))


def test_a_queue_without_ids_has_none_to_show() -> None:
    with pytest.raises(ValueError, match=r"FeatureQueue\.ids: with_ids must be True, got False"):
        FeatureQueue(4, 3).ids  # noqa: B018
