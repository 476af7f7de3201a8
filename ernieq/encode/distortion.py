"""What the code loses at every rate: what allocation weighs against bytes."""

from __future__ import annotations

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
