"""Products with many rows: a part of the matrix is decoded to float16, and torch multiplies.

Shapes: N rows, C input channels, R output channels, I inner width of an MLP.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ernieq.decode import gpu
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.runtime.plan import GatedPlan, ModelPlan, PackedMatrix, Product, Rotation
from ernieq.trellis import TILE_SIDE

# Up to this many rows the fused kernel decodes as it multiplies.
FUSED_ROWS = 128

# Decoded weights held at a time: at most 200 MB of float16.
_DECODED_WEIGHTS = 100 << 20

# Numbers of an MLP's inner activations held at a time: 24 MB of float16 and 48 MB of float32 beside them.
INNER_NUMBERS = 12 << 20


class DecodingBuffer:
    """The one place where weights are decoded to; what was there before is lost."""

    def __init__(self, plan: ModelPlan, device: torch.device) -> None:
        matrices = [part for layer in plan.layers for part in _parts(layer.gated, layer.qkv, layer.output)]
        whole = max((matrix.rows * matrix.columns for matrix in matrices), default=0)
        self._half = torch.empty(min(_DECODED_WEIGHTS, whole), dtype=torch.float16, device=device)

    def decoded(self, matrix: PackedMatrix) -> Iterator[tuple[Tensor, int]]:
        """Parts of a matrix from its top: (rows, C) float16 and the first row; one at a time is there."""
        step = max(self._half.numel() // matrix.columns // TILE_SIDE, 1) * TILE_SIDE
        for start in range(0, matrix.rows, step):
            stop = min(start + step, matrix.rows)
            out = self._half[: (stop - start) * matrix.columns].view(-1, matrix.columns)
            words = matrix.words[start // TILE_SIDE : stop // TILE_SIDE]
            matmul.decode(words, matrix.scale[start:stop], matrix.code, out=out)
            yield out, start


def rotate(x: Tensor, rotation: Rotation) -> Rotated:
    """(N, C) float32 -> the rotated rows in float16, each with its scale."""
    return gpu.rotate_half(x, rotation.signs, rotation.block)


def multiply(product: Product, rotated: Rotated, buffer: DecodingBuffer) -> Tensor:
    """(N, C) -> (N, R) float32, bias included."""
    rows = rotated.x.shape[0]
    out = torch.empty(rows, product.rows, device=rotated.x.device)
    if rows <= FUSED_ROWS and len(product.parts) == 1:
        part = product.parts[0]
        matmul.multiply(*rotated, part.words, part.scale, part.code, out=out)
    elif rows <= FUSED_ROWS:
        parts = [matmul.multiply(*rotated, part.words, part.scale, part.code) for part in product.parts]
        torch.cat(parts, dim=1, out=out)
    else:
        half = torch.empty(rows, product.rows, dtype=torch.float16, device=out.device)
        first = 0
        for part in product.parts:
            for weights, start in buffer.decoded(part):
                place = slice(first + start, first + start + weights.shape[0])
                torch.mm(rotated.x, weights.T, out=half[:, place])
            first += part.rows
        torch.mul(half, rotated.scale[:, None], out=out)
    return out if product.bias is None else out.add_(product.bias)


def run_gated(gated: GatedPlan, rotated: Rotated, buffer: DecodingBuffer) -> Tensor:
    """An MLP over all rows: (N, H) rotated -> (N, H) float32, in parts that bound the inner activations."""
    rows = rotated.x.shape[0]
    out = torch.empty(rows, gated.down.rows, device=rotated.x.device)
    step = max(INNER_NUMBERS // gated.gate_up.rows, 1)
    for start in range(0, rows, step):
        part = Rotated(rotated.x[start : start + step], rotated.scale[start : start + step])
        inner = multiply(gated.gate_up, part, buffer)
        activated = activate(inner, gated.down.rotation)
        del inner
        out[start : start + step] = multiply(gated.down, activated, buffer)
    return out


def activate(gate_up: Tensor, rotation: Rotation) -> Rotated:
    """(N, 2 I) float32 -> the input of ``down``, (N, I), rotated."""
    return gpu.silu_mul_rotate(gate_up, rotation.signs, rotation.block)


def _parts(gated: GatedPlan | None, *products: Product) -> list[PackedMatrix]:
    mlp = [] if gated is None else [gated.gate_up, gated.down]
    return [part for product in (*products, *mlp) for part in product.parts]
