"""Which part of a packed matrix one of several tensor-parallel processes holds.

A matrix is cut along its outputs at tiles (16 rows), or along its inputs at tiles and whole rotation blocks: a
rotation mixes the channels of its block, so a process needs all of them. No bit inside a tile is touched, and a
slice decodes to the slice of the dense weight (FORMAT.md, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ernieq.errors import ShapeError, UsageError
from ernieq.trellis import TILE_SIDE

_SIGNS_PER_BYTE = 8


@dataclass(frozen=True)
class MatrixSlice:
    """Rows ``row`` to ``row + rows`` and columns ``column`` to ``column + columns`` of a matrix.

    Args:
        name: of the matrix, for messages.
        out_features: rows of the whole matrix.
        in_features: columns of the whole matrix.
        row: first row of the slice.
        rows: of the slice.
        column: first column of the slice.
        columns: of the slice.
    """

    name: str
    out_features: int
    in_features: int
    row: int
    rows: int
    column: int
    columns: int

    def tiles(self, packed: Tensor) -> Tensor:
        """(out_features / 16, in_features / 16, 16 K) to (rows / 16, columns / 16, 16 K), a view.

        Raises:
            ShapeError: the tensor is not that of the whole matrix.
        """
        self._check(packed, "weight_packed", (self.out_features // TILE_SIDE, self.in_features // TILE_SIDE))
        return packed[
            self.row // TILE_SIDE : (self.row + self.rows) // TILE_SIDE,
            self.column // TILE_SIDE : (self.column + self.columns) // TILE_SIDE,
        ]

    def scale(self, scale: Tensor) -> Tensor:
        """(out_features,) to (rows,), a view; raises as ``tiles``."""
        self._check(scale, "weight_scale", (self.out_features,))
        return scale[self.row : self.row + self.rows]

    def signs(self, signs: Tensor) -> Tensor:
        """(in_features / 8,) to (columns / 8,), a view; raises as ``tiles``."""
        self._check(signs, "weight_signs", (self.in_features // _SIGNS_PER_BYTE,))
        start = self.column // _SIGNS_PER_BYTE
        return signs[start : start + self.columns // _SIGNS_PER_BYTE]

    def dense(self, weight: Tensor) -> Tensor:
        """(out_features, in_features) to (rows, columns), a view; raises as ``tiles``."""
        self._check(weight, "weight", (self.out_features, self.in_features))
        return weight[self.row : self.row + self.rows, self.column : self.column + self.columns]

    def _check(self, tensor: Tensor, what: str, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape[: len(expected)]) != expected:
            raise ShapeError(
                f"{self.name}.{what} has shape {tuple(tensor.shape)}; the configuration calls for {expected}"
            )


def slice_rows(name: str, out_features: int, in_features: int, rank: int, size: int) -> MatrixSlice:
    """The rows of process ``rank`` of ``size``.

    Raises:
        UsageError: they do not start and end at tiles.
    """
    rows = _share(name, "outputs", out_features, TILE_SIDE, size)
    return MatrixSlice(name, out_features, in_features, rank * rows, rows, 0, in_features)


def slice_columns(
    name: str, out_features: int, in_features: int, rotation_block: int, rank: int, size: int
) -> MatrixSlice:
    """The columns of process ``rank`` of ``size``.

    Raises:
        UsageError: they do not start and end at tiles and rotation blocks.
    """
    columns = _share(name, "inputs", in_features, max(TILE_SIDE, rotation_block), size)
    return MatrixSlice(name, out_features, in_features, 0, out_features, rank * columns, columns)


def _share(name: str, what: str, width: int, unit: int, size: int) -> int:
    share, rest = divmod(width, size)
    if rest or share % unit:
        raise UsageError(
            f"{name} can't be cut for {size} tensor-parallel processes: each must hold a multiple of {unit} of "
            f"its {width} {what}; pass a --tensor-parallel-size that divides {width // unit}"
        )
    return share
