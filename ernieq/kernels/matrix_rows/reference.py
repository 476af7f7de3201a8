"""The slow truth: decode with ``ernieq.trellis``, turn back with an explicit Hadamard matrix in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernieq.trellis import EncodedMatrix


def decode(matrix: EncodedMatrix) -> NDArray[np.float32]:
    """W = diag(scale) (values / 128) H diag(signs): (out_features, in_features) float32."""
    block = matrix.rotation_block
    hadamard = np.ones((1, 1))
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = matrix.rotated_weight().astype(np.float64).reshape(matrix.out_features, -1, block)
    turned = (blocks @ hadamard / block**0.5).reshape(matrix.out_features, matrix.in_features)
    rows: NDArray[np.float32] = (turned * matrix.signs).astype(np.float32)
    return rows
