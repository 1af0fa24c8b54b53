"""``swav_loss`` against the code that is usual, which stores scores and assignments."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pyfeat import _contrast, reference
from pyfeat._backends import Backend
from pyfeat.losses import swav_loss
from pyfeat.losses._reduction import Reduction
from tests.support_losses import assert_as_good_as_torch, unit, with_gradients
from tests.support_prototypes import Largest, usual_sinkhorn

# Rows, prototypes, features, views.
SIZES = [(97, 31, 33, 4), (120, 300, 64, 3), (260, 129, 130, 2)]
TINY = [(1, 1, 1, 2), (1, 3, 4, 2), (2, 1, 3, 2), (3, 40, 16, 3)]


def usual_swav(
    *inputs: Tensor,
    assigned: Sequence[int] = (0, 1),
    epsilon: float = 0.05,
    queues: Sequence[Tensor] | None = None,
) -> Tensor:
    """Losses (B,) as SwAV's training loop computes them; views, prototypes and 1 / temperature."""
    *views, prototypes, scale = inputs
    batch_size = len(views[0])
    total = torch.zeros(batch_size, dtype=views[0].dtype)
    for i, crop in enumerate(assigned):
        with torch.no_grad():
            out = views[crop] @ prototypes.T
            if queues is not None:
                out = torch.cat([queues[i].to(out) @ prototypes.T, out])
            q = usual_sinkhorn(out, epsilon, 3)[-batch_size:]
        for v in set(range(len(views))) - {crop}:
            x = views[v] @ prototypes.T * scale
            total = total - (q * F.log_softmax(x, dim=1)).sum(dim=1) / (len(views) - 1)
    return total / len(assigned)


def each(**options: Any) -> Callable[..., Tensor]:
    def losses(*inputs: Tensor) -> Tensor:
        *views, prototypes, scale = inputs
        return swav_loss(
            views, prototypes, temperature=1.0 / scale.double(), reduction="none", **options
        )

    return losses


def inputs_of(rows: int, prototypes: int, dim: int, views: int) -> list[Tensor]:
    """Views that agree in part, and prototypes."""
    base = unit(rows, dim)
    others = [F.normalize(base + 0.3 * torch.randn(rows, dim), dim=1) for _ in range(views - 1)]
    return [base, *others, unit(prototypes, dim)]


@pytest.mark.parametrize("temperature", [0.1, 0.04, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_swav_loss_is_as_good_as_torch(size: tuple[int, int, int, int], temperature: float) -> None:
    assert_as_good_as_torch(each(), usual_swav, *inputs_of(*size), torch.tensor(1 / temperature))


@pytest.mark.parametrize("temperature", [0.1, 0.04, 1.0])
@pytest.mark.parametrize("size", TINY, ids=str)
def test_tiny_batches_are_right_to_a_few_roundings(
    size: tuple[int, int, int, int], temperature: float
) -> None:
    inputs = [*inputs_of(*size), torch.tensor(1 / temperature)]
    exact = with_gradients(usual_swav, *(x.double() for x in inputs))
    for mine, true in zip(with_gradients(each(), *inputs), exact, strict=True):
        # Losses and gradients are differences of terms as large as prototypes over the
        # temperature, and assignments are known to a few roundings of scores over epsilon.
        atol = 2.0**-22 / temperature + 2.0**-23 / 0.05 * float(true.abs().max())
        torch.testing.assert_close(mine, true, rtol=0.0, atol=atol)


def queue(rows: int, seed: int) -> Tensor:
    """(rows, 16) of unit length, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 16, generator=generator), dim=1)


OPTIONS: dict[str, dict[str, Any]] = {
    "one assigned": {"assigned": (1,)},
    "all assigned": {"assigned": (2, 0, 1)},
    "sharp": {"epsilon": 0.01},
    "queues": {"queues": [queue(50, 2), queue(50, 3)]},
    "queues of two sizes": {"queues": [queue(50, 2), queue(0, 3)]},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_is_that_of_the_usual_code(case: str) -> None:
    inputs = [*inputs_of(40, 23, 16, 3), torch.tensor(10.0)]
    assert_as_good_as_torch(
        each(**OPTIONS[case]), lambda *x: usual_swav(*x, **OPTIONS[case]), *inputs
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", OPTIONS)
def test_both_backends_agree_in_float64(case: str, reduction: Reduction) -> None:
    options = dict(OPTIONS[case])
    if "queues" in options:
        options["queues"] = [queue.double() for queue in options["queues"]]

    def weighted(backend: Backend | None) -> Callable[..., Tensor]:
        def total(*inputs: Tensor) -> Tensor:
            *views, prototypes, temperature = inputs
            losses = swav_loss(
                views,
                prototypes,
                temperature=temperature,
                normalize=True,
                reduction=reduction,
                backend=backend,
                **options,
            )
            return (losses * torch.arange(1.0, 1.0 + losses.numel())).sum()

        return total

    inputs = [3 * x.double() for x in inputs_of(40, 23, 16, 3)]
    inputs.append(torch.tensor(0.2, dtype=torch.float64))
    ours, exact = (with_gradients(weighted(backend), *inputs) for backend in (None, "reference"))
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-9 * float(true.abs().max()))


def test_the_reductions_fit_each_other() -> None:
    *views, prototypes = inputs_of(12, 9, 8, 3)
    losses = swav_loss(views, prototypes, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(swav_loss(views, prototypes), losses.mean())
    torch.testing.assert_close(swav_loss(views, prototypes, reduction="sum"), losses.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_differs_by_roundings_of_gradients(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in inputs_of(70, 24, 48, 3)]

    def loss(*inputs: Tensor) -> Tensor:
        return swav_loss(inputs[:-1], inputs[-1])

    value, *gradients = with_gradients(loss, *inputs)
    exact = with_gradients(loss, *(x.double() for x in inputs))
    torch.testing.assert_close(value, exact[0], rtol=1e-5, atol=0.0)
    # Each is a difference of two terms, of which each is rounded, and then rounded itself.
    for mine, true in zip(gradients, exact[1:], strict=True):
        eps = torch.finfo(dtype).eps
        assert ((mine - true).abs() <= 2 * eps * true.abs().max()).all()


def test_a_large_upstream_gradient_does_not_overflow_before_the_cast() -> None:
    # Terms of the gradients are 65536 / 0.001 and 0, but for a few roundings.
    view = torch.eye(4).half().requires_grad_()
    prototypes = torch.eye(4).half().requires_grad_()
    loss = swav_loss([view, view], prototypes, temperature=0.001)
    for gradient in torch.autograd.grad(loss * 65536.0, (view, prototypes)):
        assert gradient.isfinite().all()


def test_no_gradient_flows_through_the_assignments() -> None:
    *views, prototypes = inputs_of(12, 9, 8, 2)
    leaves = [x.requires_grad_() for x in (*views, prototypes)]
    loss = swav_loss(leaves[:2], prototypes, assigned=(0,))
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert gradients[0] is None  # it is assigned and nothing else
    assert all((gradient != 0).any() for gradient in gradients[1:] if gradient is not None)


def test_second_derivatives_are_those_of_the_reference() -> None:
    def penalty(backend: Backend | None) -> Callable[..., Tensor]:
        def total(*inputs: Tensor) -> Tensor:
            loss = swav_loss(
                inputs[:-1],
                inputs[-1],
                temperature=0.5,
                backend=backend,
            )
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
            return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

        return total

    inputs = [x.double() for x in inputs_of(9, 5, 4, 3)]
    ours, exact = (with_gradients(penalty(backend), *inputs) for backend in (None, "reference"))
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-8, atol=1e-8 * float(true.abs().max()))


# Traps


def test_empty_batches_have_no_loss() -> None:
    none = torch.empty(0, 8, requires_grad=True)
    prototypes = unit(5, 8).requires_grad_()
    backends: tuple[Backend | None, ...] = (None, "reference")
    for backend in backends:
        loss = swav_loss([none, none, none], prototypes, backend=backend)
        assert loss == 0.0
        gradients = torch.autograd.grad(loss, (none, prototypes))
        assert gradients[0].shape == (0, 8)
        assert (gradients[1] == 0).all()


def test_zero_vectors_and_duplicates_have_finite_gradients() -> None:
    *views, prototypes = inputs_of(12, 9, 8, 2)
    views[0][3] = 0.0
    views[1][4:8] = views[1][3]
    prototypes[2] = 0.0
    prototypes[5] = prototypes[4]
    for values in with_gradients(
        lambda *x: swav_loss(x[:-1], x[-1], normalize=True), *views, prototypes
    ):
        assert values.isfinite().all()


def test_strided_views_are_read_as_they_are() -> None:
    wide = [torch.randn(16, 40).T[:, ::2] for _ in range(2)]
    prototypes = torch.randn(8, 14).T
    found = swav_loss(wide, prototypes, normalize=True)
    copies = [view.contiguous() for view in wide]
    assert found == swav_loss(copies, prototypes.contiguous(), normalize=True)


def test_one_tensor_of_all_views_will_do() -> None:
    *views, prototypes = inputs_of(6, 5, 4, 3)
    stacked = torch.stack(views)
    assert swav_loss(stacked, prototypes) == swav_loss(views, prototypes)  # type: ignore[arg-type]


def test_no_matrix_of_features_and_prototypes_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_contrast, "_memory_budget", 0)
    inputs = [x.requires_grad_() for x in inputs_of(3000, 2500, 4, 3)]
    with Largest() as largest:  # type: ignore[no-untyped-call]
        torch.autograd.grad(swav_loss(inputs[:-1], inputs[-1]), inputs)
    assert largest.num_elements <= 3 * 3000 * 4  # the views, against 7,500,000 for each


def test_gradients_of_the_reference_are_right() -> None:
    inputs = [x.double().requires_grad_() for x in inputs_of(5, 4, 3, 3)]
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    targets = [reference.sinkhorn(inputs[0] @ inputs[-1].T, 0.05, 3)]

    def loss(temperature: Tensor, *inputs: Tensor) -> Tensor:
        return reference.prediction_losses(inputs[:-1], inputs[-1], temperature, targets, [0])

    assert torch.autograd.gradcheck(loss, (temperature, *inputs))
    assert torch.autograd.gradgradcheck(loss, (temperature, *inputs))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: swav_loss([unit(3, 4)], unit(5, 4)),
            ValueError,
            "swav_loss: views must be at least 2, got 1",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(2, 4)], unit(5, 4)),
            ValueError,
            r"swav_loss: views\[1\] must have shape \(3, 4\), got \(2, 4\)",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 3)),
            ValueError,
            r"swav_loss: prototypes must have shape \(N, 4\), got \(5, 3\)",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(0, 4)),
            ValueError,
            r"swav_loss: prototypes must have at least one row, got shape \(0, 4\)",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4).double()], unit(5, 4)),
            TypeError,
            r"swav_loss: views\[1\] must be float32, got float64",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4) * math.nan], unit(5, 4)),
            ValueError,
            r"swav_loss: views\[1\] must be finite, got NaN or infinity in row 0",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), assigned=(0, 2)),
            ValueError,
            r"swav_loss: assigned must be distinct indices in \[0, 2\), got \(0, 2\)",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), assigned=(1, 1)),
            ValueError,
            "swav_loss: assigned must be distinct indices",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), assigned=()),
            ValueError,
            "swav_loss: assigned must be distinct indices",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), queues=[unit(9, 4)]),
            ValueError,
            "swav_loss: queues must be as many as assigned views, 2, got 1",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), temperature=0.0),
            ValueError,
            r"swav_loss: temperature must be positive and finite, got 0\.0",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), epsilon=1e-9),
            ValueError,
            "swav_loss: epsilon must be at least 1e-06",
        ),
        (
            lambda: swav_loss(
                [unit(3, 4), unit(3, 4)],
                unit(5, 4),
                reduce="mean",  # type: ignore[arg-type]
            ),
            ValueError,
            "swav_loss: reduce must be one of 'ddp_mean', 'sum', got 'mean'",
        ),
        (
            lambda: swav_loss([unit(3, 4), unit(3, 4)], unit(5, 4), iterations=0),
            ValueError,
            "swav_loss: iterations must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
