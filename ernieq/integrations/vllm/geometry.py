"""The matrices that lie behind each other in one merged layer, as numbers that an operator can be given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ernieq.trellis import TILE_SIDE, TrellisCode

_NUMBERS = 5


@dataclass(frozen=True)
class MatrixPart:
    """One packed matrix of a merged layer.

    Args:
        rows: output channels; a multiple of 16.
        columns: input channels; the same for all parts of a layer.
        code: the trellis code of its tiles.
        rotation_block: side of the Hadamard blocks of its input.
    """

    rows: int
    columns: int
    code: TrellisCode
    rotation_block: int

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(rows / 16, columns / 16, 16 K)."""
        return self.rows // TILE_SIDE, self.columns // TILE_SIDE, self.code.units_per_tile

    @property
    def units(self) -> int:
        """16-bit units of all its tiles."""
        bands, columns, units = self.tile_shape
        return bands * columns * units

    def numbers(self) -> list[int]:
        """The part as integers; ``read_parts`` is the inverse."""
        return [self.rows, self.columns, self.code.pair_bits, self.code.state_bits, self.rotation_block]


def part_numbers(parts: Sequence[MatrixPart]) -> list[int]:
    """All parts as one list of integers."""
    return [number for part in parts for number in part.numbers()]


def read_parts(numbers: Sequence[int]) -> list[MatrixPart]:
    """Inverse of ``part_numbers``."""
    parts = []
    for start in range(0, len(numbers), _NUMBERS):
        rows, columns, pair_bits, state_bits, block = numbers[start : start + _NUMBERS]
        parts.append(MatrixPart(rows, columns, TrellisCode(pair_bits / 2, state_bits), block))
    return parts


def part_tiles(tiles: Tensor, parts: Sequence[MatrixPart]) -> list[Tensor]:
    """The tiles of each part, views of one flat tensor.

    Args:
        tiles: flat: int16 units, or int32 words of two units.
        parts: what lies in it.

    Returns:
        Of each part (rows / 16, columns / 16, 16 K), or 8 K for words.
    """
    units_per_element = tiles.element_size() // 2
    views, start = [], 0
    for part in parts:
        bands, columns, units = part.tile_shape
        length = part.units // units_per_element
        views.append(tiles[start : start + length].view(bands, columns, units // units_per_element))
        start += length
    return views


def part_rows(parts: Sequence[MatrixPart]) -> list[slice]:
    """Where each part's output channels lie in the layer's."""
    slices, start = [], 0
    for part in parts:
        slices.append(slice(start, start + part.rows))
        start += part.rows
    return slices
