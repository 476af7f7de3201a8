"""Random encoded matrices, and the plain weights that they stand for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.kernels.hadamard.reference import unrotate
from ernieq.trellis import EncodedMatrix, TrellisCode


def random_signs(width: int, seed: int = 0) -> NDArray[np.int8]:
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), width)


def random_matrix(
    rows: int, columns: int, bits: float = 2, *, signs: NDArray[np.int8] | None = None, seed: int = 0
) -> EncodedMatrix:
    """A matrix of any bytes, scaled so that it keeps the size of what it multiplies."""
    random = np.random.default_rng((seed, rows, columns, round(2 * bits)))
    code = TrellisCode(bits, 12 if bits in (2, 4, 6) else 16)
    shape = (rows // 16, columns // 16, code.units_per_tile)
    return EncodedMatrix(
        packed=random.integers(-(2**15), 2**15, shape).astype(np.int16),
        scale=(random.uniform(0.5, 1.5, rows) / columns**0.5).astype(np.float16),
        signs=random_signs(columns, seed) if signs is None else signs,
        rotation_block=min(columns & -columns, 128),
        code=code,
    )


def plain_weight(matrix: EncodedMatrix) -> Tensor:
    """W itself: (out_features, in_features) float32."""
    return unrotate(
        torch.from_numpy(matrix.rotated_weight()), torch.from_numpy(matrix.signs), matrix.rotation_block
    )
