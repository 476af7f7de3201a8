"""One matrix at the 21B model's shape: what the rate and the order of blocks do to its proxy error.

    python benchmarks/single_matrix.py --out benchmarks/results/single_matrix.json

Rows of a gate (2560 inputs) and of a down (1536 inputs) of a synthetic expert, with the Hessians of synthetic
hidden states (``synthetic_layer.py``). The proxy error is tr(E H E^T) / tr(W H W^T).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, write_result
from synthetic_layer import Shape, hidden_states
from torch import Tensor
from torch.nn.functional import silu

from ernieq.encode import EncodeOptions, encode_matrices, input_signs
from ernieq.trellis import TrellisCode

RATES = (1.5, 2, 2.5, 3, 3.5, 4)
CPU = torch.device("cpu")


def inputs_of(shape: Shape, windows: int, length: int) -> dict[str, Tensor]:
    """Inputs of an expert's gate, and of its down, for all tokens."""
    draw = torch.Generator().manual_seed(2)
    hidden = hidden_states(shape, windows, length, CPU).reference.float().flatten(0, 1)
    hidden /= hidden.square().mean(dim=1, keepdim=True).sqrt()
    gate, up = (
        torch.randn(shape.expert_width, shape.hidden, generator=draw) / shape.hidden**0.5 for _ in range(2)
    )
    return {"gate": hidden, "down": silu(hidden @ gate.T) * (hidden @ up.T)}


def measure(name: str, inputs: Tensor, rows: int) -> list[dict[str, Any]]:
    """Proxy errors of a random matrix at every rate, its blocks in natural order and in their own."""
    width = inputs.shape[1]
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) / width**0.5
    hessian, signs = inputs.T @ inputs / len(inputs), input_signs(0, name, width)
    found = []
    for rate in RATES:
        natural, ordered = (
            encode_matrices(
                {name: weight}, hessian, signs, TrellisCode(rate), EncodeOptions(order_blocks=order)
            )[name].proxy_error
            for order in (False, True)
        )
        row = {
            "matrix": name,
            "width": width,
            "rows": rows,
            "bits": rate,
            "natural": natural,
            "ordered": ordered,
        }
        print(
            f"{name} {rate:g} bits: {natural:.6f}, in order {ordered:.6f} ({ordered / natural:.3f})", flush=True
        )
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    inputs = inputs_of(Shape(), arguments.windows, arguments.length)
    rows = [row for name in inputs for row in measure(name, inputs[name], arguments.rows)]
    if arguments.out:
        command = "python benchmarks/single_matrix.py --out FILE"
        write_result(arguments.out, {"machine": describe_machine(), "command": command, "rows": rows})


if __name__ == "__main__":
    main()
