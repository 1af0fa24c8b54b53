"""Values and gradients of deformable attention against the reference in float64."""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pyfeat import _C
from tests.support_attention import (
    MODES,
    SHAPES,
    Inputs,
    Mode,
    assert_as_good_as_plain_torch,
    assert_close_enough,
    attend,
    attend_exactly,
    gradients_of,
    make_inputs,
    with_gradients,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Which of value, locations and weights have a gradient.
SUBSETS = [wanted for wanted in itertools.product([False, True], repeat=3) if any(wanted)]
LINEAR = [mode for mode in MODES if mode.sampling == "linear"]


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever the test sets is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs_for(mode: Mode, ndim: int = 2, **sizes: int) -> Inputs:
    return make_inputs(
        SHAPES[ndim], align_corners=mode.align_corners, sampling=mode.sampling, **sizes
    )


def locations_of(dtype: torch.dtype) -> torch.dtype:
    """What locations are in where values are of the dtype."""
    return dtype if dtype == torch.float64 else torch.float32


def grad_output_for(inputs: Inputs) -> Tensor:
    batch, queries, heads = inputs.sampling_locations.shape[:3]
    return torch.randn(batch, queries, heads * inputs.value.shape[3]).to(inputs.value.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_value_and_gradients_are_those_of_the_reference(
    ndim: int, mode: Mode, dtype: torch.dtype
) -> None:
    inputs = inputs_for(mode, ndim, queries=9, dim=16).to(dtype, locations_of(dtype))
    assert_as_good_as_plain_torch(inputs, mode, grad_output_for(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dim", [1, 3, 8, 20, 32, 48, 64, 100])
def test_heads_may_have_any_number_of_features(dim: int, dtype: torch.dtype) -> None:
    for mode in (MODES[2], MODES[4]):
        inputs = inputs_for(mode, dim=dim).to(dtype, locations_of(dtype))
        assert_as_good_as_plain_torch(inputs, mode, grad_output_for(inputs))


@pytest.mark.parametrize("dim", [3, 32])
@pytest.mark.parametrize("num_points", [1, 2, 5, 8, 19])
def test_levels_may_have_any_number_of_points(num_points: int, dim: int) -> None:
    inputs = inputs_for(Mode(), num_points=num_points, dim=dim).to(torch.float32)
    assert_as_good_as_plain_torch(inputs, Mode(softmax=True), grad_output_for(inputs))


@pytest.mark.parametrize("num_points", [[1, 4, 2], [0, 5, 1], [3, 0, 0], [0, 0, 7]], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_levels_may_have_points_of_their_own(mode: Mode, num_points: list[int]) -> None:
    inputs = make_inputs(
        [(4, 6), (1, 3), (5, 2)],
        num_points=num_points,
        align_corners=mode.align_corners,
        sampling=mode.sampling,
    ).to(torch.float32)
    assert_as_good_as_plain_torch(inputs, mode, grad_output_for(inputs))


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_instruction_set_gives_value_and_gradients(
    isa: str, ndim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name in ("deform_attn_cpu", "deform_attn_backward_cpu"):
        kernel = functools.partial(getattr(_C, name), isa=isa)

        def chosen(*arguments: Any, kernel: Any = kernel, **options: Any) -> None:
            called.append(isa)
            kernel(*arguments, **options)

        monkeypatch.setattr(_C, name, chosen)
    for mode, dtype in zip(MODES, [*DTYPES, *DTYPES[:2]], strict=True):
        inputs = inputs_for(mode, ndim, dim=20).to(dtype, locations_of(dtype))
        assert_as_good_as_plain_torch(inputs, mode, grad_output_for(inputs))
    assert len(called) == 2 * len(MODES)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_few_queries_over_many_cells(dtype: torch.dtype, mode: Mode) -> None:
    """Where most cells are not read at all: as in a decoder."""
    inputs = make_inputs(
        [(23, 31), (40,) * 2],
        queries=3,
        dim=20,
        align_corners=mode.align_corners,
        sampling=mode.sampling,
    ).to(dtype, locations_of(dtype))
    assert_as_good_as_plain_torch(inputs, mode, grad_output_for(inputs))


def test_values_that_are_widened_a_few_heads_at_a_time() -> None:
    """8 heads of 2.5 MB in float32."""
    inputs = make_inputs([(200, 200)], batch=1, heads=8, dim=10).to(torch.float16, torch.float32)
    assert_as_good_as_plain_torch(inputs, Mode(), grad_output_for(inputs))


@pytest.mark.parametrize("mode", [MODES[2], MODES[4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_at_the_size_of_a_model_too(mode: Mode, dtype: torch.dtype) -> None:
    """32 features over four levels; every cell is touched many times."""
    shapes = [(12, 17), (6, 9), (3, 5), (2, 3)]
    inputs = make_inputs(
        shapes,
        batch=1,
        queries=279,
        heads=4,
        dim=32,
        num_points=4,
        sampling=mode.sampling,
    ).to(dtype, torch.float32)
    assert_as_good_as_plain_torch(inputs, mode, grad_output_for(inputs))


def _transposed(x: Tensor) -> Tensor:
    """The same elements, the first axes the innermost."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def _sparse(x: Tensor) -> Tensor:
    """The same elements, two apart along every axis and not at the start of their memory."""
    wide = x.new_full([2 * size + 1 for size in x.shape], math.nan)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("laid_out", [_transposed, _sparse, _heads_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", [MODES[1], MODES[5]], ids=str)
def test_strides_do_not_matter(mode: Mode, dtype: torch.dtype, laid_out: object) -> None:
    assert callable(laid_out)
    inputs = inputs_for(mode, dim=20).to(dtype, torch.float32)
    grad_output = grad_output_for(inputs)
    expected = with_gradients(attend, inputs, mode, grad_output)
    strided = inputs.of(*map(laid_out, inputs.tensors()))
    found = with_gradients(attend, strided, mode, laid_out(grad_output))
    for mine, true in zip(found, expected, strict=True):
        assert mine.equal(true)


def test_what_is_expanded_is_as_good_as_copied() -> None:
    inputs = inputs_for(Mode(), batch=1, heads=1).to(torch.float32)
    value, _, locations, weights, _ = inputs
    wide = inputs.of(
        value.expand(3, -1, 2, -1), locations.expand(3, -1, 2, -1, -1), weights.expand(3, -1, 2, -1)
    )
    grad_output = torch.randn(1, 1, 8).expand(3, 5, 8)
    copied = wide.of(*(x.contiguous() for x in wide.tensors()))
    found = with_gradients(attend, wide, Mode(), grad_output)
    expected = with_gradients(attend, copied, Mode(), grad_output.contiguous())
    for mine, true in zip(found, expected, strict=True):
        assert mine.equal(true)


def test_the_gradient_of_a_sum_is_that_of_ones() -> None:
    inputs = inputs_for(Mode()).to(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    found = torch.autograd.grad(attend(inputs, Mode()).sum(), leaves)
    expected = with_gradients(attend, inputs, Mode(), torch.ones(2, 5, 8))[1:]
    for mine, true in zip(found, expected, strict=True):
        assert mine.equal(true)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("queries", [2, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", [MODES[2], MODES[4]], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(
    mode: Mode, dtype: torch.dtype, queries: int, batch: int, heads: int
) -> None:
    """Fewer and more heads than threads; few queries, and enough to be cut between them."""
    inputs = make_inputs(
        [(12, 17), (5, 3)],
        batch=batch,
        heads=heads,
        queries=queries,
        dim=24,
        align_corners=mode.align_corners,
        sampling=mode.sampling,
    ).to(dtype, torch.float32)
    grad_output = grad_output_for(inputs)
    results = []
    for count in (1, 2, 3, 7, 1):
        torch.set_num_threads(count)
        results.append(with_gradients(attend, inputs, mode, grad_output))
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert mine.equal(first)


@pytest.mark.parametrize("mode", [MODES[1], MODES[2], MODES[4]], ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_a_gradient_does_not_depend_on_which_others_are_wanted(
    wanted: tuple[bool, ...], mode: Mode
) -> None:
    inputs = inputs_for(mode).to(torch.float32)
    grad_output = grad_output_for(inputs)
    expected = with_gradients(attend, inputs, mode, grad_output)[1:]
    tensors = [
        x.detach().clone().requires_grad_(needed)
        for x, needed in zip(inputs.tensors(), wanted, strict=True)
    ]
    out = attend(inputs.of(*tensors), mode)
    if not out.requires_grad:  # by locations alone, a discrete sample has no gradient
        assert (mode.sampling, wanted) == ("discrete", (False, True, False))
        return
    out.backward(grad_output)  # type: ignore[no-untyped-call]
    for tensor, needed, true in zip(tensors, wanted, expected, strict=True):
        assert needed or tensor.grad is None
        if tensor.grad is not None:
            assert tensor.grad.equal(true)
        else:
            assert not needed or not true.any()


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    inputs = inputs_for(Mode()).to(torch.float32)
    expected = attend(inputs, Mode())
    assert expected.grad_fn is None
    for x in inputs.tensors():
        x.requires_grad_()
    with torch.no_grad():
        unrecorded = attend(inputs, Mode())
    assert unrecorded.grad_fn is None
    assert not unrecorded.requires_grad
    assert unrecorded.equal(expected)
    with torch.inference_mode():
        assert attend(inputs, Mode()).equal(expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_second_derivatives_are_those_of_finite_differences(ndim: int, mode: Mode) -> None:
    inputs = inputs_for(mode, ndim, batch=1, queries=1, heads=1, dim=2, num_points=1)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    if mode.sampling == "discrete":
        leaves[1].requires_grad_(False)

    def out(*tensors: Tensor) -> Tensor:
        return attend(inputs.of(*tensors), mode)

    assert torch.autograd.gradcheck(out, leaves)
    assert torch.autograd.gradgradcheck(out, leaves)


def _second(inputs: Inputs, mode: Mode, *, exactly: bool, seed: Tensor) -> list[Tensor]:
    """Gradients, by inputs and grad_output, of a weighted sum of all first gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs.tensors()]
    grad_output = seed.to(inputs.value.dtype).requires_grad_()
    out = (attend_exactly if exactly else attend)(inputs.of(*leaves), mode)
    first = torch.autograd.grad(out, leaves, grad_output, create_graph=True, allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    total = out.new_zeros((), dtype=leaves[1].dtype)
    for gradient, leaf in zip(first, leaves, strict=True):
        factor = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        if gradient is not None:
            total = total + (gradient * factor).sum(dtype=total.dtype)
    return list(
        torch.autograd.grad(
            total, [*leaves, grad_output], allow_unused=True, materialize_grads=True
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_second_derivatives_are_those_of_the_reference(
    ndim: int, mode: Mode, dtype: torch.dtype
) -> None:
    inputs = inputs_for(mode, ndim, dim=20).to(dtype, locations_of(dtype))
    seed = grad_output_for(inputs)
    for name, mine, plain, exact in zip(
        ("value", "locations", "weights", "grad_output"),
        _second(inputs, mode, exactly=False, seed=seed),
        _second(inputs, mode, exactly=True, seed=seed),
        _second(inputs.to(torch.float64), mode, exactly=True, seed=seed),
        strict=True,
    ):
        assert mine.dtype == plain.dtype
        assert_close_enough(name, mine, plain, exact)


@pytest.mark.parametrize("mode", [LINEAR[1], LINEAR[3]], ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_second_derivatives_do_not_depend_on_which_gradients_are_wanted(
    wanted: tuple[bool, ...], mode: Mode
) -> None:
    inputs = inputs_for(mode).to(torch.float64)
    seed = grad_output_for(inputs)
    found = []
    for attention in (attend, attend_exactly):
        tensors = [
            x.detach().requires_grad_(needed)
            for x, needed in zip(inputs.tensors(), wanted, strict=True)
        ]
        leaves = [x for x in tensors if x.requires_grad]
        grad_output = seed.detach().requires_grad_()
        out = attention(inputs.of(*tensors), mode)
        first = torch.autograd.grad(out, leaves, grad_output, create_graph=True)
        total = torch.stack([x.square().sum() for x in first]).sum()
        found.append(gradients_of(total, [*leaves, grad_output], torch.ones_like(total)))
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-11)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", [LINEAR[1], LINEAR[2]], ids=str)
def test_bits_of_second_derivatives_do_not_depend_on_the_number_of_threads(mode: Mode) -> None:
    inputs = inputs_for(mode, heads=3, queries=100, dim=20).to(torch.float32)
    seed = grad_output_for(inputs)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(_second(inputs, mode, exactly=False, seed=seed))
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert mine.equal(first)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_gradients_are_as_good_where_they_are_to_be_derived_once_more(
    dtype: torch.dtype, mode: Mode
) -> None:
    inputs = inputs_for(mode, dim=20).to(dtype, locations_of(dtype))
    grad_output = grad_output_for(inputs)
    leaves = [x.detach().requires_grad_() for x in inputs.tensors()]
    found = torch.autograd.grad(
        attend(inputs.of(*leaves), mode),
        leaves,
        grad_output,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    plain = with_gradients(attend_exactly, inputs, mode, grad_output)[1:]
    wide = inputs.to(torch.float64)
    exact = with_gradients(attend_exactly, wide, mode, grad_output.double())[1:]
    for name, *gradients in zip(
        ("value", "locations", "weights"), found, plain, exact, strict=True
    ):
        assert_close_enough(name, *(x.detach() for x in gradients))


def test_a_third_derivative_is_refused() -> None:
    inputs = inputs_for(Mode()).to(torch.float32)
    leaves = [x.requires_grad_() for x in inputs.tensors()]
    first = torch.autograd.grad(attend(inputs, Mode()).square().sum(), leaves, create_graph=True)
    total = torch.stack([x.square().sum() for x in first]).sum()
    second = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="deform_attn: derivatives must be of order 1 or 2"
    ):
        torch.autograd.grad(second[0].sum(), leaves)
