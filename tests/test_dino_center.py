"""The centre of a teacher's scores, and its moving average."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from pyfeat.losses import DINOCenter, dino_loss
from tests.support_losses import unit
from tests.support_prototypes import inputs_of


def test_the_centre_follows_the_mean_score() -> None:
    center = DINOCenter(7, momentum=0.8)
    expected = torch.zeros(7)
    w = torch.randn(7, 5)
    for teacher in ([torch.randn(9, 5), torch.randn(4, 5)], [torch.randn(2, 5)]):
        center.update(teacher, w)
        expected = 0.8 * expected + 0.2 * (torch.cat(teacher) @ w.T).mean(dim=0)
    torch.testing.assert_close(center.center, expected)
    center.update([torch.empty(0, 5)], w)
    torch.testing.assert_close(center.center, expected)
    teacher = [torch.randn(3, 5)]
    center.update([3 * teacher[0]], 2 * w, normalize=True)
    normal = F.normalize(teacher[0], dim=1) @ F.normalize(w, dim=1).T
    torch.testing.assert_close(center.center, 0.8 * expected + 0.2 * normal.mean(dim=0))


def test_the_centre_is_saved_and_copied() -> None:
    center = DINOCenter(3)
    center.update([torch.ones(2, 2)], torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    loaded = DINOCenter(3)
    loaded.load_state_dict(center.state_dict())
    assert torch.equal(loaded.center, center.center)
    assert torch.equal(copy.deepcopy(center).center, center.center)
    assert not list(center.parameters())
    assert repr(center) == "DINOCenter(3, momentum=0.9)"


def test_an_update_after_the_loss_does_not_change_its_gradient() -> None:
    *features, w, w_teacher, _ = inputs_of(9, 7, 5, 5, 2, 2)
    center = DINOCenter(7, momentum=0.5)
    center.update(features[2:], w_teacher)
    student = features[0].requires_grad_()
    gradients = []
    for moves in (False, True):
        loss = dino_loss([student, features[1]], features[2:], w, w_teacher, center=center.center)
        if moves:
            center.update([10 * x for x in features[2:]], w_teacher)
        gradients.append(torch.autograd.grad(loss, student)[0])
    assert torch.equal(*gradients)


def test_scores_of_16_bits_under_autocast_move_the_centre_in_float32() -> None:
    teacher, w = torch.randn(40, 16).bfloat16(), torch.randn(7, 16).bfloat16()
    center = DINOCenter(7, momentum=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        center.update([teacher], w)
    expected = (teacher.double() @ w.double().T).mean(dim=0)
    torch.testing.assert_close(center.center.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DINOCenter(0), "DINOCenter: num_prototypes must be at least 1, got 0"),
        (
            lambda: DINOCenter(3, momentum=1.5),
            r"DINOCenter: momentum must be in \[0, 1\], got 1\.5",
        ),
        (
            lambda: DINOCenter(3).update([unit(2, 4)], unit(4, 4)),
            r"DINOCenter\.update: teacher_prototypes must have shape \(3, 4\), got \(4, 4\)",
        ),
        (
            lambda: DINOCenter(3).update([unit(2, 4) * math.nan], unit(3, 4)),
            r"DINOCenter\.update: teacher\[0\] must be finite",
        ),
    ],
)
def test_bad_input_of_the_centre_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
