"""What the code loses at every rate: what allocation weighs against bytes, and what a checker expects."""

from __future__ import annotations

import math

# Mean squared error per unit variance of the trellis code, L = 16, over a million samples of a Gaussian source
# (benchmarks/gaussian_tiles.py, benchmarks/results/gaussian_rates.json); 16 keeps the source's own numbers.
SQUARED_ERROR: dict[float, float] = {
    1.5: 0.1369,
    2: 0.06822,
    2.5: 0.03447,
    3: 0.01737,
    3.5: 0.008795,
    4: 0.00445,
    4.5: 0.002251,
    5: 0.001146,
    5.5: 0.0005863,
    6: 0.0003001,
    7: 0.0000814,
    8: 0.0000218,
    16: 0.0,
}

# A sound encoder's error in the weights is 1.0 to 1.6 times the code's own: error feedback and fewer state bits
# add to it (docs/decisions.md has the figures). Where the target of a matrix was corrected toward the output of
# the original, the correction counts as error too; up to 0.37 of the norm was seen. Signs, a rotation or an
# order of rows that are wrong give 1.4, a scale that is twice too large 1.
_USUAL_FACTOR = 2.0
_LARGEST_CORRECTION = 0.5


def usual_relative_error(bits: float) -> float:
    """What the relative error of a matrix (Frobenius norms) stays below unless its target was corrected."""
    return _USUAL_FACTOR * math.sqrt(SQUARED_ERROR[bits])


def largest_relative_error(bits: float) -> float:
    """The relative error beyond which a matrix was encoded wrongly; never above 1, which zeros would reach."""
    return min(1.0, usual_relative_error(bits) + _LARGEST_CORRECTION)
