"""LDLQ: round a block of columns after the errors of the blocks already fixed have been fed into it.

Source: QuIP (arXiv 2307.13304), LDLQ; block form: QuIP# (arXiv 2402.04396), section 4. With
``H = L D L^T`` the proxy loss is ``tr(E H E^T) = sum_k tr((E L)_k D_k (E L)_k^T)`` and
``(E L)_k = E_k + sum_{i>k} E_i L_ik``: going from the last block to the first, each block can cancel what the
later ones have left in its own term.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.errors import NonFiniteError
from ernieq.kernels.backend import Backend
from ernieq.kernels.precision import one_thread
from ernieq.kernels.viterbi import encode_tiles
from ernieq.trellis import (
    TILE_SIDE,
    VALUE_UNIT,
    TrellisCode,
    matrix_to_tiles,
    ring_states,
    state_values,
    tiles_to_matrix,
)


def damp(hessian: Tensor, damping: float) -> None:
    """Add ``damping`` times the mean diagonal to the diagonal, in place; zeros become the identity."""
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))


def damped(hessian: Tensor, damping: float) -> Tensor:
    """``damp`` of a copy."""
    result = hessian.clone()
    damp(result, damping)
    return result


def block_ldl_factor(hessian: Tensor, damping: float) -> Tensor:
    """Factor ``H + damping`` into ``L D L^T`` with 16-wide blocks.

    Args:
        hessian: (in_features, in_features) symmetric, positive semidefinite; in_features a multiple of 16.
        damping: share of the mean diagonal that is added; raised tenfold until the factorisation exists,
            which it does at the latest when the diagonal dominates.

    Returns:
        (in_features, in_features) float32, unit block-lower triangular.

    Raises:
        NonFiniteError: the Hessian holds NaN or infinity, which no damping mends.
    """
    width = hessian.shape[0]
    wide = hessian.double()
    if not torch.isfinite(wide).all():
        raise NonFiniteError(f"a Hessian of width {width} holds NaN or infinity: the calibration overflowed")
    while True:
        with one_thread(wide.device):
            cholesky, failed = torch.linalg.cholesky_ex(damped(wide, damping))
        if not failed:
            break
        damping *= 10.0
    blocks = cholesky.reshape(width, width // TILE_SIDE, TILE_SIDE).transpose(0, 1)  # (block, row, column)
    diagonal = torch.stack([cholesky[k : k + TILE_SIDE, k : k + TILE_SIDE] for k in range(0, width, TILE_SIDE)])
    factor = torch.linalg.solve_triangular(diagonal, blocks, upper=False, left=False)
    result: Tensor = factor.transpose(0, 1).reshape(width, width).float()
    return result


def encode_ldlq(
    weight: Tensor,
    ldl_factor: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    first_pass_steps: int,
    backend: Backend,
    threads: int | None,
    on_block: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.uint8], Tensor]:
    """Choose trellis symbols so that each block of columns absorbs the error of those already fixed.

    Args:
        weight: (out_features, in_features) float32 in the rotated basis.
        ldl_factor: (in_features, in_features) float32 from ``block_ldl_factor``.
        scale: (out_features,) float32; a decoded weight is scale * value / 128.
        code: the trellis code.
        first_pass_steps: length of the first tail-biting pass.
        backend: implementation of the search.
        threads: threads of the search.
        on_block: called with the number of weights after each block of columns.

    Returns:
        Symbols (out_features / 16, in_features / 16, 256) uint8, and values / 128 as (out_features,
        in_features) float32.
    """
    rows, columns = weight.shape
    to_units = (VALUE_UNIT / scale)[:, None]
    symbols = np.empty((rows // TILE_SIDE, columns // TILE_SIDE, TILE_SIDE * TILE_SIDE), dtype=np.uint8)
    normalised = torch.empty_like(weight)
    error = torch.zeros_like(weight)
    table = state_values(code.state_bits)
    for start in range(columns - TILE_SIDE, -1, -TILE_SIDE):
        stop = start + TILE_SIDE
        target = weight[:, start:stop] + error[:, stop:] @ ldl_factor[stop:, start:stop]
        tiles = matrix_to_tiles((target * to_units).numpy())[:, 0]
        chosen = encode_tiles(tiles, code, first_pass_steps=first_pass_steps, backend=backend, threads=threads)
        values = tiles_to_matrix(table[ring_states(chosen, code)][:, None])
        symbols[:, start // TILE_SIDE] = chosen
        normalised[:, start:stop] = torch.from_numpy(values.astype(np.float32)) / VALUE_UNIT
        error[:, start:stop] = weight[:, start:stop] - normalised[:, start:stop] * scale[:, None]
        if on_block is not None:
            on_block(rows * TILE_SIDE)
    return symbols, normalised
