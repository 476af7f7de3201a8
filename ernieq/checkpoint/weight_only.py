"""Paddle's weight-only int8 and int4 matrices, which stand beside WINT2 in FastDeploy's files.

They are stored as the GPU's matrix kernel wants them (CUTLASS ``fpA_intB``, compute capability 8.0 and newer),
and are brought back into rows here. A row of the matrix is an output channel. Four changes were applied, which
are undone in turn:

1. Rows are interleaved: 2 of them at int8, 4 at int4, 64 inputs of each in turn.
2. Numbers are unsigned: 128 or 8 was added.
3. Inside a 32-bit word (4 or 8 numbers, lowest first) even elements come before odd ones.
4. Inside 16 (int8) or 32 (int4) inputs, eight apart were put side by side: 0 1 8 9 (16 17 24 25) 2 3 10 11 ...

WINT2.md says where this was read and what could not be checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTERLEAVED_INPUTS = 64
INT8_ROWS, INT4_ROWS = 2, 4


def decode_int8(stored: Tensor, scale: Tensor) -> Tensor:
    """Decode an int8 matrix.

    Args:
        stored: (out, in) int8 or uint8; in a multiple of 64, out of 2.
        scale: (out,) of any float dtype, per output channel.

    Returns:
        (out, in) float32.
    """
    unsigned = stored.contiguous().view(torch.uint8).reshape(-1)
    return _decode(unsigned, stored.shape[1], scale, rows=INT8_ROWS, word=4, middle=128)


def decode_int4(stored: Tensor, scale: Tensor) -> Tensor:
    """Decode an int4 matrix.

    Args:
        stored: (out / 2, in) int8 or uint8, two numbers a byte, the low nibble first; in a multiple of 64, out
            of 4.
        scale: (out,) of any float dtype, per output channel.

    Returns:
        (out, in) float32.
    """
    unsigned = stored.contiguous().view(torch.uint8).reshape(-1)
    nibbles = torch.stack((unsigned & 15, unsigned >> 4), dim=-1).reshape(-1)
    return _decode(nibbles, stored.shape[1], scale, rows=INT4_ROWS, word=8, middle=8)


def _decode(numbers: Tensor, width: int, scale: Tensor, *, rows: int, word: int, middle: int) -> Tensor:
    blocks = numbers.view(-1, width // _INTERLEAVED_INPUTS, rows, _INTERLEAVED_INPUTS)
    lines = blocks.transpose(1, 2).reshape(-1, width)  # (out, in)
    lines = lines.view(len(lines), -1, 4 * word)[:, :, _places(word)].reshape(-1, width)
    return (lines.float() - middle) * scale.float()[:, None]


def _places(word: int) -> list[int]:
    """Where each of ``4 * word`` inputs lies among as many stored numbers."""
    in_word = [element // 2 + element % 2 * word // 2 for element in range(word)]
    ordered = [word * (p % 8 // 2) + p % 2 + 2 * (p // 8) for p in range(4 * word)]
    return [place // word * word + in_word[place % word] for place in ordered]
