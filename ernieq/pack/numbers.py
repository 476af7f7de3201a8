"""Which stored numbers are legal: scales that are finite and not zero, other floats that are finite."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.pack.layout import PACKED_SUFFIXES, SCALE_SUFFIX
from ernieq.pack.sweep import Piece

# Stored floats are finite unless all their exponent bits are set.
_EXPONENT: dict[str, tuple[str, Any]] = {
    "F16": ("<u2", np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80)),
    "F32": ("<u4", np.uint32(0x7F800000)),
    "F64": ("<u8", np.uint64(0x7FF0000000000000)),
}


def illegal_number(piece: Piece) -> str | None:
    """A sentence on a piece of a tensor that is stored and not carried; None if it holds nothing illegal.

    The tiles of a packed matrix are never illegal: any bits are a ring.
    """
    name, dtype = piece.entry.name, piece.entry.dtype
    if name.endswith(SCALE_SUFFIX):
        magnitudes = np.frombuffer(piece.data, dtype="<u2") & 0x7FFF
        illegal = bool(((magnitudes == 0) | (magnitudes >= 0x7C00)).any())
        return f"{name} holds a zero, NaN or infinite scale" if illegal else None
    if name.endswith(PACKED_SUFFIXES) or dtype not in _EXPONENT:
        return None
    stored, exponent = _EXPONENT[dtype]
    bits: NDArray[Any] = np.frombuffer(piece.data, dtype=stored)
    return f"{name} holds a NaN or infinite number" if ((bits & exponent) == exponent).any() else None
