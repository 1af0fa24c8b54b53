"""The parts of objectives: heads, schedules, teachers, masks, optimisers."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn import functional

from pyfeat.ssl.parts import (
    LARS,
    MLP,
    BatchNorm,
    Prototypes,
    Schedule,
    Teacher,
    block_masking,
    random_masking,
)
from tests.support_groups import leave_group


def test_a_head_is_linear_layers_with_norms_between() -> None:
    head = MLP((6, 8, 8, 4), last_norm=True)
    kinds = [type(layer).__name__ for layer in head]
    middle = ["Linear", "BatchNorm", "ReLU"]
    assert kinds == [*middle, *middle, "Linear", "BatchNorm"]
    assert [layer.bias is None for layer in head if isinstance(layer, nn.Linear)] == [True] * 3
    y = head(torch.randn(16, 6))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(4), atol=1e-2, rtol=0)
    assert head[-1].weight is None


def test_a_head_without_norms_has_biases() -> None:
    head = MLP((6, 8, 4), norm="none", activation="gelu")
    assert [type(layer).__name__ for layer in head] == ["Linear", "GELU", "Linear"]
    assert all(layer.bias is not None for layer in head if isinstance(layer, nn.Linear))


@pytest.mark.parametrize(
    ("dims", "options", "error"),
    [
        ((3,), {}, r"MLP: dims must have at least two numbers, got \(3,\)"),
        ((3, 0), {}, r"MLP: dims\[1\] must be at least 1, got 0"),
        ((3, 2), {"norm": "group"}, "MLP: norm must be one of 'batch', 'layer', 'none'"),
    ],
)
def test_a_head_refuses(dims: tuple[int, ...], options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        MLP(dims, **options)  # type: ignore[arg-type]


def test_prototypes_keep_length_one_and_may_be_frozen_at_first() -> None:
    prototypes = Prototypes(5, 3, frozen_steps=2)
    for step in range(3):
        prototypes(torch.randn(4, 3)).sum().backward()
        prototypes.freeze(step)
        assert (prototypes.weight.grad is None) == (step < 2)
    with torch.no_grad():
        prototypes.weight.mul_(3.0)
    prototypes.normalize()
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(5))
    with pytest.raises(ValueError, match="frozen_steps must be at least 0, got -1"):
        Prototypes(5, 3, frozen_steps=-1)


def test_a_schedule_rises_straight_and_falls_along_a_cosine() -> None:
    schedule = Schedule(2.0, 1.0, total=21, warmup=10, first=0.5)
    assert schedule(0) == 0.5
    assert schedule(5) == 1.25
    assert schedule(10) == 2.0
    assert schedule(15) == pytest.approx(1.5)
    assert schedule(13) == pytest.approx(1.0 + 0.5 * (1.0 + math.cos(0.3 * math.pi)))
    assert schedule(20) == 1.0
    assert schedule(1000) == 1.0
    assert [Schedule(0.3)(step) for step in (0, 7)] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"total": 0}, "total must be at least 1, got 0"),
        ({"total": 3, "warmup": 4}, r"warmup must be in \[0, total = 3\], got 4"),
        ({"end": math.nan}, "end must be finite, got nan"),
    ],
)
def test_a_schedule_refuses(options: dict[str, float], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Schedule(1.0, **options)  # type: ignore[arg-type]


def test_a_teacher_is_the_running_mean_of_its_student() -> None:
    layer, norm = nn.Linear(3, 4), BatchNorm(4)
    student = nn.Sequential(layer, norm)
    teacher = Teacher(student)
    expected = layer.weight.detach().clone()
    for momentum in (0.9, 0.5):
        with torch.no_grad():
            layer.weight.normal_()
        teacher.update(student, momentum)
        expected = momentum * expected + (1.0 - momentum) * layer.weight.detach()
    state = teacher.module.state_dict()
    torch.testing.assert_close(state["0.weight"], expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.randn(5, 3)).requires_grad
    # Statistics are its own: it sees its own views.
    assert int(state["1.num_batches_tracked"]) == 1
    assert int(student.state_dict()["1.num_batches_tracked"]) == 0


def test_a_teacher_refuses_another_module_and_another_momentum() -> None:
    teacher = Teacher(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="student must have the parameters that were copied"):
        teacher.update(nn.Linear(2, 3), 0.9)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        teacher.update(nn.Linear(2, 2), 1.5)


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.75, 0.99])
def test_as_many_patches_are_hidden_as_asked_for(ratio: float) -> None:
    for masking in (random_masking(9, 64, ratio), block_masking(9, (8, 8), ratio)):
        count = round(64 * ratio)
        assert masking.hidden.shape == (9, count)
        both = torch.cat([masking.seen, masking.hidden], dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(64).expand(9, -1))
        assert torch.equal(masking.mask().sum(dim=1), torch.full((9,), count))
        for patches in masking:
            assert torch.equal(patches, patches.sort(dim=1).values)


def test_patches_are_hidden_evenly() -> None:
    hidden = random_masking(4000, 10, 0.3).mask().double().mean(dim=0)
    assert (hidden - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 4000)


def test_blocks_hang_together() -> None:
    def touching(mask: torch.Tensor) -> float:
        grid = mask.view(-1, 12, 12).float()
        pairs = (grid[:, 1:] * grid[:, :-1]).sum() + (grid[:, :, 1:] * grid[:, :, :-1]).sum()
        return float(pairs / grid.sum())

    blocks = touching(block_masking(50, (12, 12), 0.4).mask())
    assert blocks > 1.4 * touching(random_masking(50, 144, 0.4).mask())


def test_masks_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="ratio must hide at least one of 10 patches"):
        random_masking(2, 10, 0.01)
    with pytest.raises(ValueError, match="ratio must hide at least one of 16 patches"):
        block_masking(2, (4, 4), 1.0)
    with pytest.raises(ValueError, match=r"min_aspect must be in \(0, 1\], got 0.0"):
        block_masking(2, (4, 4), 0.5, min_aspect=0.0)
    assert block_masking(0, (4, 4), 0.5).seen.shape == (0, 8)


def test_lars_follows_its_formula() -> None:
    weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (3,)))
    optimiser = LARS([weight, bias], 0.5, momentum=0.9, weight_decay=0.1, trust=0.02)
    wanted = [weight.detach().clone(), bias.detach().clone()]
    velocities = [torch.zeros(3, 4), torch.zeros(3)]
    for _ in range(3):
        for i, parameter in enumerate((weight, bias)):
            parameter.grad = torch.randn_like(parameter)
            step = parameter.grad + 0.1 * wanted[i]
            if i == 0:
                step = step * 0.02 * wanted[i].norm() / step.norm()
            velocities[i] = 0.9 * velocities[i] + step
            wanted[i] = wanted[i] - 0.5 * velocities[i]
        optimiser.step()
    torch.testing.assert_close([weight.detach(), bias.detach()], wanted)


def test_lars_moves_a_weight_of_zeros_and_refuses_nonsense() -> None:
    weight = torch.zeros(2, 2, requires_grad=True)
    weight.grad = torch.ones(2, 2)
    LARS([weight], 0.5).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))
    with pytest.raises(ValueError, match=r"LARS: momentum must be in \[0, 1\), got 1.0"):
        LARS([weight], 0.5, momentum=1.0)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5), (6, 3, 2, 3, 2)])
def test_batch_norm_alone_is_that_of_torch(shape: tuple[int, ...]) -> None:
    norm, x = BatchNorm(3), torch.randn(*shape)
    kinds: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    theirs = kinds[len(shape)](3)
    assert torch.equal(norm(x), theirs(x))
    assert {n: v.tolist() for n, v in norm.state_dict().items()} == {
        n: v.tolist() for n, v in theirs.state_dict().items()
    }
    assert torch.equal(norm.eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, \.\.\.\), got \(6, 2\)"):
        norm(torch.zeros(6, 2))


SIZES = (5, 2)  # rows of each process


def _normalized(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(SIZES))
    torch.manual_seed(0)
    x = torch.randn(sum(SIZES), 3, 4, dtype=torch.float64)
    weights = torch.randn(sum(SIZES), 3, 4, dtype=torch.float64)

    alone = nn.BatchNorm1d(3, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    (expected := alone(whole)).backward(weights)

    mine = slice(*((0, 5), (5, 7))[rank])
    norm = BatchNorm(3).double()
    part = x[mine].clone().requires_grad_()
    y = norm(part)
    y.backward(weights[mine])
    torch.testing.assert_close(y, expected[mine])
    assert part.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(part.grad, whole.grad[mine])
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    torch.testing.assert_close(norm.running_var, alone.running_var)
    # Gradients of the scale and the shift are parts, which DDP adds up.
    for ours, theirs in ((norm.weight, alone.weight), (norm.bias, alone.bias)):
        assert ours.grad is not None
        dist.all_reduce(ours.grad)
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(
        norm.eval()(part),
        functional.batch_norm(part, norm.running_mean, norm.running_var, norm.weight, norm.bias),
    )
    leave_group()


def test_batch_norm_of_two_processes_is_that_of_one(tmp_path: object) -> None:
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
        _normalized, (f"{tmp_path}/meeting",), nprocs=len(SIZES)
    )
