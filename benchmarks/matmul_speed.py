"""Speed of the fused decode-and-multiply on this CPU, beside torch's float32 product of the same shape.

python benchmarks/matmul_speed.py --out benchmarks/results/matmul_speed.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, write_result

from ernieq.kernels.backend import default_threads
from ernieq.kernels.trellis_matmul import matmul
from ernieq.trellis import TrellisCode

ROWS, COLUMNS = 1536, 2560  # gate or up of one expert of the 21B model
REPEATS = 30


def seconds(call: Callable[[], object]) -> float:
    """Median time of a call after one to warm up."""
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(bits: int, tokens: int, threads: int) -> dict[str, Any]:
    """Weights a second at one rate and number of tokens, packed and plain."""
    code = TrellisCode(bits)
    generator = torch.Generator().manual_seed(bits)
    shape = (ROWS // 16, COLUMNS // 16, code.units_per_tile)
    packed = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    scale = torch.rand(ROWS, generator=generator).half()
    inputs = torch.randn(tokens, COLUMNS, generator=generator)
    dense = torch.randn(ROWS, COLUMNS, generator=generator)
    torch.set_num_threads(threads)
    fused = seconds(lambda: matmul(inputs, packed, scale, code, threads=threads))
    plain = seconds(lambda: inputs @ dense.T)
    return {
        "bits_per_weight": bits,
        "tokens": tokens,
        "threads": threads,
        "packed_weights_per_second": ROWS * COLUMNS / fused,
        "packed_code_bytes_per_second": ROWS * COLUMNS * bits / 8 / fused,
        "float32_weights_per_second": ROWS * COLUMNS / plain,
        "times_faster_than_float32": plain / fused,
    }


def main() -> None:
    """Measure a grid and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for threads in sorted({1, default_threads()}):
        for bits in (2, 3, 4):
            for tokens in (1, 8, 64):
                row = measure(bits, tokens, threads)
                rows.append(row)
                print(
                    f"K={bits} tokens={tokens} threads={threads}: "
                    f"{row['packed_weights_per_second'] / 1e9:.2f} G weights/s packed, "
                    f"{row['float32_weights_per_second'] / 1e9:.2f} G float32",
                    flush=True,
                )
    if arguments.out:
        command = "python benchmarks/matmul_speed.py --out FILE"
        write_result(arguments.out, {"machine": describe_machine(), "command": command, "rows": rows})


if __name__ == "__main__":
    main()
