"""In which order LDLQ rounds the blocks of columns: any order gives the same file, some leave less error.

With ``H = L D L^T`` the proxy loss of LDLQ is the sum over blocks of ``tr(D_k)`` times the squared error of the
code. The product of the determinants of the ``D_k`` is that of H in every order, so the sum is least where they
are alike. D_1 is the variance of the block that is rounded last, given nothing; each further one is what the
blocks before leave unexplained. So the block that is least by itself comes first, and next the one that is
least given those that are there: a Cholesky factorisation that pivots on the smallest block.

A tile holds sixteen columns that lie side by side, so blocks move as a whole, and the file knows nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.encode.feedback import damped
from ernieq.trellis import TILE_SIDE


def block_order(hessian: Tensor, damping: float) -> Tensor:
    """Blocks of 16 columns, the one that is to be rounded last first.

    Args:
        hessian: (in_features, in_features), rotated; in_features a multiple of 16.
        damping: share of the mean diagonal that is added before it is factored.

    Returns:
        (in_features / 16,) int64 on the same device; the natural order if the damped Hessian has no factor.
    """
    rest = damped(hessian.double(), damping)
    count = hessian.shape[0] // TILE_SIDE
    natural = torch.arange(count, device=hessian.device)
    within = torch.arange(TILE_SIDE, device=hessian.device)
    taken = torch.zeros(count, dtype=torch.bool, device=hessian.device)
    failed = torch.zeros((), dtype=torch.bool, device=hessian.device)
    order = torch.empty_like(natural)
    for place in range(count):  # no wait for the device in here
        variance = rest.diagonal().reshape(count, TILE_SIDE).sum(dim=1)
        block = torch.where(taken, torch.inf, variance).argmin()
        order[place] = block
        taken |= natural == block
        panel = rest.index_select(1, block * TILE_SIDE + within)  # (in_features, 16)
        pivot = panel.index_select(0, block * TILE_SIDE + within)
        cholesky, info = torch.linalg.cholesky_ex(pivot)
        failed |= info != 0
        explained = torch.linalg.solve_triangular(cholesky, panel.T, upper=False)  # (16, in_features)
        rest.addmm_(explained.T, explained, alpha=-1.0)
    return torch.where(failed, natural, order)


def columns_of(order: Tensor) -> Tensor:
    """Columns of blocks in that order: (blocks,) -> (16 blocks,) int64."""
    within = torch.arange(TILE_SIDE, device=order.device)
    return (order[:, None] * TILE_SIDE + within).flatten()
