"""Products with matrices that stay in the trellis code, and their decoding.

A few tokens are multiplied while the tiles are decoded (README.md in this folder); many tokens pay for decoding
a block of rows into a buffer and multiplying that with torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import ShapeError
from ernieq.kernels.backend import Backend, default_threads, resolve_backend
from ernieq.kernels.trellis_matmul import reference
from ernieq.trellis import TILE_SIDE, TrellisCode

# Up to this many tokens are multiplied while decoding: two passes of eight cost about as much as one decoding
# into a buffer and its product (README.md has the figures).
FUSED_LIMIT = 16

# Decoded weights held at a time in a product with many tokens: 8 MB of float32.
_BUFFER_WEIGHTS = 1 << 21


def matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
) -> Tensor:
    """Multiply rotated inputs with an encoded matrix.

    The result of a token does not depend on the other tokens while there are at most ``FUSED_LIMIT`` of them.

    Args:
        x: (tokens, in_features) float32, in the rotated basis, on the CPU.
        packed: (out_features / 16, in_features / 16, 16 K) int16, contiguous.
        scale: (out_features,) float16.
        code: the trellis code of the tiles.
        backend: the implementation.
        threads: threads of the compiled paths; all processors by default.

    Returns:
        (tokens, out_features) float32.

    Raises:
        ShapeError: the parts do not fit together.
        BackendUnavailableError: the backend can't run here.
    """
    _check(packed, scale, code)
    if x.ndim != 2 or x.shape[1] != packed.shape[1] * TILE_SIDE:
        raise ShapeError(f"input has shape {tuple(x.shape)}; expected (tokens, {packed.shape[1] * TILE_SIDE})")
    backend = resolve_backend(backend)
    if backend is Backend.REFERENCE:
        return reference.matmul(x.detach(), packed, scale, code)
    x = x.detach().contiguous()
    out = torch.empty(x.shape[0], scale.shape[0])
    threads = threads or default_threads()
    if x.shape[0] > FUSED_LIMIT:
        _multiply_many(x, packed, scale, code, backend, threads, out)
        return out
    from ernieq.kernels import _native

    # As numpy arrays: nanobind imports them ten times faster than torch tensors, which counts for one token.
    _native.trellis_multiply(
        x.numpy(),
        packed.numpy(),
        scale.numpy(),
        code.pair_bits,
        code.state_bits,
        out.numpy(),
        backend.value,
        threads,
    )
    return out


def decode(
    packed: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    rows: slice | None = None,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
) -> Tensor:
    """Decode rows of an encoded matrix in the rotated basis, exactly (every backend gives the same bits).

    Args:
        packed: (out_features / 16, in_features / 16, 16 K) int16, contiguous.
        scale: (out_features,) float16.
        code: the trellis code of the tiles.
        rows: a range of rows that starts and ends at multiples of 16; all by default.
        backend: the implementation.
        threads: threads of the compiled paths; all processors by default.

    Returns:
        (rows, in_features) float32.

    Raises:
        ShapeError: the parts do not fit together, or the rows do not start and end at tiles.
        BackendUnavailableError: the backend can't run here.
    """
    _check(packed, scale, code)
    start, stop, step = (rows or slice(None)).indices(scale.shape[0])
    if step != 1 or start % TILE_SIDE or stop % TILE_SIDE or stop < start:
        raise ShapeError(
            f"rows {start}:{stop}:{step} can't be decoded: a range must start and end at multiples of 16"
        )
    backend = resolve_backend(backend)
    if backend is Backend.REFERENCE:
        return reference.decode(packed[start // TILE_SIDE : stop // TILE_SIDE], scale[start:stop], code)
    weights = torch.empty(stop - start, packed.shape[1] * TILE_SIDE)
    _decode_into(weights, packed, scale, code, start, backend, threads or default_threads())
    return weights


def _multiply_many(
    x: Tensor, packed: Tensor, scale: Tensor, code: TrellisCode, backend: Backend, threads: int, out: Tensor
) -> None:
    rows, columns = scale.shape[0], x.shape[1]
    step = max(_BUFFER_WEIGHTS // columns // TILE_SIDE, 1) * TILE_SIDE
    buffer = torch.empty(min(step, rows), columns)
    for start in range(0, rows, step):
        weights = buffer[: min(step, rows - start)]  # (chunk, in_features)
        _decode_into(weights, packed, scale, code, start, backend, threads)
        torch.mm(x, weights.T, out=out[:, start : start + weights.shape[0]])


def _decode_into(
    weights: Tensor,
    packed: Tensor,
    scale: Tensor,
    code: TrellisCode,
    first_row: int,
    backend: Backend,
    threads: int,
) -> None:
    from ernieq.kernels import _native

    _native.trellis_decode(
        packed.numpy(),
        scale.numpy(),
        code.pair_bits,
        code.state_bits,
        first_row // TILE_SIDE,
        weights.numpy(),
        backend.value,
        threads,
    )


def _check(packed: Tensor, scale: Tensor, code: TrellisCode) -> None:
    if packed.ndim != 3 or packed.shape[2] != code.units_per_tile:
        raise ShapeError(
            f"packed has shape {tuple(packed.shape)}; expected (rows / 16, columns / 16, {code.units_per_tile})"
        )
    if scale.shape != (packed.shape[0] * TILE_SIDE,):
        raise ShapeError(f"scale has shape {tuple(scale.shape)}; expected ({packed.shape[0] * TILE_SIDE},)")
