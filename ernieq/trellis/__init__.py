"""The trellis code: states, transitions, values, and the order of weights in a tile.

Source: QTIP (arXiv 2406.11235), bitshift trellis with a computed code. This package is the only home of the
code's constants. It computes with numpy and knows nothing of models or files.

Notation of the papers, and the words used here:

======  ====================  ==========================================================================
letter  name                  meaning
======  ====================  ==========================================================================
L       ``state_bits``        bits of a state (16; 10 to 14 for quick tests)
K       ``bits_per_weight``   new bits shifted in per weight (2 to 6)
T       ``TILE_WEIGHTS``      weights in a tile, whose bits form a ring (256 = 16 x 16)
s       state                 the L bits of the ring that end with a weight's own K bits
j       node                  the low L - K bits of a state: what the next state inherits
d       dropped bits          the high K bits of a state: what the next state forgets
c       symbol                the K new bits of a weight
======  ====================  ==========================================================================
"""

from ernieq.trellis.code import MAX_BITS, MIN_BITS, TrellisCode
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
    "MAX_BITS",
    "MIN_BITS",
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
