"""LDLQ of many matrices at once, each with its own Hessian: what a GPU needs to be kept busy.

``feedback.py`` derives the method. Here the feedback is lazy, as in GPTQ (arXiv 2210.17323): within a group of
128 columns a block sees the errors of its own group at once, and those of the groups before by one large
product after each group. The sums are the same but for the order of their terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ernieq.encode.feedback import damp
from ernieq.encode.ring_tensors import block_to_tiles, symbol_values, tiles_to_block
from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import search_tiles
from ernieq.trellis import TILE_SIDE, TILE_WEIGHTS, VALUE_UNIT, TrellisCode

GROUP_COLUMNS = 128

# Columns of a factor that are solved for at a time: a dense layer of 12288 inputs has a factor of 1.2 GB in
# float64, and the solver wants two more of what it is given.
_SOLVED_COLUMNS = 512


def block_ldl_factors(hessians: Sequence[Tensor], damping: float) -> Tensor:
    """``block_ldl_factor`` of every Hessian, with one wait for the device in all.

    Args:
        hessians: (in_features, in_features) float32 each, finite, on one device.
        damping: share of the mean diagonal that is added; raised tenfold where the factorisation fails.

    Returns:
        (hessians, in_features, in_features) float32, each unit block-lower triangular.
    """
    width = hessians[0].shape[0]
    factors = torch.empty(len(hessians), width, width, device=hessians[0].device)
    failed = [_factor_into(factor, hessian, damping) for factor, hessian in zip(factors, hessians, strict=True)]
    for place, code in enumerate(torch.stack(failed).tolist()):
        stronger = damping
        while code:
            stronger *= 10.0
            code = int(_factor_into(factors[place], hessians[place], stronger))
    return factors


def _factor_into(factor: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """Write the factor of one Hessian; returns LAPACK's info, 0 if it exists."""
    width = hessian.shape[0]
    wide = hessian.double()
    damp(wide, damping)
    cholesky, info = torch.linalg.cholesky_ex(wide)
    del wide
    starts = range(0, width, TILE_SIDE)
    diagonal = torch.stack([cholesky[k : k + TILE_SIDE, k : k + TILE_SIDE] for k in starts])
    for start in range(0, width, _SOLVED_COLUMNS):
        stop = min(start + _SOLVED_COLUMNS, width)
        blocks = cholesky[:, start:stop].unflatten(1, (-1, TILE_SIDE)).transpose(0, 1)  # (block, row, column)
        own = diagonal[start // TILE_SIDE : stop // TILE_SIDE]
        solved = torch.linalg.solve_triangular(own, blocks, upper=False, left=False)
        factor[:, start:stop] = solved.transpose(0, 1).flatten(1)
    failed: Tensor = info
    return failed


def encode_ldlq_batch(
    weights: Tensor,
    factors: Tensor,
    scales: Tensor,
    code: TrellisCode,
    *,
    first_pass_steps: int,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
    on_block: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose trellis symbols for B matrices, the tiles of a block of columns in one search.

    Args:
        weights: (B, out_features, in_features) float32 in the rotated basis.
        factors: (B, in_features, in_features) float32 from ``block_ldl_factors``.
        scales: (B, out_features) float32; a decoded weight is scale * value / 128.
        code: the trellis code.
        first_pass_steps: length of the first tail-biting pass.
        backend: implementation of the search on the CPU.
        threads: threads of the search on the CPU.
        on_block: called with the number of weights after each block of columns.

    Returns:
        Symbols (B, out_features / 16, in_features / 16, 256) uint8, and values (B, out_features, in_features)
        int16, both on the device of the weights.
    """
    count, rows, columns = weights.shape
    device, step = weights.device, (scales / VALUE_UNIT)[..., None]  # (B, rows, 1): what one unit stands for
    to_units = (VALUE_UNIT / scales)[..., None]
    tiles = (count, rows // TILE_SIDE, columns // TILE_SIDE, TILE_WEIGHTS)
    symbols = torch.empty(tiles, dtype=torch.uint8, device=device)
    values = torch.empty(weights.shape, dtype=torch.int16, device=device)
    wanted = weights.clone()  # what the groups to come should make, their weights and the errors fed back
    for stop in range(columns, 0, -GROUP_COLUMNS):
        start = max(0, stop - GROUP_COLUMNS)
        errors = torch.zeros(count, rows, stop - start, device=device)
        for first in range(stop - TILE_SIDE, start - 1, -TILE_SIDE):
            end = first + TILE_SIDE
            target = wanted[..., first:end]
            if end < stop:
                target = target.baddbmm(errors[..., end - start :], factors[:, end:stop, first:end])
            found = search_tiles(
                block_to_tiles(target * to_units),
                code,
                first_pass_steps=first_pass_steps,
                backend=backend,
                threads=threads,
            )
            chosen = tiles_to_block(symbol_values(found, code), target.shape)
            symbols[:, :, first // TILE_SIDE] = found.view(count, -1, TILE_WEIGHTS)
            values[..., first:end] = chosen
            errors[..., first - start : end - start] = weights[..., first:end] - chosen * step
            if on_block is not None:
                on_block(count * rows * TILE_SIDE)
        if start:
            wanted[..., :start].baddbmm_(errors, factors[:, start:stop, :start])
    return symbols, values
