"""A loss that is captured in a CUDA graph reads no number, and is NaN where it would be refused.

There may be no GPU: its kernels are emulated, and whether a graph is captured is said by the test.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfeat import _contrast_cuda, _softplus
from pyfeat._softplus import _all_equal
from pyfeat.losses import clip_loss, info_nce, nt_xent, siglip_loss, supcon_loss
from tests.support_gpu_contrast import run_with
from tests.support_losses import unit
from tests.support_triton import DEVICE, TritonOps

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU captures graphs: test_gpu_runtime.py"
)

CASES: dict[str, Callable[..., Tensor]] = {
    "clip": clip_loss,
    "clip sum": lambda a, b, s: clip_loss(a, b, s, reduction="sum"),
    "info_nce": lambda a, b, s: info_nce(a, b, temperature=1 / s, extra_keys=b / 2),
    "log q": lambda a, b, s: info_nce(
        a, b, temperature=1 / s, key_log_probabilities=-a.detach()[:, 0].abs()
    ),
    "hard": lambda a, b, s: info_nce(a, b, temperature=1 / s, hard_negative_beta=0.5),
    "spread": lambda a, b, s: info_nce(a, b, temperature=1 / s, targets=torch.eye(len(a))),
    "metrics": lambda a, b, s: info_nce(a, b, temperature=1 / s, return_metrics=True)[0],
    "nt_xent": lambda a, b, s: nt_xent(a, b, temperature=1 / s),
    "siglip": lambda a, b, s: siglip_loss(a, b, s, -s),
    "normalized": lambda a, b, s: siglip_loss(a, b, 3.0, -1.0, normalize=True) + 0.0 * s,
}


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of operations that wait for the values of a tensor."""

    NAMES = (
        *("item", "is_nonzero", "_local_scalar_dense", "equal"),
        *("nonzero", "unique", "_unique2", "masked_select"),
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if by_mask or name in self.NAMES:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    run_with("cuda", monkeypatch)
    monkeypatch.setattr(_softplus, "_run_cpu", _contrast_cuda.softplus)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begins to capture."""
    return lambda: monkeypatch.setattr("pyfeat._capture._is_captured", lambda tensor: True)


def results_of(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with TritonOps():
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_from_a_graph(case: str, capture: Callable[[], None]) -> None:
    inputs = unit(9, 5), unit(9, 5), torch.tensor(3.0)
    with Reads() as reads:
        expected = results_of(CASES[case], *inputs)
        assert reads.seen  # outside of a graph values are checked
        reads.seen.clear()
        capture()
        found = results_of(CASES[case], *inputs)
        assert reads.seen == []
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true)


def spoiled(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    a, b, scale = unit(9, 5), unit(9, 5), torch.tensor(3.0)
    if kind == "features":
        b[7, 2] = -math.inf
    if kind == "scale":
        scale = torch.tensor(-3.0)
    if kind == "range":
        a, b = 1e19 * a, 1e18 * b
    return a, b, scale


@pytest.mark.parametrize("kind", ["features", "scale", "range"])
@pytest.mark.parametrize("case", ["clip", "info_nce", "hard", "spread", "nt_xent", "siglip"])
def test_what_would_be_refused_is_nan(case: str, kind: str, capture: Callable[[], None]) -> None:
    inputs = spoiled(kind)
    with pytest.raises(ValueError, match="must be"):
        results_of(CASES[case], *inputs)
    capture()
    loss, by_a, *_ = results_of(CASES[case], *inputs)
    assert loss.isnan()
    assert by_a.isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_so_are_terms_of_columns(value: float, capture: Callable[[], None]) -> None:
    capture()
    a, b = unit(4, 3), unit(4, 3)
    said = torch.tensor([0.0, value, 0.0, 0.0])
    for options in ({"key_log_probabilities": said}, {"targets": torch.diag(said)}):
        assert results_of(functools.partial(info_nce, **options), a, b)[0].isnan()


def test_ids_are_refused(capture: Callable[[], None]) -> None:
    capture()
    a, ids = unit(4, 3), torch.arange(4)
    message = r"clip_loss: image_ids must not be given while a CUDA graph is captured, got a tensor"
    with pytest.raises(NotImplementedError, match=message):
        clip_loss(a, a, 1.0, image_ids=ids, text_ids=ids)
    with pytest.raises(NotImplementedError, match=r"supcon_loss: labels must not be given"):
        supcon_loss(a, ids)
    with pytest.raises(NotImplementedError, match=r"info_nce: targets must not be given"):
        info_nce(a, a, targets=ids)


def test_weights_are_known_to_be_equal_if_they_are_one_number(
    capture: Callable[[], None],
) -> None:
    one, ones, others = torch.ones(()).expand(3), torch.ones(3), torch.arange(3.0)
    assert [_all_equal(x) for x in (one, ones, others, others[:1])] == [True, True, False, True]
    capture()
    assert [_all_equal(x) for x in (one, ones, others, others[:1])] == [True, False, False, True]
