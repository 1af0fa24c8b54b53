"""The cached step against a plain step that encodes the same chunks with gradients."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeat.losses import cached_step, clip_loss, info_nce
from tests.support_cached import Encoder, Temperature, dropout, plain_step, views
from tests.support_groups import leave_group


def state_of(*modules: nn.Module) -> list[Tensor]:
    """Gradients, parameters and buffers."""
    kept = []
    for module in modules:
        kept += [p.grad for p in module.parameters() if p.grad is not None]
        kept += list(module.parameters()) + list(module.buffers())
    return [each.detach().clone() for each in (*kept, torch.get_rng_state())]


def assert_same_step(
    encoders: list[nn.Module],
    inputs: list[Tensor],
    loss: nn.Module,
    chunk_sizes: list[int],
    **options: Any,
) -> None:
    """Loss, gradients, buffers and random state as after a plain step."""
    twins, twin_loss = copy.deepcopy((encoders, loss))
    torch.manual_seed(7)
    expected = plain_step(twins, inputs, twin_loss, chunk_sizes)
    after = state_of(*twins, twin_loss)
    torch.manual_seed(7)
    found = cached_step(encoders, inputs, loss, chunk_size=chunk_sizes, **options)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    ours = state_of(*encoders, loss)
    assert len(ours) == len(after)
    for mine, true in zip(ours, after, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 100])
def test_dropout_is_that_of_a_plain_step(chunk_size: int) -> None:
    encoder = dropout()
    assert_same_step([encoder, encoder], views(), Temperature(), [chunk_size] * 2)


def test_two_encoders_have_chunks_of_their_own() -> None:
    x, _ = views()
    y = torch.randn(14, 6, dtype=torch.float64)
    assert_same_step([dropout(), dropout()], [x, y], Temperature(), [4, 3])


def test_one_encoder_needs_no_list() -> None:
    encoder, x = dropout(), views()[0]
    twin = copy.deepcopy(encoder)

    def loss(z: Tensor) -> Tensor:
        return info_nce(z[::2], z[1::2].repeat(2, 1), backend="reference")

    torch.manual_seed(7)
    expected = plain_step([twin], [x], loss, [4])
    torch.manual_seed(7)
    assert torch.equal(cached_step(encoder, x, loss, chunk_size=4), expected)
    for p, q in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


class Drifting(nn.Module):
    """A buffer that every forward pass replaces by a new tensor, and that features depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(16, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = nn.Buffer(0.5 * self.mean + x.detach().mean(dim=0))
        return x * (1.0 + self.mean.tanh())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.BatchNorm1d(16),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
        Drifting,
    ],
    ids=["batch norm", "spectral norm", "replaced"],
)
def test_buffers_end_as_after_one_pass(layer: Callable[[], nn.Module]) -> None:
    encoder = Encoder(layer(), nn.Dropout(0.2)).double()
    assert_same_step([encoder, encoder], views(), Temperature(), [4, 4])


def test_an_encoder_in_evaluation_keeps_its_buffers() -> None:
    encoder = Encoder(nn.BatchNorm1d(16), nn.Dropout(0.2)).double().eval()
    assert_same_step([encoder, encoder], views(), Temperature(), [4, 4])


def test_gradients_are_added_to_those_that_are_there() -> None:
    encoder, x, loss = dropout(), views(), Temperature()
    cached_step([encoder, encoder], x, loss, chunk_size=4)
    before = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    torch.manual_seed(3)
    cached_step([encoder, encoder], x, loss, chunk_size=4)
    twin = copy.deepcopy(encoder)
    twin.zero_grad()
    torch.manual_seed(3)
    cached_step([twin, twin], x, loss, chunk_size=4)
    for old, new, alone in zip(before, encoder.parameters(), twin.parameters(), strict=True):
        assert alone.grad is not None
        torch.testing.assert_close(new.grad, old + alone.grad, rtol=1e-10, atol=1e-14)


def test_inputs_that_require_gradients_get_them() -> None:
    encoder, (x, y) = dropout().requires_grad_(False), views()
    expected = x.clone().requires_grad_()
    found = x.clone().requires_grad_()
    torch.manual_seed(7)
    plain_step([encoder, encoder], [expected, y], Temperature(), [4, 4])
    torch.manual_seed(7)
    cached_step([encoder, encoder], [found, y], Temperature(), chunk_size=4)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-14)


def test_what_the_loss_returns_beside_its_value_is_passed_on() -> None:
    encoder, x = dropout(), views()
    result = cached_step(
        [encoder, encoder], x, lambda a, b: ((a * b).sum(), {"rows": len(a)}, "b"), chunk_size=4
    )
    value, *rest = result
    assert not value.requires_grad
    assert rest == [{"rows": 11}, "b"]


def test_without_backward_there_is_only_the_loss() -> None:
    encoder, x, loss = Encoder(nn.BatchNorm1d(16), nn.Dropout(0.3)).double(), views(), Temperature()
    twin = copy.deepcopy(encoder)
    torch.manual_seed(7)
    expected = plain_step([twin, twin], x, loss, [4, 4])
    after = [*twin.buffers(), torch.get_rng_state()]
    loss.zero_grad()
    torch.manual_seed(7)
    value = cached_step([encoder, encoder], x, loss, chunk_size=4, backward=False)
    assert torch.equal(value, expected)
    assert all(p.grad is None for p in (*encoder.parameters(), *loss.parameters()))
    for mine, true in zip((*encoder.buffers(), torch.get_rng_state()), after, strict=True):
        assert torch.equal(mine, true)


def test_a_step_works_where_gradients_are_off() -> None:
    encoder, x, loss = dropout(), views(), Temperature()
    twin = copy.deepcopy(encoder)
    torch.manual_seed(7)
    plain_step([twin, twin], x, copy.deepcopy(loss), [4, 4])
    torch.manual_seed(7)
    with torch.no_grad():
        cached_step([encoder, encoder], x, loss, chunk_size=4)
    for p, q in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_an_empty_batch_has_no_loss_and_zero_gradients() -> None:
    encoder, none = dropout(), torch.empty(0, 6, dtype=torch.float64)
    value = cached_step([encoder, encoder], [none, none], Temperature(), chunk_size=4)
    assert value == 0.0
    assert all(p.grad is not None and (p.grad == 0).all() for p in encoder.parameters())


# Mixed precision


def test_autocast_is_that_of_a_plain_step() -> None:
    encoder, x = dropout().float(), [each.float() for each in views()]
    twin = copy.deepcopy(encoder)
    loss = functools.partial(clip_loss, logit_scale=5.0)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        features = [torch.cat([twin(chunk) for chunk in torch.split(each, 4)]) for each in x]
        expected = loss(*features)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        found = cached_step([encoder, encoder], x, loss, chunk_size=4)
    assert torch.equal(found, expected.detach())
    for p, q in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        # Bfloat16 gradients of the same chunks, added up in another order.
        torch.testing.assert_close(
            p.grad, q.grad, rtol=2**-7, atol=2**-8 * float(q.grad.abs().max())
        )


class Autocast(torch.autograd.Function):
    """Identity that notes whether autocast is on, forward and backward."""

    forwards: ClassVar[list[bool]] = []
    backwards: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Autocast.forwards.append(torch.is_autocast_enabled("cpu"))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Autocast.backwards.append(torch.is_autocast_enabled("cpu"))
        return grad


def test_autocast_is_on_in_forward_passes_only() -> None:
    Autocast.forwards.clear()
    Autocast.backwards.clear()
    x = torch.randn(6, 4, requires_grad=True)

    def noted(x: Tensor) -> Tensor:
        features: Tensor = Autocast.apply(x)  # type: ignore[no-untyped-call]
        return features

    with torch.autocast("cpu", torch.bfloat16):
        cached_step(noted, x, lambda z: noted(z).sum(), chunk_size=3)
        assert torch.is_autocast_enabled("cpu")
    assert Autocast.forwards == [True] * 5
    assert Autocast.backwards == [False] * 3


def test_a_scaler_scales_the_gradients_and_not_the_loss() -> None:
    encoder, x, loss = dropout(), views(), Temperature()
    twin, twin_loss = copy.deepcopy((encoder, loss))
    torch.manual_seed(7)
    expected = cached_step([twin, twin], x, twin_loss, chunk_size=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(7)
    found = cached_step([encoder, encoder], x, loss, chunk_size=4, scaler=scaler)
    assert torch.equal(found, expected)
    ours = (*encoder.parameters(), *loss.parameters())
    for p, q in zip(ours, (*twin.parameters(), *twin_loss.parameters()), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p.grad, 1024.0 * q.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_activations_are_those_of_one_chunk() -> None:
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1))]
    encoder, loss = Encoder(*layers), functools.partial(clip_loss, logit_scale=5.0)
    x = [each.float() for each in views(256)]
    features = [torch.randn(256, 5, requires_grad=True) for _ in x]
    of_loss = most_kept_for_gradients(lambda: torch.autograd.backward(loss(*features)))
    of_chunk = most_kept_for_gradients(lambda: torch.autograd.backward(encoder(x[0][:8]).sum()))
    of_step = most_kept_for_gradients(
        lambda: cached_step([encoder, encoder], x, loss, chunk_size=8)
    )
    of_plain_step = most_kept_for_gradients(lambda: plain_step([encoder] * 2, x, loss, [8, 8]))
    assert of_step == max(of_loss, of_chunk)
    assert of_plain_step > 40 * of_step


def most_kept_for_gradients(step: Callable[[], object]) -> int:
    """Largest number of elements kept at a time, without parameters."""
    alive, most = 0, 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            self.tensor, self.size = tensor, 0 if tensor.is_leaf else tensor.numel()
            alive += self.size
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step()
    assert alive == 0
    return most


@pytest.mark.slow
def test_a_process_group_of_one_is_no_different(tmp_path: Path) -> None:
    encoder, x, loss = Encoder(nn.BatchNorm1d(16), nn.Dropout(0.3)).double(), views(), Temperature()
    twin, twin_loss = copy.deepcopy((encoder, loss))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped, twin_wrapped = DistributedDataParallel(encoder), DistributedDataParallel(twin)
        torch.manual_seed(7)
        expected = plain_step([twin_wrapped] * 2, x, twin_loss, [4, 4])
        torch.manual_seed(7)
        found = cached_step([wrapped] * 2, x, loss, chunk_size=4)
        del wrapped, twin_wrapped  # which would destroy the group under the interpreter's lock
    finally:
        leave_group()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    for mine, true in zip(state_of(encoder, loss), state_of(twin, twin_loss), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-14)
