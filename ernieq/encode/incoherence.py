"""Incoherence: random signs and a block Hadamard rotation of the input side of a matrix.

Source: QuIP# (arXiv 2402.04396), randomized Hadamard transform. The rotation spreads outliers over a block of
channels, so that weights look Gaussian to the code. Only the input side is rotated: docs/decisions.md has the
measurement that the output side buys nothing here.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.kernels.hadamard import rotate

MAX_ROTATION_BLOCK = 128


def rotation_block(width: int) -> int:
    """Largest power of two that divides ``width``, at most 128 (2560 -> 128, 576 -> 64, 48 -> 16)."""
    return min(width & -width, MAX_ROTATION_BLOCK)


def input_signs(seed: int, group: str, width: int) -> NDArray[np.int8]:
    """Random signs of the input channels of a projection group.

    Args:
        seed: seed of the recipe.
        group: name of the input that the projections read ("model.layers.3.mlp.input"); matrices that read the
            same input must share the rotation.
        width: number of channels.

    Returns:
        (width,) int8 of +1 and -1, a function of the arguments alone.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-width // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:width]
    return (1 - 2 * bits.astype(np.int8)).astype(np.int8)


def rotate_hessian(hessian: Tensor, signs: Tensor, block: int) -> Tensor:
    """R H R^T for a symmetric (width, width) float32 Hessian, in the basis that is really quantized."""
    half = rotate(hessian.contiguous(), signs, block)
    return rotate(half.T.contiguous(), signs, block)


def symmetric(matrix: Tensor) -> Tensor:
    """Remove the rounding asymmetry that the rotation of the two sides leaves."""
    return torch.add(matrix, matrix.T).mul_(0.5)
