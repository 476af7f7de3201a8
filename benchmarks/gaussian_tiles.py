"""Squared error of the code on a Gaussian source, at several codebook scales, and the speed of the search.

python benchmarks/gaussian_tiles.py --samples 1048576 --out benchmarks/results/gaussian_tiles.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, write_result

from ernieq.encode.scales import CODEBOOK_SCALE
from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import FULL_FIRST_PASS, SHORT_FIRST_PASS, encode_tiles
from ernieq.trellis import RATES, TILE_WEIGHTS, VALUE_RMS, TrellisCode, ring_states, state_values


def measure(
    code: TrellisCode, samples: int, scale: float, first_pass: int, backend: Backend, seed: int
) -> dict[str, Any]:
    """Mean squared error per unit variance, and weights a second."""
    tiles = max(1, samples // TILE_WEIGHTS)
    source = np.random.default_rng(seed).standard_normal((tiles, TILE_WEIGHTS)).astype(np.float32)
    targets = source * np.float32(VALUE_RMS / scale)
    started = time.perf_counter()
    symbols = encode_tiles(targets, code, first_pass_steps=first_pass, backend=backend)
    seconds = time.perf_counter() - started
    values = state_values(code.state_bits)[ring_states(symbols, code)].astype(np.float64)
    error = float(np.square(values * (scale / VALUE_RMS) - source).mean())
    return {
        "bits_per_weight": code.bits_per_weight,
        "state_bits": code.state_bits,
        "codebook_scale": scale,
        "first_pass_steps": first_pass,
        "backend": str(backend),
        "samples": tiles * TILE_WEIGHTS,
        "mse": error,
        "rate_distortion_bound": 4.0**-code.bits_per_weight,
        "weights_per_second": tiles * TILE_WEIGHTS / seconds,
    }


def main() -> None:
    """Measure every rate at full length, then the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1 << 20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true", help="also try codebook scales around the default")
    arguments = parser.parse_args()
    rows = []

    def add(
        code: TrellisCode,
        samples: int,
        scale: float | None = None,
        first_pass: int = FULL_FIRST_PASS,
        backend: Backend = Backend.AUTO,
    ) -> None:
        scale = CODEBOOK_SCALE[code.bits_per_weight] if scale is None else scale
        row = measure(code, samples, scale, first_pass, backend, seed=1)
        rows.append(row)
        print(
            f"K={row['bits_per_weight']} L={row['state_bits']} scale={row['codebook_scale']:.2f} "
            f"first pass={row['first_pass_steps']} {row['backend']}: mse {row['mse']:.4g} "
            f"({row['mse'] / row['rate_distortion_bound']:.3f} x bound), "
            f"{row['weights_per_second']:,.0f} weights/s",
            flush=True,
        )

    for bits in RATES:
        add(TrellisCode(bits), arguments.samples)
        if arguments.sweep:
            for change in (-0.06, -0.03, 0.03, 0.06):
                add(TrellisCode(bits), arguments.samples // 4, scale=CODEBOOK_SCALE[bits] + change)
    add(TrellisCode(2), arguments.samples // 4, first_pass=SHORT_FIRST_PASS)
    add(TrellisCode(2, 12), arguments.samples)
    add(TrellisCode(2), arguments.samples // 8, backend=Backend.AVX2)
    add(TrellisCode(2), arguments.samples // 64, backend=Backend.SCALAR)
    if arguments.out:
        command = "python benchmarks/gaussian_tiles.py --samples 1048576 --out FILE"
        write_result(arguments.out, {"machine": describe_machine(), "command": command, "rows": rows})


if __name__ == "__main__":
    main()
