"""Tiles: a matrix cut into 16 x 16 blocks, and the order of the 256 weights in a block.

After the rotation any order codes equally well, so the order is chosen for the decoders: it is the order in
which the tensor-core instruction ``mma.m16n8k16`` wants its A operand. Lane ``t // 8`` (of 32) owns the eight
consecutive weights ``t``; with ``j = t % 8`` they lie at

    row    = lane // 4 + 8 * (j // 2 % 2)
    column = 2 * (lane % 4) + j % 2 + 8 * (j // 4)

so a GPU lane decodes its own operand registers from one short run of bits, and a vector of 16 CPU lanes covers
four rows by four columns, which keeps the partial sums of a product in vector registers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.errors import ShapeError

TILE_SIDE = 16
TILE_WEIGHTS = TILE_SIDE * TILE_SIDE


@lru_cache(maxsize=1)
def tile_order() -> NDArray[np.int64]:
    """Row-major position in the 16 x 16 tile of each weight of the sequence.

    Returns:
        (256,) int64, a permutation of 0..255: ``sequence = tile.reshape(256)[tile_order()]``; read-only.
    """
    lane, j = np.divmod(np.arange(TILE_WEIGHTS), 8)
    row = lane // 4 + 8 * (j // 2 % 2)
    column = 2 * (lane % 4) + j % 2 + 8 * (j // 4)
    order: NDArray[np.int64] = row * TILE_SIDE + column
    order.flags.writeable = False
    return order


def matrix_to_tiles(matrix: NDArray[Any]) -> NDArray[Any]:
    """Cut a matrix into tiles and put the weights of each in sequence order.

    Args:
        matrix: (rows, columns), both multiples of 16.

    Returns:
        (rows / 16, columns / 16, 256), same dtype.

    Raises:
        ShapeError: a side is not a multiple of 16.
    """
    rows, columns = matrix.shape
    if rows % TILE_SIDE or columns % TILE_SIDE:
        raise ShapeError(f"a {rows} x {columns} matrix can't be cut into tiles: sides must be multiples of 16")
    blocks = matrix.reshape(rows // TILE_SIDE, TILE_SIDE, columns // TILE_SIDE, TILE_SIDE).transpose(0, 2, 1, 3)
    flat = blocks.reshape(rows // TILE_SIDE, columns // TILE_SIDE, TILE_WEIGHTS)
    return flat[..., tile_order()]


def tiles_to_matrix(tiles: NDArray[Any]) -> NDArray[Any]:
    """Inverse of ``matrix_to_tiles``: (row tiles, column tiles, 256) -> (rows, columns)."""
    row_tiles, column_tiles, _ = tiles.shape
    flat = np.empty_like(tiles)
    flat[..., tile_order()] = tiles
    blocks = flat.reshape(row_tiles, column_tiles, TILE_SIDE, TILE_SIDE).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks.reshape(row_tiles * TILE_SIDE, column_tiles * TILE_SIDE))
