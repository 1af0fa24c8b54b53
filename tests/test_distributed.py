"""Losses over the batches of several processes against those of one."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat import reference
from pyfeat._contrast import Pairs, PairSums, pair_sums
from pyfeat._softplus import pair_softplus
from pyfeat.losses._group import REDUCES, Meeting
from tests.support_distributed import (
    DIM,
    DISAGREEMENTS,
    LARGE_BLOCK,
    SCALE,
    SIZES,
    SOFTPLUS,
    SUMS,
    Problem,
    run_on_ranks,
    whole_problem,
    with_gradients,
    with_softplus_gradients,
)
from tests.support_distributed_losses import (
    LOSSES,
    METRICS,
    VARIANTS,
    Encoder,
    encoder_gradients,
    metrics_of,
    whole_batch,
)
from tests.support_distributed_losses import with_gradients as loss_with_gradients

WORLD_SIZES = tuple(SIZES)


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank found."""
    return run_on_ranks(request.param, tmp_path_factory.mktemp("ranks"))


def results_of(ranks: list[dict[str, Any]], case: str) -> list[Any]:
    return [rank[case] for rank in ranks]


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_and_gradients_are_those_of_one_process(
    ranks: list[dict[str, Any]], case: Any
) -> None:
    size, terms, columns, _, dtype = case
    sizes = SIZES[len(ranks)][size]
    found = results_of(ranks, f"sums {case}")
    problem = whole_problem(sizes, terms, columns, dtype)
    one = with_gradients(problem, functools.partial(pair_sums, columns=columns, largest=True))
    wide = problem._replace(a=problem.a.double(), b=problem.b.double())
    exact = with_gradients(wide, functools.partial(exact_sums, columns=columns))
    assert_as_near(found, one, exact, wide, dtype)


def assert_as_near(
    found: list[list[Tensor]],
    one: list[Tensor],
    exact: list[Tensor],
    wide: Problem,
    dtype: torch.dtype,
) -> None:
    """Sums of ranks, and gradients of the dtype, as near to what is exact as those of one process."""
    grad_a = next(x for x in exact if x.shape == wide.a.shape)
    for i, (single, true) in enumerate(zip(one, exact, strict=True)):
        parts = [result[i] for result in found]
        joined = torch.stack(parts).sum(dim=0) if true.ndim == 0 else torch.cat(parts)
        finite = true.masked_fill(true == -torch.inf, 0.0)
        # The gradient by the scale is a sum of <a_i, da_i>, which may cancel.
        summed = (wide.a * grad_a).sum(dim=1).abs().sum() / SCALE
        largest = float(summed) if true.ndim == 0 else largest_of(finite)
        # Of 16 bits, gradients are rounded once.
        rtol = max(1e-6, torch.finfo(dtype).eps if true.ndim == 2 else 0.0)
        torch.testing.assert_close(joined, single, rtol=rtol, atol=1e-6 * largest)
        floor = 1e-6 * max(largest, 1.0)
        torch.testing.assert_close(joined.double(), true.double(), rtol=rtol, atol=floor)


def exact_sums(a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, *, columns: bool) -> PairSums:
    sums = PairSums(*reference.pair_sums(a, b, scale, *pairs))
    none = sums.row_lse.new_empty(0)
    return sums if columns else sums._replace(column_lse=none, column_positives=none)


@pytest.mark.parametrize("case", SOFTPLUS, ids=str)
def test_softplus_and_gradients_are_those_of_one_process(
    ranks: list[dict[str, Any]], case: Any
) -> None:
    size, terms, uniform, _, dtype = case
    problem = whole_problem(SIZES[len(ranks)][size], terms, dtype=dtype)
    wide = problem._replace(a=problem.a.double(), b=problem.b.double())
    one = with_softplus_gradients(problem, pair_softplus, uniform=uniform)
    exact = with_softplus_gradients(
        wide, lambda *x: reference.pair_softplus(*x[:4], *x[4][1:6]), uniform=uniform
    )
    assert_as_near(results_of(ranks, f"softplus {case}"), one, exact, wide, dtype)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_losses_and_gradients_are_those_of_one_process(
    ranks: list[dict[str, Any]], variant: Any
) -> None:
    name, reduction, reduce, _, dtype = variant
    world_size = len(ranks)
    found = results_of(ranks, f"loss {variant}")
    whole = whole_batch(world_size, dtype)
    loss, *gradients, by_temperature = loss_with_gradients(LOSSES[name], whole, reduction=reduction)
    rtol = 1e-6 if dtype == torch.float32 else 1e-12
    close = functools.partial(torch.testing.assert_close, rtol=rtol)
    if reduction == "none":
        close(torch.cat([result[0] for result in found]), loss, atol=rtol)
    else:
        assert all(torch.equal(result[0], found[0][0]) for result in found)
        close(found[0][0], loss, atol=0.0)
    factor = world_size if reduce == "ddp_mean" and reduction != "none" else 1
    for i, gradient in enumerate(gradients, 1):
        joined = torch.cat([result[i] for result in found]) / factor
        close(joined, gradient, atol=rtol * max(1e-3, largest_of(gradient)))
    parts = torch.stack([result[-1] for result in found])
    close(parts.sum() / factor, by_temperature, atol=rtol * float(parts.abs().sum()))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    expected = metrics_of(LOSSES[name], whole_batch(len(ranks)))
    for found in results_of(ranks, f"metrics {name}"):
        for ours, one in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduce", REDUCES)
def test_ranks_train_like_one_process(ranks: list[dict[str, Any]], reduce: str) -> None:
    expected = encoder_gradients(Encoder(), whole_batch(len(ranks)))
    assert len(expected) == 5
    for gradients in results_of(ranks, f"training {reduce}"):
        for found, one in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-14)


def test_compiled_code_calls_losses_of_a_group(ranks: list[dict[str, Any]]) -> None:
    for found in results_of(ranks, "compiled"):
        if len(ranks) == 2:
            eager, compiled = found
            assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


def test_losses_refuse_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    refused = results_of(ranks, "refused losses")
    for rank, (nan, dim, ids, scale, reduction, reduce, dense, twice) in enumerate(refused):
        finite = "clip_loss: image must be finite, got NaN or infinity in row 0"
        elsewhere = "RuntimeError: {op}: arguments must be valid on all ranks, got on rank 1: "
        if rank == 1:
            assert nan == f"ValueError: {finite}"
            assert reduce.startswith(
                "ValueError: info_nce: reduce must be one of 'ddp_mean', 'sum'"
            )
        else:
            assert nan == elsewhere.format(op="clip_loss") + finite
            assert reduce.startswith(elsewhere.format(op="info_nce") + "info_nce: reduce must be")
        same = "must be the same on all ranks, got"
        assert dim == f"ValueError: clip_loss: D {same} 4 on rank 0 and 3 on rank 1"
        assert ids == f"ValueError: clip_loss: image_ids {same} None on rank 0 and given on rank 1"
        assert scale == f"ValueError: nt_xent: scale {same} 4.0 on rank 0 and 2.0 on rank 1"
        assert reduction == (
            f"ValueError: supcon_loss: reduction {same} mean on rank 0 and sum on rank 1"
        )
        assert dense == (
            "NotImplementedError: info_nce: group must be None with backend 'reference', got a group"
        )
        assert twice == (
            "RuntimeError: gradients over the processes of a group must be differentiated once, got twice"
        )


def largest_of(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def test_a_ring_holds_the_columns_of_one_other_rank_only(ranks: list[dict[str, Any]]) -> None:
    block = LARGE_BLOCK * DIM
    assert set(results_of(ranks, "largest ring")) == {block}
    assert set(results_of(ranks, "largest gather")) == {len(ranks) * block}


def test_small_blocks_are_gathered(ranks: list[dict[str, Any]]) -> None:
    assert results_of(ranks, "schedules") == [["gather", "ring", "gather"]] * len(ranks)


def test_totals_have_the_same_bits_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    totals = [total for total, _ in results_of(ranks, "total sum")]
    assert all(torch.equal(total, totals[0]) for total in totals)
    count = len(ranks)
    torch.testing.assert_close(float(totals[0][1]), count * (count - 1) / 2 + 0.3 * count)


def test_gradients_of_a_mean_over_ranks_are_as_many_times_as_large(
    ranks: list[dict[str, Any]],
) -> None:
    for reduce, factor in (("sum", 1.0), ("ddp_mean", float(len(ranks)))):
        for _, grad in results_of(ranks, f"total {reduce}"):
            assert grad.tolist() == [2.0 * factor, 3.0 * factor]


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_what_differs_is_named_on_all_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    for message in results_of(ranks, f"disagreement {name}"):
        assert message.startswith(f"ValueError: clip_loss: {DISAGREEMENTS[name][1]}") or (
            name == "loss" and message.startswith(f"ValueError: info_nce: {DISAGREEMENTS[name][1]}")
        )


def test_an_error_on_one_rank_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank, message in enumerate(results_of(ranks, "refused")):
        told = "RuntimeError: clip_loss: arguments must be valid on all ranks, got on rank 1: bad"
        assert message == ("ValueError: bad" if rank == 1 else told)


def test_groups_work_side_by_side_and_refuse_others(ranks: list[dict[str, Any]]) -> None:
    members = [list(range(len(ranks)))[i::2] for i in (0, 1)]
    found = results_of(ranks, "subgroups")
    sizes = ((11,) * (len(ranks) // 2),) * 2
    problem = whole_problem(sizes, "positives")
    expected = pair_sums(*problem[:4])
    for group in members:
        for i, one in enumerate(expected):
            joined = torch.cat([found[rank][1][i] for rank in group])
            torch.testing.assert_close(joined, one, rtol=1e-6, atol=1e-6)
    for outside, _ in found:
        assert outside == (
            "ValueError: clip_loss: group must contain this process, got a group of others"
        )


def test_a_group_must_send_tensors_of_the_device(ranks: list[dict[str, Any]]) -> None:
    must = "ValueError: clip_loss: group must send tensors on"
    for messages in results_of(ranks, "backends"):
        assert messages == [
            "no error, but None",
            f"{must} cuda from rank to rank, got cpu:gloo,cuda:gloo",
            f"{must} cpu from rank to rank, got cuda:nccl",
            "no error, but None",
        ]


def test_a_group_must_be_a_process_group() -> None:
    with pytest.raises(TypeError, match="clip_loss: group must be a ProcessGroup or None, got str"):
        Meeting("clip_loss", "gloo")  # type: ignore[arg-type]
