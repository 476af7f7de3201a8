"""The slow truth of the rotation: an explicit Hadamard matrix, multiplied in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(side: int) -> Tensor:
    """Orthonormal Hadamard matrix in Sylvester order.

    Args:
        side: a power of two.

    Returns:
        (side, side) float64, symmetric.
    """
    index = torch.arange(side)
    common_ones = torch.zeros(side, side, dtype=torch.int64)
    for bit in range(side.bit_length()):
        common_ones += (index[:, None] >> bit & 1) * (index[None, :] >> bit & 1)
    matrix: Tensor = (1 - 2 * (common_ones % 2)).double() / side**0.5
    return matrix


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """R x = H (signs * x), blockwise: (..., n) float32 -> (..., n) float32."""
    blocks = (x.double() * signs.double()).unflatten(-1, (-1, block))  # (..., n / block, block)
    rotated: Tensor = (blocks @ hadamard_matrix(block)).flatten(-2)
    return rotated.float()


def unrotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """R^T x = signs * (H x), blockwise: (..., n) float32 -> (..., n) float32."""
    blocks = x.double().unflatten(-1, (-1, block))  # (..., n / block, block)
    rotated: Tensor = (blocks @ hadamard_matrix(block)).flatten(-2) * signs.double()
    return rotated.float()
