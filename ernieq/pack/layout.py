"""Names and shapes of a packed matrix's tensors; how input signs become bits.

The numbers here are those of FORMAT.md; it says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.errors import FormatError, UsageError
from ernieq.trellis import TILE_SIDE, TrellisCode

FORMAT_VERSION = "0.2"
# Version 0.1 is the same but for its rates, which are whole numbers from 2 to 6.
READABLE_VERSIONS = ("0.1", FORMAT_VERSION)
WHOLE_RATES_VERSION, WHOLE_RATES = "0.1", (2, 3, 4, 5, 6)
QUANT_METHOD = "ernieq"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "ernieq.json"
CARD_NAME = "README.md"

PACKED_SUFFIX = ".weight_packed"
SCALE_SUFFIX = ".weight_scale"
SIGNS_SUFFIX = ".weight_signs"
PACKED_SUFFIXES = (PACKED_SUFFIX, SCALE_SUFFIX, SIGNS_SUFFIX)

# A token is rotated in blocks of at most this many channels, so that tensor-parallel slices keep whole blocks.
MAX_ROTATION_BLOCK = 128


@dataclass(frozen=True)
class ModuleSpec:
    """How one matrix is quantized: its trellis code and the side of its Hadamard blocks."""

    code: TrellisCode
    rotation_block: int


def read_code(bits: object, state_bits: object, what: str) -> TrellisCode:
    """The trellis code of two numbers found in a file.

    Raises:
        FormatError: bits is no number, state_bits no integer, or one of them is out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | float) or type(state_bits) is not int:
        raise FormatError(
            f"{what} has bits {str(bits)[:20]!a} and state_bits {str(state_bits)[:20]!a}, "
            "not a number and an integer"
        )
    try:
        return TrellisCode(bits, state_bits)
    except UsageError as error:
        raise FormatError(f"{what}: {error}") from None


def check_rotation_block(block: object, what: str) -> int:
    """Return the block if it is a power of two from 1 to 128.

    Raises:
        FormatError: it is anything else.
    """
    if type(block) is not int or not 1 <= block <= MAX_ROTATION_BLOCK or block & (block - 1):
        raise FormatError(
            f"{what} has rotation block {str(block)[:20]!a}; allowed are powers of two to {MAX_ROTATION_BLOCK}"
        )
    return block


def packed_shape(out_features: int, in_features: int, code: TrellisCode) -> tuple[int, int, int]:
    """Shape of ``weight_packed``: (out_features / 16, in_features / 16, 16 K)."""
    return out_features // TILE_SIDE, in_features // TILE_SIDE, code.units_per_tile


def pack_signs(signs: NDArray[np.int8]) -> NDArray[np.uint8]:
    """One bit per channel: (in_features,) int8 of +-1 -> (in_features / 8,) uint8; a set bit negates."""
    return np.packbits(signs < 0, bitorder="little")


def unpack_signs(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of ``pack_signs``: (in_features / 8,) uint8 -> (in_features,) int8 of +-1."""
    return (1 - 2 * np.unpackbits(packed, bitorder="little").view(np.int8)).astype(np.int8)


def little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """The elements of an array as they are stored."""
    stored = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return stored.reshape(-1).view(np.uint8).data
