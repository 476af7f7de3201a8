"""The value of a state, computed and never looked up.

``value(s) = (sum of the four bytes of (0x83DCD12D * s mod 2^32)) - 510``. Four nearly independent uniform bytes
add up to a nearly Gaussian integer of mean 510 and standard deviation 147.8 (each byte has variance
(256^2 - 1) / 12). An integer is bit-identical on every machine; a GPU needs one multiplication and one dot
product with ones.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MULTIPLIER = 0x83DCD12D
BYTE_SUM_MEAN = 510

# Root mean square of the values over all 2^16 states: sqrt(4 * (256^2 - 1) / 12) = 147.8 in theory.
VALUE_RMS = 147.8

# A decoded weight is scale * value / VALUE_UNIT. The power of two keeps the quotient exact and the fp16 scales
# near the standard deviation of the weights, far from subnormal numbers.
VALUE_UNIT = 128


@lru_cache(maxsize=8)
def state_values(state_bits: int) -> NDArray[np.int16]:
    """Value of every state.

    Args:
        state_bits: L.

    Returns:
        (2^L,) int16, each within -510..510; read-only.
    """
    product = (np.arange(1 << state_bits, dtype=np.uint64) * MULTIPLIER) & 0xFFFFFFFF
    byte_sum = sum((product >> shift) & 0xFF for shift in (0, 8, 16, 24))
    values = (np.asarray(byte_sum).astype(np.int32) - BYTE_SUM_MEAN).astype(np.int16)
    values.flags.writeable = False
    return values
