"""Viterbi search: the trellis path nearest to a tile of weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.errors import NonFiniteError, ShapeError, UsageError
from ernieq.kernels.backend import Backend, default_threads, resolve_backend
from ernieq.kernels.viterbi import reference
from ernieq.trellis import TILE_WEIGHTS, TrellisCode, state_values

FULL_FIRST_PASS = TILE_WEIGHTS
SHORT_FIRST_PASS = 96


def encode_tiles(
    targets: NDArray[np.float32],
    code: TrellisCode,
    *,
    first_pass_steps: int = FULL_FIRST_PASS,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
) -> NDArray[np.uint8]:
    """Find, for every tile, the ring whose values are nearest to the targets (tail-biting Viterbi).

    Source: QTIP (arXiv 2406.11235), section 3.2 and algorithm 4 for the tail-biting approximation.

    Args:
        targets: (tiles, 256) float32 in value units (a value has a root mean square of about 147.8).
        code: the trellis code.
        first_pass_steps: weights around the seam that the first pass looks at, a multiple of 4, 4 to 256. 96
            instead of 256 saves a quarter of the time and costs about 1.5 % of the squared error at 2 bits.
        backend: the implementation; all give the same symbols.
        threads: threads of the compiled paths; all processors by default.

    Returns:
        (tiles, 256) uint8 symbols, each below 2 to the shift of its weight.

    Raises:
        ShapeError: targets are not (tiles, 256).
        NonFiniteError: a target is NaN or infinite.
        UsageError: first_pass_steps is no multiple of 4, or out of range.
        BackendUnavailableError: the backend can't run here.
    """
    _check(targets.shape, first_pass_steps)
    if not np.isfinite(targets).all():
        raise NonFiniteError("the targets of the trellis search contain NaN or infinite numbers")
    limit = np.float32(reference.TARGET_LIMIT)
    rounded = np.clip(np.rint(targets * np.float32(reference.TARGET_UNIT)), -limit, limit).astype(np.int16)
    backend = resolve_backend(backend)
    if backend is Backend.REFERENCE:
        return reference.encode_tiles(rounded, code, first_pass_steps)
    from ernieq.kernels import _native

    symbols = np.empty(targets.shape, dtype=np.uint8)
    _native.viterbi_encode(
        targets=np.ascontiguousarray(rounded),
        values=state_values(code.state_bits),
        pair_bits=code.pair_bits,
        state_bits=code.state_bits,
        first_pass_steps=first_pass_steps,
        symbols=symbols,
        isa=str(backend),
        threads=threads or default_threads(),
    )
    return symbols


def search_tiles(
    targets: Tensor,
    code: TrellisCode,
    *,
    first_pass_steps: int = FULL_FIRST_PASS,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
) -> Tensor:
    """``encode_tiles`` for tensors, on the device that holds them.

    On a GPU the search computes in float16 (``half_reference.py`` is its truth): the symbols differ from a
    processor's where two paths are nearly equal, and are the same on every GPU.

    Args:
        targets: (tiles, 256) float32 in value units, on the CPU or a GPU.
        code: the trellis code.
        first_pass_steps: as in ``encode_tiles``.
        backend: implementation on the CPU; a GPU has one.
        threads: threads on the CPU.

    Returns:
        (tiles, 256) uint8 symbols, each below 2 to the shift of its weight, on the same device.

    Raises:
        ShapeError, NonFiniteError, UsageError, BackendUnavailableError: as in ``encode_tiles``.
    """
    if not targets.is_cuda:
        symbols = encode_tiles(
            targets.numpy(), code, first_pass_steps=first_pass_steps, backend=backend, threads=threads
        )
        return torch.from_numpy(symbols)
    from ernieq.kernels.viterbi import cuda

    _check(targets.shape, first_pass_steps)
    return cuda.encode_tiles(targets, code, first_pass_steps=first_pass_steps)


def _check(shape: tuple[int, ...], first_pass_steps: int) -> None:
    if len(shape) != 2 or shape[1] != TILE_WEIGHTS:
        raise ShapeError(f"targets have shape {tuple(shape)}; expected (tiles, {TILE_WEIGHTS})")
    check_first_pass(first_pass_steps)


def check_first_pass(first_pass_steps: int) -> None:
    """Refuse a length of the first pass that can't be.

    Raises:
        UsageError: it is no multiple of 4, or out of range.
    """
    # Half of the steps lie before the seam: a multiple of four starts at an even weight.
    if not 4 <= first_pass_steps <= TILE_WEIGHTS or first_pass_steps % 4:
        raise UsageError(
            f"first_pass_steps is {first_pass_steps}; it must be a multiple of 4, 4 to {TILE_WEIGHTS}"
        )
