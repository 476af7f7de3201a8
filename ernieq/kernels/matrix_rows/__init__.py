"""A quantized matrix back in the basis of the source, in numpy: for checks and exports, also without torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernieq.kernels.backend import Backend, default_threads, resolve_backend
from ernieq.kernels.matrix_rows import reference
from ernieq.trellis import EncodedMatrix


def decode(
    matrix: EncodedMatrix, *, backend: Backend = Backend.AUTO, threads: int | None = None
) -> NDArray[np.float32]:
    """Decode a matrix, or some of its rows.

    Args:
        matrix: a quantized matrix; a band of row tiles with its scales is one too.
        backend: the implementation.
        threads: threads of the compiled paths; all processors by default.

    Returns:
        (out_features, in_features) float32, ``diag(scale) (values / 128) H diag(signs)``.

    Raises:
        BackendUnavailableError: the backend can't run here.
    """
    backend = resolve_backend(backend)
    if backend is Backend.REFERENCE:
        return reference.decode(matrix)
    from ernieq.kernels import _native

    rows = np.empty((matrix.out_features, matrix.in_features), dtype=np.float32)
    threads = threads or default_threads()
    packed, scale = np.ascontiguousarray(matrix.packed), np.ascontiguousarray(matrix.scale)
    code = matrix.code
    _native.trellis_decode(packed, scale, code.pair_bits, code.state_bits, 0, rows, backend.value, threads)
    turned = np.empty_like(rows)
    _native.hadamard_rotate(rows, matrix.signs, matrix.rotation_block, True, turned, threads)
    return turned
