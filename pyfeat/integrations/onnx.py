"""Deformable attention in the operators of ONNX, for ``torch.onnx.export``."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyfeat._extras import require

_OP = "onnx.translation_table"
_FLOAT, _INT64, _BOOL, _DOUBLE = 1, 7, 9, 11  # of onnx.TensorProto


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Say how the operators of this library are written in ONNX.

    For ``torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())``; the
    file then needs nothing of this library. Batch and queries may be dynamic; spatial shapes are
    fixed. Over one or two axes, a level becomes a ``GridSample``; over three, or with "discrete"
    sampling, gathers.

    Returns:
        Translations by operator, for opset 18; torch converts them to the opset that is asked for.

    Raises:
        ImportError: If onnxscript is not installed.
        ValueError: From the export, if spatial shapes are dynamic.

    Precision: sums in float32 (float64 for float64 values), rounded once, like the operator.
    Memory: O(B Q H T D): runtimes store what they sample.

    Examples:
        >>> [str(operator) for operator in translation_table()]
        ['pyfeat.deform_attn.default']
    """
    opset = require("onnxscript", extra="onnx", op=_OP).opset18

    def deform_attn(
        value: Any,
        shapes: Sequence[int],
        num_points: Sequence[int],
        locations: Any,
        weights: Any,
        border: bool,
        align_corners: bool,
        discrete: bool,
        softmax: bool,
        backend: str,
    ) -> Any:
        if not all(isinstance(number, int) for number in (*shapes, *num_points)):
            message = f"{_OP}: spatial_shapes must be fixed in the export, got dynamic sizes"
            raise ValueError(message)
        translation = _Translation(opset, value, locations, weights)
        ndim = len(shapes) // len(num_points) if num_points else 1
        sizes = [tuple(shapes[i : i + ndim]) for i in range(0, len(shapes), ndim)]
        if softmax:
            translation.weights = opset.Softmax(translation.weights, axis=-1)
        translation.leave_out(far=not (border or discrete))
        cells = itertools.accumulate((math.prod(size) for size in sizes), initial=0)
        points = itertools.accumulate(num_points, initial=0)
        for size, count, cell, point in zip(sizes, num_points, cells, points, strict=False):
            if math.prod(size) * count == 0:
                continue
            translation.take_level(size, cell, point, count)
            if discrete:
                translation.add_nearest(size)
            elif len(size) <= 2:
                translation.add_grid_sample(size, border, align_corners)
            else:
                translation.add_corners(size, border, align_corners)
        return translation.output()

    return {torch.ops.pyfeat.deform_attn.default: deform_attn}


class _Translation:
    """One operator, written level by level; BH is the product of batch and heads."""

    def __init__(self, opset: Any, value: Any, locations: Any, weights: Any) -> None:
        self.op, self.given = opset, value
        self.constants: dict[tuple[float, ...], Any] = {}
        self.dtype = _DOUBLE if value.dtype.name == "DOUBLE" else _FLOAT
        self.value = opset.Transpose(self._cast(value), perm=[0, 2, 1, 3])  # [B, H, S, D]
        self.locations = opset.Transpose(self._cast(locations), perm=[0, 2, 1, 3, 4])
        self.weights = opset.Transpose(self._cast(weights), perm=[0, 2, 1, 3])  # [B, H, Q, T]
        self.batch, self.heads = self._size(value, 0), self._size(value, 2)
        self.width, self.queries = self._size(value, 3), self._size(locations, 1)
        self.both = opset.Mul(self.batch, self.heads)
        self.sums: list[Any] = []  # [BH, Q, D] of every level

    def leave_out(self, far: bool) -> None:
        """Give points at NaN, and at infinities if far away is out of range, the weight 0.

        Coordinates are clipped to [-1, 2], which changes nothing: both ends are out of range of every
        level, but for one of a single cell with aligned corners, where all coordinates are one place.
        """
        op = self.op
        found = op.Equal(self.locations, self.locations)
        if far:
            found = op.And(found, op.Not(op.IsInf(self.locations)))
        all_found = op.ReduceMin(op.Cast(found, to=self.dtype), self._ints(-1), keepdims=0)
        self.weights = op.Where(op.Cast(all_found, to=_BOOL), self.weights, self._numbers(0.0))
        clipped = op.Clip(self.locations, self._numbers(-1.0), self._numbers(2.0))
        self.locations = op.Where(found, clipped, self._numbers(0.5))

    def take_level(self, size: Sequence[int], cell: int, point: int, count: int) -> None:
        """Take out what the next sum is of: value, locations and weights."""
        op = self.op
        self.cells = self._slice(self.value, 2, cell, math.prod(size))  # [B, H, N, D]
        self.points = op.Reshape(
            self._slice(self.locations, 3, point, count),
            self._shape(self.both, self.queries, count, len(size)),
        )  # [BH, Q, P, n]
        self.point_weights = op.Reshape(
            self._slice(self.weights, 3, point, count),
            self._shape(self.both, self.queries, count),
        )  # [BH, Q, P]

    def add_grid_sample(self, size: Sequence[int], border: bool, align_corners: bool) -> None:
        """Add a level of one or two axes."""
        op, points = self.op, self.points
        if len(size) == 1:
            size = (1, *size)
            points = op.Pad(points, self._ints(0, 0, 0, 0, 0, 0, 0, 1), self._numbers(0.5))
        columns = op.Transpose(self.cells, perm=[0, 1, 3, 2])  # [B, H, D, N]
        sampled = op.GridSample(
            op.Reshape(columns, self._shape(self.both, self.width, *size)),
            op.Sub(op.Mul(points, self._numbers(2.0)), self._numbers(1.0)),
            align_corners=int(align_corners),
            mode="bilinear",
            padding_mode="border" if border else "zeros",
        )  # [BH, D, Q, P]
        weighted = op.Mul(sampled, op.Unsqueeze(self.point_weights, self._ints(1)))
        total = op.ReduceSum(weighted, self._ints(3), keepdims=0)  # [BH, D, Q]
        self.sums.append(op.Transpose(total, perm=[0, 2, 1]))

    def add_nearest(self, size: Sequence[int]) -> None:
        """Add a level sampled at single cells."""
        op = self.op
        scaled = op.Mul(self.points, self._numbers(*reversed(size)))
        cells = op.Floor(op.Add(scaled, self._numbers(0.5)))
        self._add_gathered(size, self._clipped(cells, size), self.point_weights)

    def add_corners(self, size: Sequence[int], border: bool, align_corners: bool) -> None:
        """Add a level of any number of axes, corner by corner of the cells around a point."""
        op = self.op
        scales = [count - 1 if align_corners else count for count in reversed(size)]
        places = op.Mul(self.points, self._numbers(*scales))  # [BH, Q, P, n], last axis x, y, z
        if not align_corners:
            places = op.Sub(places, self._numbers(0.5))
        if border:
            places = self._clipped(places, size)
        lows = op.Floor(places)
        after = op.Sub(places, lows)
        before = op.Sub(self._numbers(1.0), after)
        for corner in itertools.product((0.0, 1.0), repeat=len(size)):
            cells = op.Add(lows, self._numbers(*corner))
            clipped = self._clipped(cells, size)
            high = op.Cast(self._numbers(*corner), to=_BOOL)
            shares = op.Where(high, after, before)
            shares = op.Where(op.Equal(cells, clipped), shares, self._numbers(0.0))
            shares = op.ReduceProd(shares, self._ints(-1), keepdims=0)  # [BH, Q, P]
            self._add_gathered(size, clipped, op.Mul(self.point_weights, shares))

    def output(self) -> Any:
        """(B, Q, H D), in the dtype of the value."""
        op = self.op
        if not self.sums:
            shape = self._shape(self.batch, self.queries, op.Mul(self.heads, self.width))
            return op.CastLike(op.Expand(self._numbers(0.0), shape), self.given)
        total = self.sums[0]
        for level in self.sums[1:]:
            total = op.Add(total, level)
        heads = op.Reshape(total, self._shape(self.batch, self.heads, self.queries, self.width))
        rows = op.Transpose(heads, perm=[0, 2, 1, 3])  # [B, Q, H, D]
        shape = self._shape(self.batch, self.queries, op.Mul(self.heads, self.width))
        return op.CastLike(op.Reshape(rows, shape), self.given)

    def _add_gathered(self, size: Sequence[int], cells: Any, weights: Any) -> None:
        """Add the values at cells (BH, Q, P, n) of a level."""
        op = self.op
        steps = [math.prod(size[axis + 1 :]) for axis in reversed(range(len(size)))]
        index = op.Mul(op.Cast(cells, to=_INT64), self._ints(*steps))
        index = op.ReduceSum(index, self._ints(-1), keepdims=1)  # [BH, Q, P, 1]
        rows = op.Reshape(self.cells, self._shape(self.both, math.prod(size), self.width))
        gathered = op.GatherND(rows, index, batch_dims=1)  # [BH, Q, P, D]
        weighted = op.Mul(gathered, op.Unsqueeze(weights, self._ints(-1)))
        self.sums.append(op.ReduceSum(weighted, self._ints(2), keepdims=0))

    def _clipped(self, cells: Any, size: Sequence[int]) -> Any:
        op, last = self.op, self._numbers(*(count - 1 for count in reversed(size)))
        return op.Max(op.Min(cells, last), self._numbers(0.0))

    def _slice(self, x: Any, axis: int, start: int, length: int) -> Any:
        return self.op.Slice(x, self._ints(start), self._ints(start + length), self._ints(axis))

    def _size(self, x: Any, axis: int) -> Any:
        return self.op.Shape(x, start=axis, end=axis + 1)

    def _shape(self, *sizes: Any) -> Any:
        parts = [self._ints(size) if isinstance(size, int) else size for size in sizes]
        return self.op.Concat(*parts, axis=0)

    def _ints(self, *numbers: int) -> Any:
        return self.op.Constant(value_ints=list(numbers))

    def _numbers(self, *numbers: float) -> Any:
        """One number, or a vector."""
        key = tuple(map(float, numbers))
        if key not in self.constants:
            constant = self.op.Constant(value_floats=list(key))
            if len(key) == 1:
                constant = self.op.Constant(value_float=key[0])
            self.constants[key] = self.op.Cast(constant, to=self.dtype)
        return self.constants[key]

    def _cast(self, x: Any) -> Any:
        return self.op.Cast(x, to=self.dtype)
