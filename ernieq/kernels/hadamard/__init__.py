"""Block Hadamard rotation: the change of basis that makes weights look Gaussian to the code.

``R = H diag(signs)`` with ``H`` block-diagonal, its blocks orthonormal Hadamard matrices in Sylvester order.
``H`` is symmetric, so ``R^T = diag(signs) H`` undoes it. A row of n numbers costs ``n log2(block)`` additions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ernieq.errors import ShapeError
from ernieq.kernels.backend import Backend, default_threads, resolve_backend
from ernieq.kernels.hadamard import reference
from ernieq.kernels.precision import float32_products


def rotate(
    x: Tensor, signs: Tensor, block: int, *, backend: Backend = Backend.AUTO, threads: int | None = None
) -> Tensor:
    """Rotate rows: ``R x = H (signs * x)``, blockwise.

    Args:
        x: (..., n) float32, on the CPU or a GPU.
        signs: (n,) int8 or float32, each +1 or -1, on the same device.
        block: side of the Hadamard blocks, a power of two that divides n.
        backend: the reference, or any C++ path (they are one: the compiler vectorises it).
        threads: threads of the compiled path; all processors by default.

    Returns:
        (..., n) float32.

    Raises:
        ShapeError: the block is no power of two that divides n, or signs are not (n,).
        BackendUnavailableError: the backend can't run here.
    """
    return _apply(x, signs, block, False, backend, threads)


def unrotate(
    x: Tensor, signs: Tensor, block: int, *, backend: Backend = Backend.AUTO, threads: int | None = None
) -> Tensor:
    """Undo ``rotate``: ``R^T x = signs * (H x)``, blockwise; arguments and errors as there."""
    return _apply(x, signs, block, True, backend, threads)


def _apply(
    x: Tensor, signs: Tensor, block: int, inverse: bool, backend: Backend, threads: int | None
) -> Tensor:
    width = x.shape[-1]
    if block < 1 or block & (block - 1) or width % block:
        raise ShapeError(f"rotation block {block} is not a power of two that divides {width}")
    if signs.shape != (width,):
        raise ShapeError(f"signs have shape {tuple(signs.shape)}; expected ({width},)")
    if x.is_cuda:
        return _apply_on_gpu(x, signs, block, inverse)
    backend = resolve_backend(backend)
    if backend is Backend.REFERENCE:
        return (reference.unrotate if inverse else reference.rotate)(x, signs, block)
    from ernieq.kernels import _native

    rows = x.detach().reshape(-1, width).contiguous()
    output = torch.empty_like(rows)
    # As numpy arrays: nanobind imports them ten times faster than torch tensors, which counts for one token.
    _native.hadamard_rotate(
        rows.numpy(),
        signs.to(torch.int8).numpy(),
        block,
        inverse,
        output.numpy(),
        threads or default_threads(),
    )
    return output.view(x.shape)


def _apply_on_gpu(x: Tensor, signs: Tensor, block: int, inverse: bool) -> Tensor:
    """One product with the explicit matrix: a GPU's memory is what bounds it, not the multiplications."""
    matrix = _float32_matrix(block, x.device)
    blocks = (x if inverse else x * signs).unflatten(-1, (-1, block))  # (..., n / block, block)
    with float32_products(x.device, tensor_cores=False):
        rotated: Tensor = (blocks @ matrix).flatten(-2)
    return rotated * signs if inverse else rotated


@lru_cache(maxsize=16)
def _float32_matrix(block: int, device: torch.device) -> Tensor:
    return reference.hadamard_matrix(block).float().to(device)
