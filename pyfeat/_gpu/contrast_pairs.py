"""The pairs that a launch is about, and what the kernels of a backend do with them."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyfeat._gpu.tiles import Tile
from pyfeat._pairs import Pairs, WeightedSide


@dataclass(frozen=True)
class AllPairs:
    """The pairs of rows of a (L, D) and b (S, D), or of a block of them."""

    a: Tensor
    b: Tensor
    scale: Tensor
    pairs: Pairs

    @classmethod
    def of(
        cls, kernels: "ContrastKernels", a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs
    ) -> "AllPairs":
        """As the kernels read them."""
        kept: dict[str, Any] = {
            name: None if x is None else x.contiguous()
            for name, x in zip(Pairs._fields[:5], pairs[:5], strict=True)
        }
        left = kernels.packed(a)
        right = left if b is a else kernels.packed(b)
        return cls(left, right, scale.to(a.device), pairs._replace(**kept))

    @property
    def num_rows(self) -> int:
        return self.a.shape[0]

    @property
    def num_columns(self) -> int:
        return self.b.shape[0]

    @property
    def has_ids(self) -> bool:
        return self.pairs.row_ids is not None and self.pairs.column_ids is not None

    def block(self, rows: slice, columns: slice) -> "AllPairs":
        """Some of the rows with some of the columns."""
        places = (columns, rows, columns, rows, columns)
        parts: dict[str, Any] = {
            name: None if x is None else x[place]
            for name, x, place in zip(Pairs._fields[:5], self.pairs[:5], places, strict=True)
        }
        return AllPairs(self.a[rows], self.b[columns], self.scale, self.pairs._replace(**parts))


class LineSums(NamedTuple):
    """Of rows or of columns, (lines,) float64 each."""

    lse: Tensor
    positives: Tensor
    largest: Tensor  # (0,) if not wanted

    @classmethod
    def none(cls, count: int, device: torch.device, *, largest: bool) -> "LineSums":
        """Of no pairs."""
        lse = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        return cls(lse, torch.zeros_like(lse), lse.clone() if largest else lse.new_empty(0))

    def part(self, lines: slice) -> "LineSums":
        """Views of some of them."""
        return LineSums(*(x[lines] for x in self))


class ContrastKernels(Protocol):
    """Kernels of a backend, a module. Tiles that it is given are its own."""

    def packed(self, features: Tensor) -> Tensor:
        """(L, W): the features as kernels read tiles of them; blocks begin at multiples of 128."""

    def readable(self, values: Tensor) -> Tensor:
        """(L, W) in rows, as products with them are taken; what is beyond the values is 0."""

    def sums_tile(self, num_rows: int, num_columns: int, features: Tensor) -> Tile:
        """Of what ``add_sums`` launches: a number of each kind is left for its rows and columns."""

    def gradient_tile(self, num_rows: int, num_columns: int, features: Tensor) -> Tile:
        """Likewise of ``add_softplus`` and ``write_gradient``; divides 128 rows and columns."""

    def add_sums(
        self,
        block: AllPairs,
        tile: Any,
        of_rows: LineSums,
        of_columns: LineSums | None,
        *,
        on_diagonal: bool,
    ) -> None:
        """Add the pairs of a block to the sums of its rows and columns.

        Tiles leave parts behind, which are merged in float64, in the order of tiles: nothing is
        added atomically, so that bits are equal between runs.

        Args:
            block: The pairs.
            tile: See ``sums_tile``.
            of_rows: Their sums.
            of_columns: Those of columns; None: not wanted.
            on_diagonal: Columns are the rows, and pairs say the same of ij and ji.
        """

    def add_softplus(
        self,
        block: AllPairs,
        tile: Any,
        bias: Tensor,
        sums: Tensor,
        weights: Tensor | None,
        gradient: Tensor | None,
    ) -> None:
        """Add the pairs of a block to the sums of its rows, and write their gradient.

        Args:
            block: The pairs.
            tile: See ``gradient_tile``.
            bias: () float.
            sums: (2, L) float64, of softplus and of signed sigmoids.
            weights: (L,) float32; None: no gradient is wanted.
            gradient: (L, S), a view with room for whole tiles.
        """

    def gradient_terms(self, side: WeightedSide, factor: Tensor) -> Tensor:
        """(3, lines) float32: shift, weight, positive.

        ``weight 2^(z - shift)`` is ``factor weights exp(S - lse)`` for z = S / ln 2: with a whole
        shift, z - shift is exact where it matters.
        """

    def write_gradient(
        self,
        block: AllPairs,
        tile: Any,
        row_terms: Tensor,
        column_terms: Tensor | None,
        gradient: Tensor,
    ) -> Tensor:
        """Write whole tiles of the gradient G of a block, 0 for what does not count.

        Args:
            block: The pairs.
            tile: See ``gradient_tile``.
            row_terms: (3, L), a view with contiguous lines.
            column_terms: (3, S); None: columns have no part.
            gradient: (L, S), a view with room for whole tiles.

        Returns:
            Parts of the sum of G a.b, float32 at least, of G before it is rounded to 16 bits.
        """

    def add_product(self, out: Tensor, gradient: Tensor, values: Tensor) -> None:
        """Add ``gradient @ values`` to ``out`` (rows, F) float32.

        The gradient is a view of whole tiles, or one transposed; values are ``readable``.
        """
