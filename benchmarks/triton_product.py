"""The product of one token with a 2-bit matrix in Triton: what the CUDA C++ kernels are compared with.

Triton can't hand a lane the registers of a tensor-core operand that it has decoded itself, so the tile is
decoded as a tensor and summed without them.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _product(x, words, scale, out, columns: tl.constexpr, ahead: tl.constexpr):  # type: ignore[no-untyped-def]
    row_tile = tl.program_id(0)
    lane = tl.arange(0, 32)[None, :, None]
    weight = tl.arange(0, 8)[None, None, :]
    tile = tl.arange(0, ahead)[:, None, None]
    total = tl.zeros((32, 8), dtype=tl.float32)
    ring = words + row_tile * (columns // 16) * 16
    last = (16 * (lane + 1) - 1) // 32
    before = (last + 15) % 16
    column = 2 * (lane % 4) + weight % 2 + 8 * (weight // 4)
    for first in range(0, columns // 16, ahead):
        low = tl.load(ring + (first + tile) * 16 + last).to(tl.uint32, bitcast=True)
        high = tl.load(ring + (first + tile) * 16 + before).to(tl.uint32, bitcast=True)
        wide = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        window = (wide >> (16 * ((lane + 1) % 2)).to(tl.uint64)).to(tl.uint32)
        state = (window >> ((7 - weight) * 2).to(tl.uint32)) & 0xFFFF
        product = state * 0x83DCD12D
        value = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0;", "=r,r", [product], dtype=tl.int32, is_pure=True, pack=1
        )
        inputs = tl.load(x + (first + tile) * 16 + column).to(tl.float32)
        total += tl.sum((value - 510).to(tl.float32) * inputs, axis=0)
    by_row = tl.reshape(total, (8, 4, 2, 2, 2))  # lane / 4, lane % 4, j / 4, j / 2 % 2, j % 2
    sums = tl.sum(tl.sum(tl.sum(by_row, axis=4), axis=2), axis=1)  # (8, 2)
    row = row_tile * 16 + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]
    tl.store(out + row, sums * tl.load(scale + row).to(tl.float32) / 128)


def multiply(x: Tensor, words: Tensor, scale: Tensor, ahead: int, warps: int) -> Tensor:
    """One token: x (1, columns) float16, words (1, rows / 16, columns / 16, 16) int32 -> (rows,) float32."""
    rows = scale.shape[1]
    out = torch.empty(rows, dtype=torch.float32, device=x.device)
    _product[(rows // 16,)](x, words, scale, out, x.shape[1], ahead, num_warps=warps)
    return out
