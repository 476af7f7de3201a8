"""What the code loses at every rate: what allocation weighs against bytes."""

from __future__ import annotations

# Mean squared error per unit variance of the trellis code, L = 16, on a Gaussian source
# (benchmarks/gaussian_tiles.py, benchmarks/results/gaussian_tiles.json); 16 keeps the source's own numbers.
SQUARED_ERROR: dict[float, float] = {
    1.5: 0.134,
    2: 0.0682,
    2.5: 0.0344,
    3: 0.01737,
    3.5: 0.0089,
    4: 0.00445,
    4.5: 0.0023,
    5: 0.00115,
    5.5: 0.0006,
    6: 0.00031,
    7: 0.00008,
    8: 0.00002,
    16: 0.0,
}
