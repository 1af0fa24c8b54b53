"""What is said of tiles."""

from typing import Protocol


class Tile(Protocol):
    """Rows and columns of the part of a matrix that one program computes."""

    @property
    def block_m(self) -> int: ...

    @property
    def block_n(self) -> int: ...

    @property
    def num_lines(self) -> int:
        """Rows and columns that a tile leaves numbers behind for, as often as it does."""

    def num_tiles(self, num_rows: int, num_columns: int) -> int:
        """Tiles of a product with so many rows and columns."""
