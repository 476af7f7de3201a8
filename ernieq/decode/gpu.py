"""Products with packed matrices on a GPU: which kernel runs for how many rows.

A few rows are multiplied while the tiles are decoded; many pay for decoding a chunk of the matrix to float16,
which tensor cores multiply. Inputs are float16 with a power of two per row, sums and results float32.

The kernels are imported when they are first called: a machine without a GPU never needs them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ernieq.trellis import TILE_SIDE, TrellisCode

if TYPE_CHECKING:
    from ernieq.kernels.token_step.cuda import Rotated

# Up to this many rows are multiplied while decoding.
FUSED_ROWS = 64

# Decoded float16 weights held at a time.
BUFFER_BYTES = 256_000_000

_HALF_BYTES = 2


def words_of(packed: Tensor, device: torch.device) -> Tensor:
    """Packed tiles (..., 16 K) int16 as the words that the kernels read: (..., 8 K) int32 on the device."""
    from ernieq.kernels.trellis_matmul import cuda

    return cuda.to_words(packed.to(device))


def packed_of(words: Tensor) -> Tensor:
    """Inverse of ``words_of``, on the device of the words: (..., 8 K) int32 -> (..., 16 K) int16."""
    pairs = (words << 16) | ((words >> 16) & 0xFFFF)  # the first unit, which has the high bits, comes first
    return pairs.view(torch.int16)


def empty_rotated(rows: int, width: int, device: torch.device) -> Rotated:
    """Room for rotated inputs: (rows, width) float16 and (rows,) float32."""
    from ernieq.kernels.token_step.cuda import Rotated

    return Rotated(
        torch.empty(rows, width, dtype=torch.float16, device=device), torch.empty(rows, device=device)
    )


def rotate_half(x: Tensor, signs: Tensor, block: int) -> Rotated:
    """Rotate rows: (N, C) float32, contiguous -> float16 with a scale per row."""
    from ernieq.kernels.token_step import cuda

    out = empty_rotated(x.shape[0], x.shape[1], x.device)
    if x.shape[0]:
        cuda.rotate(x, signs, block, out)
    return out


def silu_mul_rotate(gate_up: Tensor, signs: Tensor, block: int) -> Rotated:
    """The rotated input of the down matrix, (N, I), from gate and up side by side, (N, 2 I) float32."""
    from ernieq.kernels.token_step import cuda

    out = empty_rotated(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.device)
    if gate_up.shape[0]:
        cuda.silu_mul_rotate(gate_up, signs, block, out)
    return out


def halve(x: Tensor) -> Rotated:
    """As ``rotate_half``, for rows that are rotated already: (N, C) float32."""
    from ernieq.kernels.token_step.cuda import Rotated

    # By the bits: torch.ldexp runs on the current GPU, wherever its tensors are (torch 2.11; its issue 189567).
    exponents = x.abs().amax(dim=1).view(torch.int32) >> 23
    scale = ((exponents.clamp(20, 250) - 3) << 23).view(torch.float32)  # (N,), the largest becomes 8 to 16
    return Rotated((x / scale[:, None]).half(), scale)


def decode_exactly(words: Tensor, scale: Tensor, code: TrellisCode) -> Tensor:
    """Rotated rows: words (R / 16, C / 16, 8 K), scale (R,) -> (R, C) float32, the same bits as on the CPU."""
    from ernieq.kernels.trellis_matmul import cuda

    return cuda.decode(words.contiguous(), scale.contiguous(), code, dtype=torch.float32)


def multiply(inputs: Rotated, words: Tensor, scale: Tensor, code: TrellisCode) -> Tensor:
    """Product of rotated inputs and a matrix.

    Args:
        inputs: N rows of width C.
        words: (R / 16, C / 16, 8 K) int32.
        scale: (R,) float16.
        code: the trellis code of the tiles.

    Returns:
        (N, R) float32.
    """
    from ernieq.kernels.trellis_matmul import cuda

    count, width = inputs.x.shape
    if count <= FUSED_ROWS:
        if not count:
            return torch.empty(0, scale.shape[0], device=scale.device)
        return cuda.multiply(inputs.x, inputs.scale, words, scale, code)
    bands = words.shape[0]
    step = max(1, BUFFER_BYTES // (_HALF_BYTES * TILE_SIDE * width))
    out = torch.empty(count, bands * TILE_SIDE, device=words.device)
    buffer = torch.empty(min(step, bands) * TILE_SIDE, width, dtype=torch.float16, device=words.device)
    for first in range(0, bands, step):
        some = words[first : first + step]
        rows = slice(first * TILE_SIDE, (first + some.shape[0]) * TILE_SIDE)
        weights = buffer[: rows.stop - rows.start]
        cuda.decode(some, scale[rows], code, out=weights, dtype=torch.float16)
        out[:, rows] = half_product(inputs.x, weights)
    return out.mul_(inputs.scale[:, None])


def half_product(x: Tensor, weights: Tensor) -> Tensor:
    """``x @ weights.T`` of float16 matrices, summed and returned in float32: (N, C), (R, C) -> (N, R)."""
    if x.is_cuda:
        return torch.mm(x, weights.T, out_dtype=torch.float32)
    return x.float() @ weights.float().T  # torch has no such product on the CPU


def experts_at_a_time(weights_per_expert: int) -> int:
    """Experts whose decoded float16 weights fit into the buffer; at least one."""
    return max(1, math.floor(BUFFER_BYTES / (_HALF_BYTES * weights_per_expert)))
