"""One safetensors file: its header, checked to the last byte, and its data, mapped and never copied whole.

Layout (safetensors README): eight bytes little-endian header length; the header, a JSON object from tensor
name to dtype, shape and data offsets; the data, without holes. The safetensors library would say that a file
is wrong, but not which tensor, and it does not let go of its mapping. Runs without torch.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ernieq.errors import CheckpointError, SourceChangedError
from ernieq.untrusted import open_regular, parse_json_object, paused_collector

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 1 << 25  # five times the index of a 300 B model
_MAX_RANK = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class ShardEntry:
    """A tensor of a shard; ``begin`` and ``end`` count bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """A safetensors file that has been checked.

    Attributes:
        path: the file.
        entries: its tensors by name.
        metadata: the strings stored under ``__metadata__``.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: the file can't be read, is truncated, or its header breaks a rule of the format.
        """
        self.path = path
        with paused_collector():
            status, table, self._data_begin = _read_table(path)
            self._size, self._changed = status.st_size, status.st_mtime_ns
            self.metadata = _metadata(table.pop("__metadata__", {}), path)
            self.entries = {name: self._entry(name, fields) for name, fields in table.items()}
        self._check_cover()
        self._map: mmap.mmap | None = None

    def mapping(self) -> mmap.mmap:
        """The whole file, mapped read-only. Buffers made from it keep it alive after ``release``.

        Raises:
            SourceChangedError: the file is gone, or no longer the one whose header was read.
            CheckpointError: it can't be mapped.
            MemoryError: the system has no memory for the mapping.
        """
        if self._map is None:
            with open_regular(self.path, SourceChangedError) as file:
                self._check_same(file)
                try:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                        raise MemoryError(f"{self.path} can't be mapped into memory") from None
                    raise CheckpointError(f"{self.path} can't be mapped into memory: {error}") from None
        return self._map

    def read_into(self, entry: ShardEntry, buffer: memoryview) -> None:
        """Copy a tensor's bytes. A file that is cut off meanwhile would kill who reads its mapping.

        Args:
            entry: the tensor.
            buffer: writable bytes, as many as the tensor has.

        Raises:
            SourceChangedError: the file is gone, or no longer the one whose header was read.
        """
        with open_regular(self.path, SourceChangedError) as file:
            file.seek(entry.begin)
            done = 0
            while done < len(buffer):
                try:
                    count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
                except OSError as error:
                    raise SourceChangedError(f"{self.path} can't be read: {error.strerror}") from None
                if not count:
                    break
                done += count
            self._check_same(file)  # behind the reading: what was read is what the file held all the time

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if the file is gone, or no longer the one whose header was read."""
        with open_regular(self.path, SourceChangedError) as file:
            self._check_same(file)

    def release(self) -> None:
        """Let go of the mapping; it is unmapped once nothing is made of it any more, and may come back."""
        self._map = None

    def _check_same(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if status.st_size != self._size:
            raise SourceChangedError(
                f"{self.path} changed while it was in use: {status.st_size} bytes, it had {self._size}"
            )
        if status.st_mtime_ns != self._changed:
            raise SourceChangedError(f"{self.path} changed while it was in use: it was written to")

    def _entry(self, name: str, fields: Any) -> ShardEntry:
        check_tensor_name(name, self.path)
        what = f"{name} in {self.path}"
        if not isinstance(fields, dict) or set(fields) != _FIELDS:
            raise CheckpointError(f"{what} must have exactly the fields dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{what} has dtype {str(dtype)[:40]!a}; known are {', '.join(DTYPE_BYTES)}")
        if not _counts(shape) or len(shape) > _MAX_RANK:
            raise CheckpointError(f"{what} has no legal shape; a list of at most {_MAX_RANK} counts is allowed")
        if not _counts(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{what} has no legal data_offsets; two counts are needed")
        needed = math.prod(shape) * DTYPE_BYTES[dtype]
        if offsets[1] - offsets[0] != needed:
            raise CheckpointError(
                f"{what} lies at bytes {offsets[0]} to {offsets[1]}; its shape {tuple(shape)} in {dtype} takes "
                f"{needed} bytes"
            )
        return ShardEntry(
            name, dtype, tuple(shape), self._data_begin + offsets[0], self._data_begin + offsets[1]
        )

    def _check_cover(self) -> None:
        """The tensors must follow each other without holes or overlaps and end where the file ends."""
        end = self._data_begin
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end)):
            if entry.begin != end:
                fault = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
                raise CheckpointError(f"{entry.name} in {self.path} {fault} at byte {min(entry.begin, end)}")
            end = entry.end
        if self._size < end:
            raise CheckpointError(
                f"{self.path} is truncated: it has {self._size} bytes, its header calls for {end}"
            )
        if self._size > end:
            raise CheckpointError(
                f"{self.path} has {self._size} bytes; its header accounts for {end} and no more are allowed"
            )


def check_tensor_name(name: str, path: Path) -> None:
    """Refuse a name that could not be printed, which errors and reports do.

    Raises:
        CheckpointError: it is empty, longer than 1000 characters, or holds a control character.
    """
    if not name or not name.isprintable() or len(name) > 1000:
        raise CheckpointError(f"the tensor name {name[:60]!a} in {path} is not a line of printable text")


def _read_table(path: Path) -> tuple[os.stat_result, dict[str, Any], int]:
    """Size and date of the file, the parsed header, and where the data begins."""
    try:
        with open_regular(path, CheckpointError) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
            if size < _PREFIX_BYTES or length > size - _PREFIX_BYTES:
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: it has {size} bytes, its first eight "
                    f"announce a header of {length}"
                )
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} announces a header of {length} bytes; at most {_MAX_HEADER_BYTES} are allowed"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    if text[:1] != b"{":
        raise CheckpointError(f"the header of {path} is corrupt: it does not begin with '{{'")
    return status, parse_json_object(text, f"the header of {path}", CheckpointError), _PREFIX_BYTES + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"the __metadata__ of {path} is not an object of strings")
    return value


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
