"""The slow truth: decode with ``ernieq.trellis``, multiply in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ernieq.trellis import VALUE_UNIT, TrellisCode, tile_values, tiles_to_matrix


def decode(packed: Tensor, scale: Tensor, code: TrellisCode) -> Tensor:
    """Weights in the rotated basis: packed (out/16, in/16, 16 K), scale (out,) -> (out, in) float32."""
    values = tiles_to_matrix(tile_values(packed.numpy(), code)).astype(np.float32)
    row_scale = scale.numpy().astype(np.float32) / np.float32(VALUE_UNIT)
    return torch.from_numpy(values * row_scale[:, None])


def matmul(x: Tensor, packed: Tensor, scale: Tensor, code: TrellisCode) -> Tensor:
    """(tokens, in) float32 times the transposed weights -> (tokens, out) float32."""
    return (x.double() @ decode(packed, scale, code).double().T).float()
