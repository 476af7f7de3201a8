"""A packed checkpoint against the source that it was made of.

Nothing may be missing or added, nothing that is kept may differ, and no matrix may be further off than its bits
and a correction explain. Works on the pieces of a sweep, so that the packed bytes are read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ernieq.errors import VerificationError
from ernieq.kernels import Backend, matrix_rows
from ernieq.pack.layout import PACKED_SUFFIX, SCALE_SUFFIX, SIGNS_SUFFIX, unpack_signs
from ernieq.pack.reader import PackedReader
from ernieq.pack.sweep import Piece, Sweep
from ernieq.trellis import TILE_SIDE, EncodedMatrix
from ernieq.trellis.distortion import largest_relative_error, usual_relative_error

# A row of zeros is stored as codes with the smallest scale there is, 2^-24, so it decodes to at most this.
_ZERO = 2.0**-24 * 510 / 128


class StoredTensor(Protocol):
    """Dtype (the name of safetensors) and shape of a tensor of the source."""

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Side lengths."""


class SourceTensors(Protocol):
    """What is needed of the source; ``ernieq.checkpoint.Checkpoint`` has it."""

    def names(self) -> list[str]:
        """All tensors."""

    def info(self, name: str, /) -> StoredTensor:
        """Dtype and shape of a tensor."""

    def read_bytes(self, name: str, /) -> memoryview:
        """Its elements, little-endian, row-major."""

    def release(self) -> None:
        """Let go of pages that were read."""


@dataclass(frozen=True)
class TensorError:
    """How far a stored tensor is from the source's.

    Args:
        name: its name in the source.
        fate: ``quantized``, ``kept``, ``carried`` or ``tuned``.
        bits: of the trellis code; None if the tensor is not quantized.
        relative_error: Frobenius norm of the difference over that of the source's tensor.
        flagged: whether that is more than the bits alone cost (`usual_relative_error`).
    """

    name: str
    fate: str
    bits: float | None
    relative_error: float
    flagged: bool


class Comparison:
    """Compares the pieces of a sweep with the source as they come.

    Args:
        reader: the packed checkpoint.
        source: what it was made of.
        sweep: reads scales and signs ahead.
        backend: implementation of the decoding.
        threads: of the decoding; all processors by default.

    Raises:
        VerificationError: a tensor is missing or was never in the source, or has another shape or dtype.
    """

    def __init__(
        self,
        reader: PackedReader,
        source: SourceTensors,
        sweep: Sweep,
        *,
        backend: Backend = Backend.AUTO,
        threads: int | None = None,
    ) -> None:
        self._reader, self._source, self._sweep = reader, source, sweep
        self._backend, self._threads = backend, threads
        self._fates = _fates(reader)
        self._squares: dict[str, list[float]] = {}  # squared norms of difference and source, by source name
        self._check_names()
        self._check_shapes()
        modules = reader.modules()
        sweep.hold(module + suffix for suffix in (SCALE_SUFFIX, SIGNS_SUFFIX) for module in modules)

    def units(self) -> dict[str, int]:
        """Bytes of a row of tiles, by name of the packed tensor: pieces must hold whole ones."""
        names = [module + PACKED_SUFFIX for module in self._reader.modules()]
        return {name: self._reader.info(name).nbytes // self._reader.info(name).shape[0] for name in names}

    def inspect(self, piece: Piece) -> str | None:
        """Add up the error of a piece; a sentence if it is of a kept or carried tensor and differs at all."""
        name = piece.entry.name
        if name.endswith(PACKED_SUFFIX):
            module = name.removesuffix(PACKED_SUFFIX)
            self._add(f"{module}.weight", *self._rows(module, piece))
        elif name in self._fates:
            return self._inspect_unpacked(piece)
        return None

    def errors(self) -> tuple[TensorError, ...]:
        """Relative errors of all tensors, once every piece has been seen; by name.

        Raises:
            VerificationError: a matrix is further off than its bits explain.
        """
        found = tuple(self._error(name) for name in sorted(self._fates))
        limits = {error.name: largest_relative_error(error.bits) for error in found if error.bits is not None}
        wrong = [error for error in found if not error.relative_error <= limits.get(error.name, math.inf)]
        if wrong:
            worst = max(wrong, key=lambda error: error.relative_error)
            raise VerificationError(
                f"{worst.name} is off by {worst.relative_error:.3g} of its norm, more than the "
                f"{limits[worst.name]:.3g} that {worst.bits:g} bits and a correction explain: it was encoded "
                f"wrongly or is not of this source ({len(wrong)} such tensors)"
            )
        return found

    def _check_names(self) -> None:
        names = set(self._source.names())
        if missing := sorted(names - set(self._fates)):
            raise VerificationError(
                f"{missing[0]} of the source is missing: it is neither quantized, kept, carried nor tuned "
                f"({len(missing)} such tensors)"
            )
        if added := sorted(set(self._fates) - names):
            raise VerificationError(f"{added[0]} is not in the source ({len(added)} such tensors)")

    def _check_shapes(self) -> None:
        for name, fate in self._fates.items():
            info = self._source.info(name)
            stored: tuple[int, ...]
            if fate == "quantized":
                stored, dtype = self._reader.shape_of(name.removesuffix(".weight")), info.dtype
            else:
                entry = self._reader.info(name)
                stored, dtype = entry.shape, entry.dtype
            if (stored, dtype) != (tuple(info.shape), info.dtype):
                raise VerificationError(
                    f"{name} is {dtype} {list(stored)}; in the source it is {info.dtype} {list(info.shape)}"
                )

    def _rows(self, module: str, piece: Piece) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rows of a piece of tiles as the source has them and as they decode: (rows, in_features) both."""
        row_tiles, *tile = piece.entry.shape
        tiles = np.frombuffer(piece.data, dtype="<i2").reshape(-1, *tile)
        first = piece.start // (piece.entry.nbytes // row_tiles) * TILE_SIDE
        rows = slice(first, first + len(tiles) * TILE_SIDE)
        spec = self._reader.spec_of(module)
        decoded = matrix_rows.decode(
            EncodedMatrix(
                packed=tiles,
                scale=np.frombuffer(self._sweep.held(module + SCALE_SUFFIX), dtype="<f2")[rows],
                signs=unpack_signs(np.frombuffer(self._sweep.held(module + SIGNS_SUFFIX), dtype="u1")),
                rotation_block=spec.rotation_block,
                code=spec.code,
            ),
            backend=self._backend,
            threads=self._threads,
        )
        name, width = f"{module}.weight", decoded.shape[1]
        return self._source_floats(name, rows.start * width, decoded.size).reshape(decoded.shape), decoded

    def _inspect_unpacked(self, piece: Piece) -> str | None:
        name = piece.entry.name
        theirs = self._source.read_bytes(name)[piece.start : piece.start + len(piece.data)]
        if np.array_equal(np.frombuffer(theirs, np.uint8), np.frombuffer(piece.data, np.uint8)):
            return None
        if self._fates[name] != "tuned":
            return f"{name} is listed as {self._fates[name]}, but differs from the source's"
        self._add(name, _floats(theirs, piece.entry.dtype), _floats(piece.data, piece.entry.dtype))
        return None

    def _source_floats(self, name: str, first: int, count: int) -> NDArray[np.float32]:
        dtype, data = self._source.info(name).dtype, self._source.read_bytes(name)
        width = len(data) // math.prod(self._source.info(name).shape)
        floats = _floats(data[first * width : (first + count) * width], dtype)
        self._source.release()  # pages that were read no longer count as this process's memory
        return floats

    def _add(self, name: str, theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> None:
        sums = self._squares.setdefault(name, [0.0, 0.0])
        for place, values in enumerate((theirs - ours, theirs)):
            rows = values.reshape(-1, values.shape[-1])
            sums[place] += float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))

    def _error(self, name: str) -> TensorError:
        difference, norm = self._squares.get(name, (0.0, 0.0))
        if norm:
            relative = math.sqrt(difference / norm)
        else:  # a source of zeros, or one that is equal: nothing to relate a difference to
            elements = math.prod(self._source.info(name).shape)
            relative = 0.0 if difference <= elements * _ZERO**2 else math.inf
        fate = self._fates[name]
        if fate != "quantized":
            return TensorError(name, fate, None, relative, flagged=False)
        bits = self._reader.code_of(name.removesuffix(".weight")).bits_per_weight
        return TensorError(name, fate, bits, relative, flagged=not relative <= usual_relative_error(bits))


def _fates(reader: PackedReader) -> dict[str, str]:
    coverage = reader.manifest.coverage
    assert coverage is not None, "a manifest that was read has its coverage"
    lists: Sequence[tuple[str, tuple[str, ...]]] = (
        ("quantized", coverage.quantized),
        ("kept", coverage.kept),
        ("carried", coverage.carried),
        ("tuned", coverage.tuned),
    )
    return {name: fate for fate, names in lists for name in names}


def _floats(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """Numbers of a stored tensor: bytes -> (elements,) float32; a bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    stored: dict[str, Any] = {"F16": "<f2", "F32": "<f4"}
    if dtype not in stored:
        raise VerificationError(f"a {dtype} tensor of the source can't be compared; BF16, F16 and F32 can")
    return np.frombuffer(data, dtype=stored[dtype]).astype(np.float32)
