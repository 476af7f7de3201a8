"""The ring of bits of a tile: symbols, packed units, states, values.

The ring holds 256 K bits, the first symbol's high bit first. Sixteen consecutive bits make a unit, first bit
highest; a tile is 16 K units. The symbol of weight t has ``shifts[t % 2]`` bits and ends at bit
``(t // 2) * 2 K + (floor(K) if t is even else 2 K)``; the state is the L bits that end there, wrapping around,
so any bit string is a legal tile and nothing is stored beside the ring.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernieq.trellis.code import TrellisCode
from ernieq.trellis.codebook import state_values
from ernieq.trellis.tile import TILE_WEIGHTS

_PAIRS = TILE_WEIGHTS // 2


def pack_symbols(symbols: NDArray[np.uint8], code: TrellisCode) -> NDArray[np.int16]:
    """Pack symbols into units: (..., 256) uint8, each below 2^shift -> (..., 16 K) int16."""
    lead = symbols.shape[:-1]
    pairs = symbols.reshape(*lead, _PAIRS, 2)
    parts = [
        pairs[..., parity, None] >> _falling(bits) & 1  # (..., 128, shift), high bit first
        for parity, bits in enumerate(code.shifts)
    ]
    ring = np.concatenate(parts, axis=-1).reshape(*lead, _PAIRS * code.pair_bits)
    units = np.ascontiguousarray(np.packbits(ring, axis=-1)).view(">u2").astype(np.uint16)
    return units.view(np.int16)


def unpack_symbols(packed: NDArray[np.int16], code: TrellisCode) -> NDArray[np.uint8]:
    """Inverse of ``pack_symbols``: (..., 16 K) int16 -> (..., 256) uint8."""
    lead = packed.shape[:-1]
    packed_bytes = np.ascontiguousarray(packed).view(np.uint16).astype(">u2").view(np.uint8)
    ring = np.unpackbits(packed_bytes, axis=-1).reshape(*lead, _PAIRS, code.pair_bits)
    even, odd = code.shifts
    pairs = [
        (part << _falling(bits)).sum(axis=-1, dtype=np.uint8)  # (..., 128)
        for part, bits in ((ring[..., :even], even), (ring[..., even:], odd))
    ]
    return np.stack(pairs, axis=-1).reshape(*lead, TILE_WEIGHTS)


def ring_states(symbols: NDArray[np.uint8], code: TrellisCode) -> NDArray[np.uint16]:
    """State of every weight: (..., 256) uint8 -> (..., 256) uint16."""
    states = np.zeros(symbols.shape, dtype=np.uint32)
    shifts = np.tile(np.array(code.shifts, dtype=np.uint32), _PAIRS)
    above = np.zeros(TILE_WEIGHTS, dtype=np.uint32)  # bits of the state that are filled already
    back = 0
    while above.min() < code.state_bits:
        states |= np.roll(symbols, back, axis=-1).astype(np.uint32) << above
        above += np.roll(shifts, back)
        back += 1
    return (states & (code.states - 1)).astype(np.uint16)


def tile_values(packed: NDArray[np.int16], code: TrellisCode) -> NDArray[np.int16]:
    """Decode tiles to codebook values: (..., 16 K) int16 -> (..., 256) int16 in sequence order."""
    return state_values(code.state_bits)[ring_states(unpack_symbols(packed, code), code)]


def _falling(bits: int) -> NDArray[np.uint8]:
    """Places of the bits of a symbol, the highest first: (bits,)."""
    return np.arange(bits - 1, -1, -1, dtype=np.uint8)
