"""The ring of bits of a tile: symbols, packed units, states, values.

The ring holds 256 K bits, the first symbol's high bit first. Sixteen consecutive bits make a unit, first bit
highest; a tile is 16 K units. The state of weight t is the L bits that end at bit (t + 1) K, wrapping around,
so any bit string is a legal tile and nothing is stored beside the ring.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernieq.trellis.code import TrellisCode
from ernieq.trellis.codebook import state_values
from ernieq.trellis.tile import TILE_WEIGHTS


def pack_symbols(symbols: NDArray[np.uint8], code: TrellisCode) -> NDArray[np.int16]:
    """Pack symbols into units: (..., 256) uint8 below 2^K -> (..., 16 K) int16."""
    bits = code.bits_per_weight
    shifts = np.arange(bits - 1, -1, -1, dtype=np.uint8)
    ring = (symbols[..., None] >> shifts) & 1  # (..., 256, K), high bit first
    packed_bytes = np.packbits(ring.reshape(*symbols.shape[:-1], TILE_WEIGHTS * bits), axis=-1)
    units = np.ascontiguousarray(packed_bytes).view(">u2").astype(np.uint16)
    return units.view(np.int16)


def unpack_symbols(packed: NDArray[np.int16], code: TrellisCode) -> NDArray[np.uint8]:
    """Inverse of ``pack_symbols``: (..., 16 K) int16 -> (..., 256) uint8."""
    bits = code.bits_per_weight
    packed_bytes = np.ascontiguousarray(packed).view(np.uint16).astype(">u2").view(np.uint8)
    ring = np.unpackbits(packed_bytes, axis=-1).reshape(*packed.shape[:-1], TILE_WEIGHTS, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    symbols: NDArray[np.uint8] = (ring * weights).sum(axis=-1, dtype=np.uint8)
    return symbols


def ring_states(symbols: NDArray[np.uint8], code: TrellisCode) -> NDArray[np.uint16]:
    """State of every weight: (..., 256) uint8 -> (..., 256) uint16."""
    states = np.zeros(symbols.shape, dtype=np.uint32)
    steps_back = -(-code.state_bits // code.bits_per_weight)
    for back in range(steps_back):
        states |= np.roll(symbols, back, axis=-1).astype(np.uint32) << (back * code.bits_per_weight)
    return (states & (code.states - 1)).astype(np.uint16)


def tile_values(packed: NDArray[np.int16], code: TrellisCode) -> NDArray[np.int16]:
    """Decode tiles to codebook values: (..., 16 K) int16 -> (..., 256) int16 in sequence order."""
    return state_values(code.state_bits)[ring_states(unpack_symbols(packed, code), code)]
