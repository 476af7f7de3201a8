"""Rotary position encoding with interleaved pairs (2i, 2i+1), in float32.

Source: RoFormer (arXiv 2104.09864). Float32 angles are what the models were trained with: at position 32767
they are off by up to 0.001 rad from exact ones, and a more exact computation would no longer be this model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.model.config import ModelConfig


class Rotary:
    """Angles of a model's position encoding.

    Not a module: the few frequencies are computed when asked for, so that a model that is built on the meta
    device has no buffer that a checkpoint could not fill.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._theta = config.rope_theta
        self._head_dim = config.head_dim

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position times frequency.

        Args:
            positions: (T,) integers, counted from 0.

        Returns:
            Two tensors (T, head_dim / 2) float32.
        """
        pairs = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / (self._theta ** (pairs / self._head_dim))
        angles = positions.to(torch.float32)[:, None] * frequencies  # (T, head_dim / 2)
        return angles.cos(), angles.sin()


def rotate_pairs(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (2i, 2i+1) of every head by its position's angle.

    Args:
        states: (B, heads, T, head_dim) of any float dtype.
        rotary: cosine and sine, each (T, head_dim / 2) float32.

    Returns:
        Like ``states``; computed in float32.
    """
    cosine, sine = rotary
    even, odd = states.float().unfold(-1, 2, 2).unbind(-1)  # each (B, heads, T, head_dim / 2)
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return turned.flatten(-2).to(states.dtype)
