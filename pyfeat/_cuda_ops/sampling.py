"""Deformable attention by the CUDA kernels."""

from typing import Any

import torch
from torch import Tensor

from pyfeat import _cuda
from pyfeat._checks import dtype_name
from pyfeat._cuda_ops.frame import address_of, queue_of
from pyfeat._sampling_inputs import SamplingInputs

# Levels of one launch.
MAX_LEVELS = _cuda.MAX_LEVELS
# Terms that are sorted at a time, 8 bytes each, 16 for float64 values.
_MAX_TERMS = 1 << 23
# From one cell to the next, which is an offset of 32 bits.
_MAX_BYTES = 1 << 31


def sampled_sums(sampling: SamplingInputs, dtype: torch.dtype) -> Tensor:
    """(B, Q, H D) of ``dtype``: each rounded once from a sum in ``sampling.accumulator``.

    Memory: the result; locations and weights once more where they are not of the dtype of sums, and
    values where they are not of ``dtype``.
    """
    batch, num_queries, num_heads = sampling.locations.shape[:3]
    shape = (batch, num_queries, num_heads * sampling.value.shape[3])
    if sampling.is_empty:
        return sampling.value.new_zeros(shape, dtype=dtype)
    out = sampling.value.new_empty(shape, dtype=dtype)
    call = _Call(sampling, sampling.value.to(dtype))
    _cuda.deform_attn(**call.arguments, output=address_of(out), queue=queue_of(out))
    return out


def sampling_gradients(
    sampling: SamplingInputs,
    grad_output: Tensor,
    *,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by ``value``, ``locations`` and ``weights``, (0,) where not needed.

    Args:
        sampling: The arguments of the sums.
        grad_output: (B, Q, H D), contiguous.
        need_value: Whether the gradient by values is needed.
        need_locations: That by locations.
        need_weights: That by weights, by logits with ``softmax``.

    Returns:
        (B, S, H, D) in ``sampling.accumulator``, and the others in the dtypes of what they are by.

    Precision: sums in ``sampling.accumulator``. Bit-identical between runs but for additions to
    values, and for these too where torch is asked for deterministic algorithms.
    Memory: results, and those of the dtype of sums; if additions are sorted at most 64 MB, 128 MB for
    float64 values, and 8 bytes for each cell and head.
    """
    value, locations, weights = sampling.value, sampling.locations, sampling.weights
    dtype = sampling.accumulator
    by_value = value.new_zeros(value.shape if need_value else 0, dtype=dtype)
    moves = need_locations and not sampling.discrete  # cells have no slope
    by_locations = locations.new_zeros(locations.shape if need_locations else 0, dtype=dtype)
    by_weights = weights.new_zeros(weights.shape if need_weights else 0, dtype=dtype)
    if not sampling.is_empty:
        call = _Call(sampling, value)
        grad_output = grad_output.to(value.dtype)
        scatters = need_value and not torch.are_deterministic_algorithms_enabled()
        if need_value and not scatters:
            _add_in_order(call, grad_output, by_value)
        if scatters or moves or need_weights:
            _cuda.deform_attn_backward(
                **call.arguments,
                grad_output=address_of(grad_output),
                gradients=(
                    address_of(by_value if scatters else None),
                    address_of(by_locations if moves else None),
                    address_of(by_weights if need_weights else None),
                ),
                queue=queue_of(value),
            )
    return by_value, by_locations.to(locations.dtype), by_weights.to(weights.dtype)


class _Call:
    """The arguments of the compiled functions, and the tensors that they are addresses of."""

    def __init__(self, sampling: SamplingInputs, value: Tensor) -> None:
        if value.stride(1) * value.element_size() >= _MAX_BYTES:
            value = value.contiguous()
        locations, weights = (
            x.to(sampling.accumulator) for x in (sampling.locations, sampling.weights)
        )
        self.sampling, self.tensors = sampling, (value, locations, weights)
        value_dtype = getattr(_cuda.Dtype, dtype_name(value.dtype))
        sizes = [size for shape in sampling.shapes for size in shape]
        modes = (sampling.border, sampling.align_corners, sampling.discrete, sampling.softmax)
        self.arguments: dict[str, Any] = {
            "value": (address_of(value), value_dtype, *value.stride()[:3]),
            "sizes": (*value.shape, locations.shape[1]),
            "levels": (sampling.ndim, sizes, list(sampling.num_points), *modes),
            "locations": (address_of(locations), *locations.stride()[:3]),
            "weights": (address_of(weights), *weights.stride()[:3]),
        }


def _add_in_order(call: _Call, grad_output: Tensor, by_value: Tensor) -> None:
    """Add to ``by_value`` (B, S, H, D) the gradient by values, by queries and points in order."""
    sampling = call.sampling
    batch, num_queries, num_heads, num_points, ndim = sampling.locations.shape
    num_slots = sampling.value.shape[1] * num_heads  # of one batch
    terms = num_heads * num_points << ndim  # of one query
    step = max(1, _MAX_TERMS // terms)
    for first in range(0, batch * num_queries, step):
        last = min(first + step, batch * num_queries)
        batches = (last - 1) // num_queries - first // num_queries + 1
        counts = by_value.new_zeros(batches * num_slots + 1, dtype=torch.int32)
        part: dict[str, Any] = {**call.arguments, "part": (first, last)}
        queue = queue_of(by_value)
        _cuda.deform_attn_count_terms(**part, counts=address_of(counts), queue=queue)
        ends = counts.cumsum(0, dtype=torch.int32)
        placed = by_value.new_empty((last - first) * terms, 2)
        _cuda.deform_attn_gather_terms(
            **part,
            ends=address_of(ends),
            terms=address_of(placed),
            grad_output=address_of(grad_output),
            by_value=address_of(by_value),
            queue=queue,
        )
