"""What the cached step may be given, how often it calls what, and what becomes of failures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyfeat.losses import cached_step
from tests.support_cached import Recorder, Temperature, dropout, views


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: Any, y: Any = None, *, scale: float = 1.0, words: Any = ()) -> Tensor:
        x = torch.stack(x) if isinstance(x, list) else x
        y = torch.zeros_like(x) if y is None else y
        lengths = torch.tensor([len(word) for word in words] or [0], dtype=torch.float64)
        features: Tensor = scale * self.weight * (x + y) + lengths[:, None]
        return features


X, Y = (torch.randn(5, 6, dtype=torch.float64) for _ in range(2))
WORDS = ["a", "bc", "def", "", "gh"]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, X),
        (list(X), X),
        ((X, Y), X + Y),
        ((X, None), X),
        ({"x": X, "y": Y, "scale": 3.0}, 3.0 * (X + Y)),
        ({"x": X, "scale": torch.tensor(3.0)}, 3.0 * X),
        ({"x": X, "words": WORDS}, X + torch.tensor([1.0, 2.0, 3.0, 0.0, 2.0])[:, None]),
    ],
    ids=["tensor", "list", "tuple", "tuple with None", "dict", "dict with a number", "words"],
)
@pytest.mark.parametrize("chunk_size", [2, 5])
def test_inputs_are_cut_along_their_first_axis(
    batch: Any, expected: Tensor, chunk_size: int
) -> None:
    encoder = Sum()
    features = []

    def loss(z: Tensor) -> Tensor:
        features.append(z.detach())
        return (z * Y).sum()

    cached_step(encoder, batch, loss, chunk_size=chunk_size)
    torch.testing.assert_close(features[0], expected)
    whole = call(encoder, batch)
    (grad,) = torch.autograd.grad((whole * Y).sum(), encoder.weight)
    torch.testing.assert_close(encoder.weight.grad, grad)


def call(encoder: nn.Module, batch: Any) -> Tensor:
    arguments = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
    features: Tensor = encoder(*arguments, **(batch if isinstance(batch, dict) else {}))
    return features


# What is done how often


def test_every_chunk_is_encoded_once_without_and_once_with_gradients() -> None:
    encoder, (x, y) = Recorder(), views()
    cached_step([encoder, encoder], [x, y[:6]], lambda a, b: a.sum() * b.sum(), chunk_size=4)
    chunks = [4, 4, 3, 4, 2]
    assert encoder.calls == [*((n, False) for n in chunks), *((n, True) for n in chunks)]


def test_gradients_are_reduced_with_the_last_chunk_of_an_encoder() -> None:
    shared, alone, x = Recorder(), Recorder(), views()
    cached_step(
        [shared, alone, shared],
        [*x, x[0]],
        lambda a, b, c: a.sum() * b.sum() * c.sum(),
        chunk_size=5,
    )
    assert shared.reductions == [False] * 5 + [True]
    assert alone.reductions == [False] * 2 + [True]


def test_features_that_the_loss_ignores_do_not_delay_the_reduction() -> None:
    encoder, x = Recorder(), views()
    cached_step([encoder, encoder], x, lambda a, b: a.sum(), chunk_size=6)
    assert encoder.reductions == [False, True]
    assert encoder.calls[-2:] == [(6, False), (5, False)]


def test_frozen_encoders_are_encoded_once() -> None:
    frozen, encoder, x = Recorder().requires_grad_(False), Recorder(), views()
    cached_step([frozen, encoder], x, Temperature(), chunk_size=6)
    assert frozen.calls == [(6, False), (5, False)]
    assert len(encoder.calls) == 4


def test_methods_of_one_module_share_its_buffers_and_its_reduction() -> None:
    class Two(Recorder):
        def text(self, x: Tensor) -> Tensor:
            return self.forward(-x)

    encoder, x = Two(), views()
    cached_step([encoder.forward, encoder.text], x, Temperature(), chunk_size=6)
    assert encoder.reductions == [False, False, False, True]


# Failures


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_random_state_as_after_one_pass(
    error: type[BaseException],
) -> None:
    class Interrupted(Recorder):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and len(self.calls) == 4:
                raise error
            return super().forward(x)

    encoder, x, twin = Interrupted(), views()[0], dropout()
    torch.manual_seed(7)
    twin.body(x[:4]), twin.body(x[4:8]), twin.body(x[8:])
    expected = torch.get_rng_state()
    encoder.body, twin.body = twin.body, encoder.body
    torch.manual_seed(7)
    with pytest.raises(error):
        cached_step(encoder, x, Tensor.sum, chunk_size=4)
    assert torch.equal(torch.get_rng_state(), expected)


def test_an_encoder_that_differs_the_second_time_is_refused() -> None:
    calls = iter(range(100))

    def encoder(x: Tensor) -> Tensor:
        return x * (1.0 + next(calls) % 7)

    x = torch.randn(6, 4, requires_grad=True)
    with pytest.raises(
        RuntimeError,
        match=r"cached_step: encoders must return the same features for a chunk twice, got a change",
    ):
        cached_step(encoder, x, Tensor.sum, chunk_size=4)
    widths = iter((4, 3))
    with pytest.raises(RuntimeError, match=r"twice, got shape \(6, 3\) after \(6, 4\)"):
        cached_step(lambda x: x[:, : next(widths)], x, Tensor.sum, chunk_size=6)


@pytest.mark.parametrize(
    ("arguments", "chunk_size", "error", "message"),
    [
        ((Sum(), X, Tensor.sum), 0, ValueError, r"chunk_size must be at least 1, got 0"),
        ((Sum(), X, Tensor.sum), 2.0, TypeError, r"chunk_size must be an integer, got 2\.0"),
        ((Sum(), X, Tensor.sum), [2, 2], ValueError, r"chunk_size must be one number or 1, got 2"),
        (([Sum(), Sum()], [X], Tensor.sum), 2, ValueError, r"inputs must be 2, one .*, got 1"),
        (([Sum()], X, Tensor.sum), 2, ValueError, r"inputs must be 1, one .*, got Tensor"),
        ((Sum(), (X, Y[:3]), Tensor.sum), 2, ValueError, r"inputs must have one .*, got 3 and 5"),
        ((Sum(), {}, Tensor.sum), 2, ValueError, r"inputs must have one .* rows .*, got none"),
        ((lambda x: "z", X, Tensor.sum), 2, TypeError, r"encoders must return .*, got str"),
        (
            (lambda x: x.long(), X, Tensor.sum),
            2,
            TypeError,
            r"encoders must return a tensor of floats \(n, \.\.\.\), got int64 of \(2, 6\)",
        ),
        ((Sum(), X, lambda z: z), 2, TypeError, r"loss must return .*, got float64 of \(5, 6\)"),
        ((Sum(), X, lambda z: 1.0), 2, TypeError, r"loss must return .* \(\), got float"),
    ],
)
def test_bad_input_is_named(
    arguments: tuple[Any, ...], chunk_size: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"cached_step: {message}"):
        cached_step(*arguments, chunk_size=chunk_size)


def test_a_progress_bar_counts_both_passes(capsys: pytest.CaptureFixture[str]) -> None:
    cached_step(Sum(), X, Tensor.sum, chunk_size=2, progress=True)
    shown = capsys.readouterr().err
    assert "cached_step: 100%" in shown
    assert "6/6" in shown
