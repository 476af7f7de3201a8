"""The header of a safetensors file, read strictly and written canonically.

Layout (FORMAT.md, "Shards"): eight bytes little-endian header length, the JSON header padded with spaces, the
data of the tensors without holes. Read here without the safetensors library because that hides offsets, and
because nothing below the model may import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernieq.errors import FormatError
from ernieq.pack.json_file import MAX_JSON_BYTES
from ernieq.pack.paths import check_tensor_name
from ernieq.untrusted import open_regular, parse_json_object, paused_collector

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# Tensor data starts on a cache line, as far as the lengths of the tensors before it allow.
DATA_ALIGNMENT = 64
_LENGTH_BYTES = 8
_MAX_RANK = 8


@dataclass(frozen=True)
class RawTensor:
    """The bytes of one tensor, little-endian, row-major.

    Args:
        dtype: safetensors name of the element type (``BF16``, ``F32``, ...).
        shape: side lengths.
        data: the elements; its length must be that of the shape.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: bytes ``begin`` to ``end``, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length of the data in bytes."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardHeader:
    """What stands before the data of a safetensors file.

    Args:
        entries: the tensors in the order of their data.
        data_start: where the data begins; the length of what was read.
        digest: sha256 of what was read, to go on with.
    """

    entries: list[TensorEntry]
    data_start: int
    digest: hashlib._Hash


def tensor_bytes(dtype: str, shape: Sequence[int], what: str) -> int:
    """Length in bytes that a dtype and a shape call for.

    Raises:
        FormatError: the dtype is unknown, a side is negative, or there are more than 8 sides.
    """
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise FormatError(f"{what} has dtype {str(dtype)[:40]!a}; allowed are {', '.join(DTYPE_BYTES)}")
    if len(shape) > _MAX_RANK or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
        raise FormatError(f"{what} has an illegal shape; allowed are at most {_MAX_RANK} non-negative integers")
    return math.prod(shape) * DTYPE_BYTES[dtype]


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Length prefix and JSON of a file whose data holds the tensors (name, dtype, shape) in this order.

    The JSON is padded with spaces so that the data starts at a multiple of 64 bytes.
    """
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + tensor_bytes(dtype, shape, name)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-(len(text) + _LENGTH_BYTES) % DATA_ALIGNMENT)
    if len(text) > MAX_JSON_BYTES:
        raise FormatError(
            f"a shard of {len(tensors)} tensors needs a header of more than {MAX_JSON_BYTES} bytes"
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> list[TensorEntry]:
    """Entries of a safetensors file in the order of their data; raises as ``read_shard_header``."""
    return read_shard_header(path).entries


def read_shard_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file, and nothing behind it.

    Raises:
        FormatError: the file breaks a rule of FORMAT.md, "Shards".
    """
    file_bytes, raw = _read_raw(path)
    with paused_collector():
        entries = _entries(raw, path)
    _check_contiguous(entries, len(raw), file_bytes, path)
    return ShardHeader(entries, len(raw), hashlib.sha256(raw))


def _entries(raw: bytes, path: Path) -> list[TensorEntry]:
    """The tensors that the first bytes of a file describe, in the order of their data."""
    if raw[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise FormatError(f"{path} has a header that does not start with '{{'")
    table = parse_json_object(raw[_LENGTH_BYTES:], f"the header of {path}", FormatError)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path} has __metadata__ that is not an object of strings")
    return sorted(
        (_entry(name, fields, len(raw), path) for name, fields in table.items()),
        key=lambda entry: (entry.begin, entry.end),
    )


def _read_raw(path: Path) -> tuple[int, bytes]:
    """Length of a file, and its first bytes: the length of the header, and the header."""
    with open_regular(path, FormatError) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        try:
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if file_bytes < _LENGTH_BYTES or length > file_bytes - _LENGTH_BYTES:
                raise FormatError(
                    f"{path} is truncated: its header claims {length} bytes, the file has {file_bytes} in all"
                )
            if length > MAX_JSON_BYTES:
                raise FormatError(f"{path} claims a header of {length} bytes; allowed are {MAX_JSON_BYTES}")
            return file_bytes, prefix + file.read(length)
        except OSError as error:
            raise FormatError(f"{path} can't be read: {error.strerror}") from None


def _entry(name: str, fields: object, data_start: int, path: Path) -> TensorEntry:
    check_tensor_name(name, str(path))
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name} in {path} must have exactly the fields dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not isinstance(shape, list):
        raise FormatError(f"{name} in {path} has a shape that is not a list")
    expected = tensor_bytes(fields["dtype"], shape, f"{name} in {path}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise FormatError(f"{name} in {path} has data_offsets that are not two integers")
    begin, end = offsets
    if begin < 0 or end - begin != expected:
        raise FormatError(
            f"{name} in {path} lies at bytes {begin} to {end}, but its shape calls for {expected} bytes"
        )
    return TensorEntry(name, fields["dtype"], tuple(shape), data_start + begin, data_start + end)


def _check_contiguous(entries: list[TensorEntry], data_start: int, file_bytes: int, path: Path) -> None:
    position = data_start
    for entry in entries:
        if entry.begin != position:
            fault = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise FormatError(
                f"{entry.name} in {path} {fault}: it starts at byte {entry.begin}, expected {position}"
            )
        position = entry.end
    if position != file_bytes:
        raise FormatError(f"{path} has {file_bytes} bytes; its header accounts for {position}")
