"""Bytes of tensors in a packed checkpoint, before there is one: exact for data, an upper bound for headers."""

from __future__ import annotations

from collections.abc import Sequence

from ernieq.pack import DEFAULT_SHARD_BYTES

# Quotes, braces, commas and the keys of one tensor in a safetensors header, but for name, shape and offsets.
_ENTRY_SYNTAX = len('"":{"dtype":"F8_E4M3","shape":[],"data_offsets":[,]},')
_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_signs")
_SHARD_BYTES = 160  # length, metadata and padding of one shard's header


def packed_bytes(shape: Sequence[int], bits: float) -> int:
    """Data of a quantized matrix: rings, a float16 scale per row, a sign bit per column."""
    rows, columns = shape
    return int(rows * columns * bits) // 8 + 2 * rows + columns // 8


def header_bytes(name: str, shape: Sequence[int], source_bytes: int) -> int:
    """Upper bound of the header entry of one tensor, in a file no larger than the source."""
    offset_digits = 2 * len(str(source_bytes))
    return _ENTRY_SYNTAX + len(name) + sum(len(str(side)) + 1 for side in shape) + offset_digits


def packed_header_bytes(module: str, shape: Sequence[int], source_bytes: int) -> int:
    """Upper bound of the header entries of the three tensors of a quantized matrix."""
    rows, columns = shape
    shapes = ((rows // 16, columns // 16, 128), (rows,), (columns // 8,))
    return sum(
        header_bytes(module + suffix, side, source_bytes)
        for suffix, side in zip(_SUFFIXES, shapes, strict=True)
    )


def shard_overhead(source_bytes: int) -> int:
    """Upper bound of what shards take beside entries and data; two neighbours together hold one full shard."""
    return _SHARD_BYTES * (1 + 2 * (source_bytes // DEFAULT_SHARD_BYTES + 1))
