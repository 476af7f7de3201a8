"""The one hand-over between the encoder and the packer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ernieq.errors import ShapeError
from ernieq.trellis.code import TrellisCode
from ernieq.trellis.codebook import VALUE_UNIT
from ernieq.trellis.ring import tile_values
from ernieq.trellis.tile import TILE_SIDE, tiles_to_matrix


@dataclass(frozen=True)
class EncodedMatrix:
    """A quantized weight matrix in the rotated basis of its input.

    The matrix stands for ``W = diag(scale) (values / 128) R`` with ``R = H diag(signs)``: input channels are
    multiplied by ``signs`` and then rotated by an orthonormal block Hadamard matrix of ``rotation_block``.

    Args:
        packed: (out_features / 16, in_features / 16, 16 K) int16, the rings of the tiles.
        scale: (out_features,) float16, per output channel.
        signs: (in_features,) int8, each +1 or -1.
        rotation_block: side of the Hadamard blocks; a power of two that divides in_features.
        code: the trellis code of the tiles.

    Raises:
        ShapeError: the parts do not fit together.
    """

    packed: NDArray[np.int16]
    scale: NDArray[np.float16]
    signs: NDArray[np.int8]
    rotation_block: int
    code: TrellisCode

    def __post_init__(self) -> None:
        row_tiles, column_tiles, units = self.packed.shape
        if units != self.code.units_per_tile:
            raise ShapeError(
                f"packed tiles have {units} units; {self.code} calls for {self.code.units_per_tile}"
            )
        if self.scale.shape != (row_tiles * TILE_SIDE,):
            raise ShapeError(f"scale has shape {self.scale.shape}; expected ({row_tiles * TILE_SIDE},)")
        if self.signs.shape != (column_tiles * TILE_SIDE,):
            raise ShapeError(f"signs have shape {self.signs.shape}; expected ({column_tiles * TILE_SIDE},)")
        if self.rotation_block & (self.rotation_block - 1) or self.in_features % self.rotation_block:
            raise ShapeError(
                f"rotation block {self.rotation_block} is not a power of two that divides {self.in_features}"
            )

    @property
    def out_features(self) -> int:
        """Number of output channels (rows)."""
        return int(self.packed.shape[0]) * TILE_SIDE

    @property
    def in_features(self) -> int:
        """Number of input channels (columns)."""
        return int(self.packed.shape[1]) * TILE_SIDE

    def rotated_weight(self) -> NDArray[np.float32]:
        """Decode in the rotated basis: (out_features, in_features) float32, exact (no rounding occurs)."""
        values = tiles_to_matrix(tile_values(self.packed, self.code)).astype(np.float32)
        return values * (self.scale.astype(np.float32)[:, None] / np.float32(VALUE_UNIT))
