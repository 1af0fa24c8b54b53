"""``dino_loss`` and ``ibot_loss`` against the code that is usual, which stores all scores."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import _contrast, reference
from pyfeat._backends import Backend
from pyfeat.losses import DINOCenter, dino_loss, ibot_loss
from pyfeat.losses._reduction import Reduction
from tests.support_losses import assert_as_good_as_torch, unit, with_gradients
from tests.support_prototypes import Largest, inputs_of, usual_sinkhorn

# Rows, prototypes, features of student and teacher, views of student and teacher.
SIZES = [(97, 31, 33, 20, 4, 2), (130, 257, 64, 64, 3, 2)]
TINY = [(1, 1, 1, 1, 2, 1), (1, 3, 4, 4, 2, 1), (2, 1, 3, 5, 2, 2), (3, 40, 16, 16, 3, 3)]


def usual_dino(num_teacher_views: int, iterations: int | None, tau: float) -> Callable[..., Tensor]:
    """Losses (B,) of student views, teacher views, prototypes of both, centre, 1 / temperature."""

    def losses(*inputs: Tensor) -> Tensor:
        *features, student_prototypes, teacher_prototypes, center, scale = inputs
        student, teacher = features[:-num_teacher_views], features[-num_teacher_views:]
        with torch.no_grad():
            scores = torch.cat(teacher) @ teacher_prototypes.T
            if iterations is None:
                p = F.softmax((scores - center) / tau, dim=1)
            else:
                p = usual_sinkhorn(scores, tau, iterations)
        total, count = torch.zeros(len(student[0]), dtype=scale.dtype), 0
        for t, target in enumerate(p.chunk(num_teacher_views)):
            for v, view in enumerate(student):
                if v != t:
                    log_p = F.log_softmax(view @ student_prototypes.T * scale, dim=1)
                    total, count = total - (target * log_p).sum(dim=1), count + 1
        return total / count

    return losses


def each(num_teacher_views: int, iterations: int | None, tau: float) -> Callable[..., Tensor]:
    def losses(*inputs: Tensor) -> Tensor:
        *features, student_prototypes, teacher_prototypes, center, scale = inputs
        return dino_loss(
            features[:-num_teacher_views],
            features[-num_teacher_views:],
            student_prototypes,
            teacher_prototypes,
            student_temperature=1.0 / scale.double(),
            teacher_temperature=tau,
            center=None if iterations is not None else center,
            sinkhorn_iterations=iterations,
            reduction="none",
        )

    return losses


@pytest.mark.parametrize("tau", [0.04, 0.5])
@pytest.mark.parametrize("iterations", [None, 3], ids=["softmax", "sinkhorn"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dino_loss_is_as_good_as_torch(
    size: tuple[int, ...], iterations: int | None, tau: float
) -> None:
    inputs = [*inputs_of(*size), torch.tensor(10.0)]
    ours, usual = each(size[-1], iterations, tau), usual_dino(size[-1], iterations, tau)
    assert_as_good_as_torch(_fixed(ours, size), _fixed(usual, size), *inputs)


@pytest.mark.parametrize("tau", [0.04, 0.5])
@pytest.mark.parametrize("iterations", [None, 3], ids=["softmax", "sinkhorn"])
@pytest.mark.parametrize("size", TINY, ids=str)
def test_tiny_batches_are_right_to_a_few_roundings(
    size: tuple[int, ...], iterations: int | None, tau: float
) -> None:
    inputs = [*inputs_of(*size), torch.tensor(25.0)]
    ours, usual = (_fixed(loss(size[-1], iterations, tau), size) for loss in (each, usual_dino))
    exact = with_gradients(usual, *(x.double() for x in inputs))
    for mine, true in zip(with_gradients(ours, *inputs), exact, strict=True):
        # As for SwAV: of terms of 25, and of scores over the teacher's temperature.
        atol = 2.0**-22 * 25 + 2.0**-23 / tau * float(true.abs().max())
        torch.testing.assert_close(mine, true, rtol=0.0, atol=atol)


def _fixed(loss: Callable[..., Tensor], size: tuple[int, ...]) -> Callable[..., Tensor]:
    """Without gradients of what has none: the teacher, and its centre."""

    def fixed(*inputs: Tensor) -> Tensor:
        first, last = size[-2], size[-2] + size[-1]
        constant = [x.detach() for x in inputs]
        return loss(
            *inputs[:first], *constant[first:last], inputs[last], *constant[-3:-1], inputs[-1]
        )

    return fixed


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("iterations", [None, 2], ids=["softmax", "sinkhorn"])
def test_both_backends_agree_in_float64(iterations: int | None, reduction: Reduction) -> None:
    *features, w, w_teacher, center = (x.double() for x in inputs_of(30, 17, 8, 6, 4, 2))

    def weighted(backend: Backend | None) -> Callable[..., Tensor]:
        def total(*inputs: Tensor) -> Tensor:
            *student, prototypes, temperature = inputs
            losses = dino_loss(
                student,
                features[4:],
                prototypes,
                2 * w_teacher,
                student_temperature=temperature,
                center=center if iterations is None else None,
                sinkhorn_iterations=iterations,
                normalize=True,
                reduction=reduction,
                backend=backend,
            )
            return (losses * torch.arange(1.0, 1.0 + losses.numel())).sum()

        return total

    inputs = [*(3 * x for x in features[:4]), w, torch.tensor(0.2, dtype=torch.float64)]
    ours, exact = (with_gradients(weighted(backend), *inputs) for backend in (None, "reference"))
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9 * float(true.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_differs_by_roundings_of_gradients(dtype: torch.dtype) -> None:
    *features, w, w_teacher, _ = (x.to(dtype) for x in inputs_of(50, 24, 32, 32, 3, 2))

    def loss(*student: Tensor) -> Tensor:
        teacher = [x.to(student[0]) for x in (*features[3:], w_teacher)]
        return dino_loss(student[:3], teacher[:2], student[3], teacher[2])

    value, *gradients = with_gradients(loss, *features[:3], w)
    exact = with_gradients(loss, *(x.double() for x in (*features[:3], w)))
    torch.testing.assert_close(value, exact[0], rtol=1e-5, atol=0.0)
    for mine, true in zip(gradients, exact[1:], strict=True):
        eps = torch.finfo(dtype).eps
        assert ((mine - true).abs() <= 2 * eps * true.abs().max()).all()


def test_no_gradient_flows_through_the_teacher() -> None:
    *features, w, w_teacher, center = inputs_of(9, 7, 5, 6, 2, 2)
    leaves = [x.requires_grad_() for x in (*features, w, w_teacher, center)]
    loss = dino_loss(features[:2], features[2:], w, w_teacher, center=center)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [
        False,
        False,
        True,
        True,
        False,
        True,
        True,
    ]


def test_a_term_of_the_centre_that_all_prototypes_share_cancels() -> None:
    *features, w, w_teacher, center = inputs_of(9, 7, 5, 6, 2, 2)
    losses = [
        dino_loss(features[:2], features[2:], w, w_teacher, center=center + shift)
        for shift in (0.0, 3.0)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0.0)
    moved = dino_loss(features[:2], features[2:], w, w_teacher, center=3 * center)
    assert (moved - losses[0]).abs() > 1e-2


def test_a_view_of_the_teacher_alone_meets_all_of_the_student() -> None:
    *features, w, w_teacher, _ = inputs_of(9, 7, 5, 6, 1, 2)
    losses = dino_loss(features[:1], features[1:], w, w_teacher, reduction="none")
    second = ibot_loss(features[0], features[2], w, w_teacher, reduction="none")
    torch.testing.assert_close(losses, second)


# Masked patches


def test_ibot_loss_is_a_weighted_mean_over_patches() -> None:
    student, teacher, w, w_teacher, center = inputs_of(21, 13, 8, 8, 1, 1)
    weights = torch.rand(21)
    weights[4] = 0.0
    p = F.softmax((teacher @ w_teacher.T - center) / 0.07, dim=1)
    each_patch = -(p * F.log_softmax(student @ w.T / 0.2, dim=1)).sum(dim=1)

    def loss(**options: Any) -> Tensor:
        return ibot_loss(
            student,
            teacher,
            w,
            w_teacher,
            student_temperature=0.2,
            teacher_temperature=0.07,
            center=center,
            **options,
        )

    for weight in (weights, 100 * weights.double()):
        weighted = each_patch * weight.float()
        torch.testing.assert_close(loss(weights=weight, reduction="none"), weighted)
        torch.testing.assert_close(loss(weights=weight, reduction="sum"), weighted.sum())
        torch.testing.assert_close(loss(weights=weight), weighted.sum() / weight.sum().float())
    torch.testing.assert_close(loss(), each_patch.mean())
    assert loss(weights=torch.zeros(21)) == 0.0


def test_a_patch_of_weight_0_gets_no_gradient() -> None:
    student, teacher, w, w_teacher, _ = inputs_of(6, 13, 8, 8, 1, 1)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 1.0])
    student.requires_grad_()
    loss = ibot_loss(student, teacher, w, w_teacher, weights=weights, sinkhorn_iterations=3)
    (grad,) = torch.autograd.grad(loss, student)
    assert ((grad == 0).all(dim=1) == (weights == 0)).all()


# Traps


def test_empty_batches_have_no_loss() -> None:
    none, w = torch.empty(0, 8, requires_grad=True), unit(5, 8).requires_grad_()
    backends: tuple[Backend | None, ...] = (None, "reference")
    for backend, iterations in itertools.product(backends, (None, 2)):
        loss = dino_loss(
            [none, none], [none], w, w, sinkhorn_iterations=iterations, backend=backend
        )
        assert loss == 0.0
        gradients = torch.autograd.grad(loss, (none, w))
        assert gradients[0].shape == (0, 8)
        assert (gradients[1] == 0).all()


def test_no_matrix_of_features_and_prototypes_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contrast, "_memory_budget", 0)
    *features, w, w_teacher, center = inputs_of(3000, 2500, 4, 4, 3, 1)
    leaves = [x.requires_grad_() for x in (*features[1:3], w)]
    update = DINOCenter(2500)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        update.update(features[3:], w_teacher)
        loss = dino_loss(features[:3], features[3:], w, w_teacher, center=center)
        torch.autograd.grad(loss, leaves)
    assert largest.num_elements <= 3 * 3000 * 4  # the views, against 7,500,000 for each


def test_gradients_of_the_reference_are_right() -> None:
    *features, w, w_teacher, center = (x.double() for x in inputs_of(4, 5, 3, 3, 3, 2))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in (*features[:3], w)]
    tau = torch.tensor(0.2, dtype=torch.float64)
    teacher = reference.Teacher(torch.cat(features[3:]), w_teacher, tau, center, None)

    def loss(temperature: Tensor, *inputs: Tensor) -> Tensor:
        return reference.dino_losses(inputs[:-1], inputs[-1], temperature, teacher, [0, 1])

    assert torch.autograd.gradcheck(loss, (temperature, *leaves))
    assert torch.autograd.gradgradcheck(loss, (temperature, *leaves))


def call_dino(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "student": [unit(3, 4), unit(3, 4)],
        "teacher": [unit(3, 6)],
        "student_prototypes": unit(5, 4),
        "teacher_prototypes": unit(5, 6),
    }
    return dino_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"student": []},
            ValueError,
            "student and teacher must have views that can be compared with other views, got 0 and 1",
        ),
        ({"student": [unit(3, 4)]}, ValueError, "with other views, got 1 and 1"),
        ({"teacher": []}, ValueError, "with other views, got 2 and 0"),
        (
            {"teacher": [unit(2, 6)]},
            ValueError,
            r"teacher\[0\] must have shape \(3, 6\), got \(2, 6\)",
        ),
        (
            {"teacher": [unit(3, 6), unit(2, 6)]},
            ValueError,
            r"teacher\[1\] must have shape \(3, 6\), got \(2, 6\)",
        ),
        (
            {"teacher": [unit(3, 6).double()], "teacher_prototypes": unit(5, 6).double()},
            TypeError,
            r"teacher\[0\] must be float32, got float64",
        ),
        (
            {"teacher_prototypes": unit(4, 6)},
            ValueError,
            r"teacher_prototypes must have shape \(5, 6\), got \(4, 6\)",
        ),
        (
            {"student_prototypes": unit(0, 4)},
            ValueError,
            r"student_prototypes must have at least one row, got shape \(0, 4\)",
        ),
        (
            {"teacher": [unit(3, 6) * math.nan]},
            ValueError,
            r"teacher\[0\] must be finite, got NaN or infinity in row 0",
        ),
        (
            {"center": torch.zeros(1, 5)},
            ValueError,
            r"center must have shape \(5,\), got \(1, 5\)",
        ),
        (
            {"center": torch.full((5,), math.nan)},
            ValueError,
            "center must be finite and at most 1e30 teacher_temperature, got nan",
        ),
        (
            {"center": torch.full((5,), 1e35)},
            ValueError,
            r"center must be finite and at most 1e30 teacher_temperature, got 1e\+35",
        ),
        (
            {"center": torch.zeros(5), "sinkhorn_iterations": 3},
            ValueError,
            "center must be None with sinkhorn_iterations, got a tensor",
        ),
        ({"sinkhorn_iterations": 0}, ValueError, "sinkhorn_iterations must be at least 1, got 0"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be positive"),
        ({"teacher_temperature": 1e-8}, ValueError, "teacher_temperature must be at least 1e-06"),
        ({"student_temperature": math.nan}, ValueError, "student_temperature must be positive"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"dino_loss: .*{message}"):
        call_dino(**changes)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2), r"weights must have shape \(3,\), got \(2,\)"),
        (
            torch.tensor([1.0, -1.0, 1.0]),
            r"weights must be finite and at least 0, got -1\.0 to 1\.0",
        ),
        (torch.tensor([1.0, math.nan, 1.0]), "weights must be finite and at least 0, got nan"),
    ],
)
def test_bad_weights_are_named(weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"ibot_loss: {message}"):
        ibot_loss(unit(3, 4), unit(3, 4), unit(5, 4), unit(5, 4), weights=weights)
