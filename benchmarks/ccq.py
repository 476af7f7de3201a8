"""The yardstick of ours: squared error of Baidu's 2-bit code (WINT2, CCQ) on a Gaussian source, at its best.

A byte stands for four weights; all 256 are tried for every four, so the search is exhaustive, and the two
numbers that make the codebook are themselves searched for. Scales are as in the files: 4 bits for 64 inputs.
What is measured is what `ernieq.checkpoint.wint2` decodes from the tensors of a file.

    python benchmarks/ccq.py --out benchmarks/results/ccq.json
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, write_result
from numpy.typing import NDArray

from ernieq.checkpoint.wint2 import GROUP, decode_wint2

Array = NDArray[np.float32]
SHIFTS = np.array([9, 6, 3, 0])
BITS = 2 + 4 / GROUP
SEARCHED_QUADS = 4096
MIDDLE_NIBBLE = 9  # of the 15 that a group may take


@dataclass(frozen=True)
class Codebook:
    """The 256 words of four weights that ``code_scale`` and ``code_zp`` make, and the step between integers."""

    code_scale: float
    code_zp: float
    step: float

    def words(self) -> Array:
        """(256, 4) integers."""
        scale, zero_point = np.float32(self.code_scale), np.float32(self.code_zp)
        codes = np.floor(np.arange(256, dtype=np.float32) * scale + zero_point + np.float32(0.5))
        words: Array = (((codes.astype(np.int64)[:, None] >> SHIFTS) & 63) - 32).astype(np.float32)
        return words


def nearest(quads: Array, words: Array) -> tuple[NDArray[np.int64], Array]:
    """The word nearest to each four weights, and its squared error."""
    distances = np.square(words).sum(axis=1) - 2 * quads @ words.T  # (quads, 256)
    chosen = distances.argmin(axis=1)
    return chosen, np.take_along_axis(distances, chosen[:, None], 1)[:, 0] + np.square(quads).sum(axis=1)


def error_of(codebook: Codebook, quads: Array) -> float:
    """Mean squared error of one scale for all."""
    return float(nearest(quads, codebook.words() * np.float32(codebook.step))[1].mean()) / 4


def best_codebook(quads: Array, candidates: int, seed: int) -> tuple[Codebook, float]:
    """Draw codebooks, keep the twenty best, and let each climb by small changes."""
    draw = np.random.default_rng(seed)
    found: list[tuple[float, Codebook]] = []
    for _ in range(candidates):
        scale = float(draw.uniform(1, 128))
        drawn = Codebook(scale, float(draw.uniform(0, 32767 - 255 * scale)), float(draw.uniform(0.05, 0.09)))
        found.append((error_of(drawn, quads[: SEARCHED_QUADS // 4]), drawn))
    kept = sorted(found, key=lambda pair: pair[0])[:20]
    climbed = [_climb(codebook, quads[:SEARCHED_QUADS], draw) for _, codebook in kept]
    return min(climbed, key=lambda pair: pair[1])


def _climb(codebook: Codebook, quads: Array, draw: np.random.Generator) -> tuple[Codebook, float]:
    error = error_of(codebook, quads)
    for size in np.geomspace(1, 0.01, 80):
        changed = Codebook(
            codebook.code_scale * float(1 + 0.02 * size * draw.standard_normal()),
            codebook.code_zp + float(500 * size * draw.standard_normal()),
            codebook.step * float(1 + 0.1 * size * draw.standard_normal()),
        )
        if (tried := error_of(changed, quads)) < error:
            codebook, error = changed, tried
    return codebook, error


def encode(weight: Array, codebook: Codebook) -> dict[str, torch.Tensor]:
    """Tensors of a file for a matrix (out, in), every group with its best scale of 4 bits."""
    out, width = weight.shape
    groups = weight.reshape(-1, GROUP)
    unit = np.float32(torch.tensor(codebook.step / MIDDLE_NIBBLE).to(torch.bfloat16).float())
    best = np.full(len(groups), np.inf, np.float32)
    nibbles, chosen = np.zeros(len(groups), np.uint8), np.zeros((len(groups), GROUP // 4), np.uint8)
    for nibble in range(MIDDLE_NIBBLE - 4, 16):
        index, errors = nearest(groups.reshape(-1, 4), codebook.words() * (nibble * unit))
        total = errors.reshape(len(groups), -1).sum(axis=1)
        better = total < best
        best[better], nibbles[better] = total[better], nibble
        chosen[better] = index.reshape(len(groups), -1)[better]
    scales = nibbles.reshape(out, -1, 2)
    return {
        "packed": torch.from_numpy(np.ascontiguousarray(chosen.reshape(out, width // 4).T)),
        "local_scale": torch.from_numpy(np.ascontiguousarray((scales[..., 0] << 4 | scales[..., 1]).T)),
        "super_scale": torch.full((out,), float(unit), dtype=torch.bfloat16),
        "code_scale": torch.full((out,), codebook.code_scale),
        "code_zp": torch.full((out,), codebook.code_zp),
    }


def measure(samples: int, candidates: int, seed: int) -> dict[str, Any]:
    """Search a codebook on one sample and measure it, file format and all, on another."""
    draw = np.random.default_rng(seed)
    codebook, searched = best_codebook(
        draw.standard_normal((SEARCHED_QUADS, 4)).astype(np.float32), candidates, seed
    )
    weight = draw.standard_normal((samples // 1024, 1024)).astype(np.float32)
    decoded = decode_wint2(**encode(weight, codebook)).numpy()
    return {
        "code_scale": codebook.code_scale,
        "code_zp": codebook.code_zp,
        "step": codebook.step,
        "bits_per_weight": BITS,
        "samples": weight.size,
        "mse_one_scale_while_searching": searched,
        "mse": float(np.square(decoded - weight).mean()),
        "rate_distortion_bound": 4.0**-BITS,
    }


def main() -> None:
    """Search with several seeds and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1 << 18)
    parser.add_argument("--candidates", type=int, default=3000, help="codebooks that are drawn for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        row = measure(arguments.samples, arguments.candidates, seed)
        rows.append(row)
        print(f"seed {seed}: {row['bits_per_weight']} bits, mse {row['mse']:.4f}", flush=True)
    if arguments.out:
        command = "python benchmarks/ccq.py --out FILE"
        write_result(arguments.out, {"machine": describe_machine(), "command": command, "rows": rows})


if __name__ == "__main__":
    main()
