"""LDLQ written from the papers, in plain loops: the slow truth that the encoder is held to.

Sources: QuIP (arXiv 2307.13304) for LDLQ, QuIP# (arXiv 2402.04396) section 4 for blocks. Nothing here calls the
package's own factorisation or feedback.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Rounder = Callable[[Matrix], Matrix]


def block_ldl(hessian: Matrix, block: int) -> Matrix:
    """L of ``H = L D L^T`` by elimination, block column by block column; unit block-lower triangular."""
    width = hessian.shape[0]
    remainder, factor = hessian.copy(), np.eye(width)
    for start in range(0, width, block):
        stop = start + block
        pivot = remainder[start:stop, start:stop].copy()
        factor[stop:, start:stop] = remainder[stop:, start:stop] @ np.linalg.inv(pivot)
        below = factor[stop:, start:stop]
        remainder[stop:, stop:] -= below @ pivot @ below.T
    return factor


def ldlq(weight: Matrix, hessian: Matrix, block: int, rounded: Rounder) -> Matrix:
    """Round block columns from last to first; the target of each takes up the errors behind it, one by one."""
    factor, result = block_ldl(hessian, block), np.zeros_like(weight)
    for start in range(weight.shape[1] - block, -1, -block):
        target = weight[:, start : start + block].copy()
        for row in range(weight.shape[0]):
            for column in range(start, start + block):
                for behind in range(start + block, weight.shape[1]):
                    error = weight[row, behind] - result[row, behind]
                    target[row, column - start] += error * factor[behind, column]
        result[:, start : start + block] = rounded(target)
    return result


def proxy_loss(weight: Matrix, result: Matrix, hessian: Matrix) -> float:
    """tr(E H E^T)."""
    error = weight - result
    return float(np.trace(error @ hessian @ error.T))
