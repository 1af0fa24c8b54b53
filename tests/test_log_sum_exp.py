"""Row and column log-sum-exps of products that are never stored, against float64."""

import itertools
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyfeat import _C, reference
from pyfeat._checks import as_matrix
from pyfeat.matching import log_sum_exp

SIZES = (0, 1, 31, 33, 257)
SHAPES = list(itertools.product(SIZES, SIZES))
WIDTHS = (0, 1, 31, 33, 257)
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def _kernel(
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    products: str = "float32",
    threads: int = 2,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """The kernel with a chosen instruction set, precision of products and thread count."""
    rows = torch.full((len(a),), float("nan"), dtype=torch.float64)
    columns = torch.full((len(b),), float("nan"), dtype=torch.float64)
    dtype = getattr(_C.Dtype, products)
    _C.log_sum_exp_cpu(
        as_matrix(a), as_matrix(b), scale, dtype, rows.data_ptr(), columns.data_ptr(), threads, isa
    )
    return rows, columns


def _assert_within_bound(
    found: tuple[Tensor, Tensor], a: Tensor, b: Tensor, scale: float, products: str = "float32"
) -> None:
    """Fail unless every element lies within the error bound that the kernel states."""
    norms = [float(x.double().norm(dim=1).max()) if len(x) else 0.0 for x in (a, b)]
    largest = abs(scale) * norms[0] * norms[1]
    dim = a.shape[1]
    if products == "float32":
        roundings, rest = min(dim, 64) + dim / 64 + 5, 80
    else:
        roundings, rest = dim + 4, len(a) + len(b)
    bound = (roundings * largest + rest) * UNIT[products]
    bound += (dim + 4) * largest * UNIT["float64"]  # of the reference
    for ours, exact in zip(found, reference.log_sum_exp(a, b, scale), strict=True):
        assert ours.shape == exact.shape
        empty = exact == -torch.inf
        assert torch.equal(ours == -torch.inf, empty)
        error = (ours - exact)[~empty].abs()
        assert (error <= bound).all(), f"off by {error.max():.2e}, more than {bound:.2e}"


def _unit_vectors(rows: int, dim: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim))


def _powers(exponents: NDArray[np.float32], isa: str) -> NDArray[np.float32]:
    powers = np.full_like(exponents, np.nan)
    _C.power_of_two(exponents.ctypes.data, len(exponents), powers.ctypes.data, isa)
    return powers


@pytest.mark.parametrize("isa", _C.isas())
def test_powers_of_two_are_off_by_at_most_one_and_a_half_units(isa: str) -> None:
    magnitudes = np.exp2(np.linspace(-40, 6.98, 1_500_001))  # up to 126.2
    exponents = np.concatenate(
        [np.linspace(-150, 127, 1_500_001), -magnitudes, magnitudes], dtype=np.float32
    )
    exact = np.exp2(exponents.astype(np.float64))
    found = _powers(exponents, isa)
    unit = np.exp2(np.floor(np.log2(exact)) - 23)
    normal = exact >= 2.0**-126
    assert (np.abs(found - exact) <= np.where(normal, 1.5 * unit, 2.0**-126)).all()


@pytest.mark.parametrize("isa", _C.isas())
def test_powers_of_whole_numbers_are_exact_and_of_very_negative_ones_0(isa: str) -> None:
    whole = np.arange(-126, 128, dtype=np.float32)
    assert np.array_equal(_powers(whole, isa), np.ldexp(np.float32(1), whole.astype(int)))
    low = np.array([-np.inf, -3e38, -1e30, -1e5, -1000.5, -200, -151], dtype=np.float32)
    assert np.array_equal(_powers(low, isa), np.zeros_like(low))


@pytest.mark.parametrize("products", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_sums_lie_within_the_stated_bound(shape: tuple[int, int], products: str) -> None:
    for dim in WIDTHS:
        a, b = torch.randn(shape[0], dim), torch.randn(shape[1], dim)
        for scale in (1.0, -3.0, 0.0):
            found = _kernel(a, b, scale, products=products)
            _assert_within_bound(found, a, b, scale, products)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("shape", [(1, 500, 40), (67, 1301, 45), (1301, 67, 45), (700, 700, 3)])
def test_every_instruction_set_lies_within_the_stated_bound(
    isa: str, shape: tuple[int, int, int]
) -> None:
    a, b = torch.randn(shape[0], shape[2]), torch.randn(shape[1], shape[2])
    for scale in (0.01, 1.0, 100.0):
        _assert_within_bound(_kernel(a, b, scale, isa=isa), a, b, scale)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dim", [16, 256])
def test_error_is_at_most_twice_that_of_torch(isa: str, scale: float, dim: int) -> None:
    a, b = _unit_vectors(1000, dim), _unit_vectors(1500, dim)
    exact = torch.cat(reference.log_sum_exp(a, b, scale))
    s = scale * (a @ b.T)
    plain = torch.cat([s.logsumexp(dim=1), s.logsumexp(dim=0)])
    found = torch.cat(_kernel(a, b, scale, isa=isa))
    assert float((found - exact).abs().max()) <= 2 * float((plain - exact).abs().max())


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("order", ["ascending", "descending", "random", "one in a thousand"])
def test_sums_survive_products_of_any_size_in_any_order(isa: str, order: str) -> None:
    # Whole numbers times ln 2: products are exact, and the largest one changes many times.
    sizes = torch.linspace(-3000, 3000, 2001).round()[:, None]
    sizes = {
        "ascending": sizes,
        "descending": sizes.flip(0),
        "random": sizes[torch.randperm(2001)],
        "one in a thousand": torch.zeros(2001, 1).index_fill_(0, torch.tensor([1234]), 2500.0),
    }[order]
    ones = torch.tensor([1.0, -1.0, 0.0, 1.0])[torch.arange(50) % 4][:, None]
    scale = float(np.log(2.0))
    for a, b in ((ones, sizes), (sizes, ones)):
        found = _kernel(a, b, scale, isa=isa)
        for ours, exact in zip(found, reference.log_sum_exp(a, b, scale), strict=True):
            assert torch.allclose(ours, exact, rtol=2.0**-46, atol=80 * UNIT["float32"])


@pytest.mark.parametrize("products", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 70_001, 2), (70_001, 3, 2), (900, 900, 33)])
def test_thread_count_does_not_change_a_bit(shape: tuple[int, int, int], products: str) -> None:
    a, b = torch.randn(shape[0], shape[2]), torch.randn(shape[1], shape[2])
    first = _kernel(a, b, 5.0, products=products, threads=1)
    _assert_within_bound(first, a, b, 5.0, products)
    for threads in (1, 2, 3, 8):
        again = _kernel(a, b, 5.0, products=products, threads=threads)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.slow
def test_sums_over_several_packed_ranges_of_both_sides_are_right() -> None:
    a, b = torch.randn(4500, 4000), torch.randn(1100, 4000)  # 72 MB and 17.6 MB packed
    _assert_within_bound(_kernel(a, b, 0.1), a, b, 0.1)


@pytest.mark.parametrize("isa", _C.isas())
def test_equal_rows_have_equal_sums(isa: str) -> None:
    a, b = torch.randn(40, 19).repeat(9, 1), torch.randn(70, 19).repeat(8, 1)
    for products in ("float32", "float64"):
        rows, columns = _kernel(a, b, 2.0, products=products, isa=isa)
        assert (rows.view(9, 40) == rows[:40]).all()
        assert (columns.view(8, 70) == columns[:70]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_is_widened_without_loss(dtype: torch.dtype) -> None:
    a, b = torch.randn(40, 24).to(dtype), torch.randn(90, 24).to(dtype)
    found = log_sum_exp(a, b, 3.0)
    if dtype in (torch.float32, torch.float16):
        assert torch.equal(found[0], log_sum_exp(a.float(), b.float(), 3.0)[0])
    _assert_within_bound(found, a, b, 3.0)
    _assert_within_bound(log_sum_exp(a, b, 3.0, in_float64=True), a, b, 3.0, "float64")


def test_strides_do_not_change_the_answer() -> None:
    a, b = torch.randn(24, 40).T, torch.randn(90, 60)[:, 3:51:2]
    found = log_sum_exp(a, b, 3.0)
    assert torch.equal(found[0], log_sum_exp(a.contiguous(), b.contiguous(), 3.0)[0])
    _assert_within_bound(found, a, b, 3.0)


@pytest.mark.parametrize(
    "sizes",
    [(1e30, 1e-30), (1e-34, 1e34), (1e17, 1e17), (1e-44, 1e-44), (1e90, 1e-90), (1e-99, 1e99)],
)
def test_features_of_extreme_size_neither_overflow_nor_vanish(sizes: tuple[float, float]) -> None:
    dtype = torch.float32 if 1e-45 < sizes[0] < 1e38 else torch.float64
    a, b = torch.randn(30, 20).to(dtype) * sizes[0], torch.randn(50, 20).to(dtype) * sizes[1]
    _assert_within_bound(_kernel(a, b), a, b, 1.0)
    # Beside rows that are much shorter, too.
    a[::2], b[::2] = a[::2] * 1e-9, b[::2] * 1e-9
    found = _kernel(a, b)
    _assert_within_bound(found, a, b, 1.0)
    assert torch.isfinite(torch.cat(found)).all()


def test_products_that_could_overflow_are_refused_or_taken_in_float64() -> None:
    a, b = torch.randn(30, 20).double() * 1e60, torch.randn(50, 20).double() * 1e60
    with pytest.raises(ValueError, match=r"scale \|a\| \|b\| must be at most 1e\+36 .*, got \d"):
        _kernel(a, b)
    _assert_within_bound(_kernel(a, b, products="float64"), a, b, 1.0, "float64")
    with pytest.raises(ValueError, match=r"scale \|a\| \|b\| must be at most 1e\+300"):
        _kernel(a * 1e80, b * 1e80, 1e30, products="float64")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("products", ["float32", "float64"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_features_that_are_not_finite_are_refused(bad: float, products: str, name: str) -> None:
    inputs = {"a": torch.randn(2000, 5), "b": torch.randn(3000, 5)}
    inputs[name][1990:, 2] = bad
    with pytest.raises(ValueError, match=rf"log_sum_exp: {name} must be finite, .* in row 1990"):
        _kernel(inputs["a"], inputs["b"], products=products)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1e40])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="log_sum_exp: scale must be at most 1e36 in magnitude"):
        _kernel(torch.randn(3, 2), torch.randn(4, 2), scale)


def test_rows_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="the same width"):
        _kernel(torch.randn(3, 2), torch.randn(4, 3))


@pytest.mark.parametrize("products", ["float32", "float64"])
def test_a_signal_stops_it(products: str) -> None:
    def interrupt(*_: object) -> None:
        raise TimeoutError

    a = torch.randn(1, 1000).expand(100_000, 1000)  # hours of work, and seconds between barriers
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    began = time.perf_counter()
    try:
        with pytest.raises(TimeoutError):
            _kernel(a, a, products=products)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - began < 2.0


GROWTH = """
import resource, torch
from pyfeat.matching import log_sum_exp
a, b = torch.randn(20_000, 8), torch.randn(20_000, 8)
log_sum_exp(a[:100], b[:100], 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
log_sum_exp(a, b, 1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux only")
def test_memory_grows_with_the_rows_and_not_with_their_pairs() -> None:
    # 20,000 x 20,000 products would take 1.6 GB.
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 << 10
