"""In which order LDLQ rounds the blocks of columns: any order gives the same file, some leave less error.

With ``H = L D L^T`` the proxy loss of LDLQ is the sum over blocks of ``tr(D_k)`` times the squared error of the
code. The product of the determinants of the ``D_k`` is that of H in every order, so the sum is least where they
are alike. D_1 is the variance of the block that is rounded last, given nothing; each further one is what the
blocks before leave unexplained. So the block that is least by itself comes first, and next the one that is
least given those that are there: a Cholesky factorisation that pivots on the smallest block.

A tile holds sixteen columns that lie side by side, so blocks move as a whole, and the file knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernieq.encode.feedback import damp
from ernieq.trellis import TILE_SIDE


def block_orders(hessians: Sequence[Tensor], damping: float) -> Tensor:
    """Blocks of 16 columns, the one that is to be rounded last first, for every Hessian.

    Args:
        hessians: (in_features, in_features) each, rotated; in_features a multiple of 16.
        damping: share of the mean diagonal that is added before one is factored.

    Returns:
        (hessians, in_features / 16) int64 on their device; the natural order where no factor exists.
    """
    many, width = len(hessians), hessians[0].shape[0]
    count = width // TILE_SIDE
    rest = torch.empty(many, width, width, dtype=torch.float64, device=hessians[0].device)
    for own, hessian in zip(rest, hessians, strict=True):
        own.copy_(hessian)
        damp(own, damping)
    natural = torch.arange(count, device=rest.device)
    within = torch.arange(TILE_SIDE, device=rest.device)
    taken = torch.zeros(many, count, dtype=torch.bool, device=rest.device)
    failed = torch.zeros(many, dtype=torch.bool, device=rest.device)
    order = torch.empty(many, count, dtype=torch.int64, device=rest.device)
    for place in range(count):  # no wait for the device in here
        variance = rest.diagonal(dim1=1, dim2=2).reshape(many, count, TILE_SIDE).sum(dim=2)
        block = torch.where(taken, torch.inf, variance).argmin(dim=1)  # (H,)
        order[:, place] = block
        taken |= natural == block[:, None]
        columns = block[:, None] * TILE_SIDE + within  # (H, 16)
        panel = rest.gather(2, columns[:, None, :].expand(-1, width, -1))  # (H, in, 16)
        pivot = panel.gather(1, columns[:, :, None].expand(-1, -1, TILE_SIDE))
        cholesky, info = torch.linalg.cholesky_ex(pivot)
        failed |= info != 0
        explained = torch.linalg.solve_triangular(cholesky, panel.mT, upper=False)  # (H, 16, in)
        rest.baddbmm_(explained.mT, explained, alpha=-1.0)
    return torch.where(failed[:, None], natural, order)


def columns_of(order: Tensor) -> Tensor:
    """Columns of blocks in that order: (blocks,) -> (16 blocks,) int64."""
    within = torch.arange(TILE_SIDE, device=order.device)
    return (order[:, None] * TILE_SIDE + within).flatten()
