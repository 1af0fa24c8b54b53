"""A loss runs, in every pass, on the kernels of the backend that was chosen for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfeat import _contrast_cuda
from pyfeat._contrast import Pairs
from pyfeat._distributed import distributed_pair_softplus, distributed_pair_sums
from pyfeat._ranks import Ranks
from pyfeat.losses import siglip_loss, sinkhorn_assignment
from tests.support_losses import LOSSES, unit

OPS = {
    f"pyfeat::{name}"
    for name in (
        *("pair_sums", "pair_sums_backward", "weighted_features"),
        *("pair_softplus", "pair_softplus_backward"),
    )
}


class Backends(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Of every call of an op over pairs, its name and the backend that it is told."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.told: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name() in OPS:
            (backend,) = (x for x in args if isinstance(x, str))
            self.told.append((func.name().removeprefix("pyfeat::"), backend))
        return func(*args, **(kwargs or {}))


def told_by(run: Callable[..., Tensor], *leaves: Tensor) -> set[tuple[str, str]]:
    """What the ops of a call and of its backward pass are told."""
    with Backends() as backends:
        value = run(*(x.clone().requires_grad_() for x in leaves))
        torch.autograd.backward((value * torch.rand_like(value)).sum())
    return set(backends.told)


@pytest.fixture
def _any_backend_supports_any_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyfeat.losses._reduction.select_backend", lambda *given: given[1])


CASES: dict[str, Callable[..., Tensor]] = {
    **{name: LOSSES[name] for name in ("clip", "info_nce", "nt_xent", "supcon", "swav")},
    "siglip": lambda a, b, s, **o: siglip_loss(a, b, s, -s, reduction="none", **o),
    "assignment": lambda a, b, s, **o: sinkhorn_assignment(a, b, epsilon=1.0, **o).mean(b),
}


@pytest.mark.usefixtures("_any_backend_supports_any_input")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_every_pass_of_a_loss_is_told_the_backend(case: str, backend: str) -> None:
    def loss(*leaves: Tensor) -> Tensor:
        return CASES[case](*leaves, backend=backend)

    told = told_by(loss, unit(9, 5), unit(9, 5), torch.tensor(3.0))
    assert {name for _, name in told} == {backend}
    forward, backward = {
        "siglip": ("pair_softplus", "pair_softplus_backward"),
        "assignment": ("pair_sums", "weighted_features"),
    }.get(case, ("pair_sums", "pair_sums_backward"))
    assert {forward, backward} <= {op for op, _ in told}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_so_is_every_pass_over_several_processes(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyfeat._distributed.gathered", lambda values, ranks: values[None])
    group: Any = None
    ranks = Ranks(group, 0, (9,), (9,))

    def row_lse(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return distributed_pair_sums(
            a, b, scale, Pairs(), columns=True, ranks=ranks, backend=backend
        ).row_lse

    def softplus(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        return distributed_pair_softplus(a, b, scale, -scale, Pairs(), ranks=ranks, backend=backend)

    leaves = unit(9, 5), unit(9, 5), torch.tensor(3.0)
    assert told_by(row_lse, *leaves) == {("pair_sums", backend), ("pair_sums_backward", backend)}
    assert told_by(softplus, *leaves) == {
        ("pair_softplus", backend),
        ("pair_softplus_backward", backend),
    }


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kernels_of_a_gpu_are_those_of_the_backend(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):  # noqa: N818  # nothing went wrong
        pass

    def asked(name: str) -> Any:
        raise Asked(name)

    monkeypatch.setattr("pyfeat._contrast_cuda.importlib.import_module", asked)
    a, scale, line = unit(3, 2), torch.tensor(2.0), torch.ones(3).double()
    given = a, a, scale
    calls: tuple[Callable[[], object], ...] = (
        lambda: _contrast_cuda.forward(*given, backend, *Pairs(), True, False, False, 0),
        lambda: _contrast_cuda.backward(
            *(*given, backend, *Pairs(), True), *[line] * 6, False, True, True, True, None
        ),
        lambda: _contrast_cuda.weighted(
            *(*given, backend, *Pairs(), True), *[line] * 6, a, a, True, True
        ),
        lambda: _contrast_cuda.softplus(
            *(*given, scale, backend, (None, None, None, None, False), line), (True, True)
        ),
    )
    module = {"cuda": "pyfeat._cuda_ops.contrast", "triton": "pyfeat._triton.contrast"}[backend]
    for call in calls:
        with pytest.raises(Asked, match=f"^{module}$"):
            call()


def test_an_assignment_of_the_reference_is_multiplied_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, prototypes = torch.randn(7, 4), torch.randn(5, 4)
    ours = sinkhorn_assignment(features, prototypes, epsilon=1.0).probabilities()
    monkeypatch.setattr("pyfeat._contrast_cpu._products", None)
    plain = sinkhorn_assignment(features, prototypes, epsilon=1.0, backend="reference")
    torch.testing.assert_close(plain.probabilities(), ours, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="not callable"):
        sinkhorn_assignment(features, prototypes, epsilon=1.0).probabilities()
