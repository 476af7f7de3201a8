"""The trellis code: states, transitions, values, and the order of weights in a tile.

Source: QTIP (arXiv 2406.11235), bitshift trellis with a computed code. This package is the only home of the
code's constants. It computes with numpy and knows nothing of models or files.

Notation of the papers, and the words used here:

======  ====================  ==========================================================================
letter  name                  meaning
======  ====================  ==========================================================================
L       ``state_bits``        bits of a state (16; 10 to 14 for quick tests)
K       ``bits_per_weight``   new bits per weight: 1.5 to 6 in halves, 7 or 8
..      ``pair_bits``         2 K, the bits of a pair of weights (2i, 2i + 1)
..      ``shifts``            bits that even and odd weights shift in: floor(K), ceil(K)
T       ``TILE_WEIGHTS``      weights in a tile, whose bits form a ring (256 = 16 x 16)
s       state                 the L bits of the ring that end with a weight's own bits
j       node                  the low bits of a state that the next state inherits: L less the next shift
d       dropped bits          the high bits of a state that the next state forgets: as many as it shifts in
c       symbol                the new bits of a weight, ``shifts[t % 2]`` of them for weight t
======  ====================  ==========================================================================
"""

from ernieq.trellis.code import RATES, RATES_IN_WORDS, TrellisCode
from ernieq.trellis.codebook import VALUE_RMS, VALUE_UNIT, state_values
from ernieq.trellis.encoded import EncodedMatrix
from ernieq.trellis.ring import pack_symbols, ring_states, tile_values, unpack_symbols
from ernieq.trellis.tile import (
    TILE_SIDE,
    TILE_WEIGHTS,
    matrix_to_tiles,
    tile_order,
    tiles_to_matrix,
)

__all__ = [
    "RATES",
    "RATES_IN_WORDS",
    "TILE_SIDE",
    "TILE_WEIGHTS",
    "VALUE_RMS",
    "VALUE_UNIT",
    "EncodedMatrix",
    "TrellisCode",
    "matrix_to_tiles",
    "pack_symbols",
    "ring_states",
    "state_values",
    "tile_order",
    "tile_values",
    "tiles_to_matrix",
    "unpack_symbols",
]
