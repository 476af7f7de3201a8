"""Safetensors files of a job's own: made in memory, written durably, read back by their sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.convert.overlap import BackgroundQueue
from ernieq.errors import VerificationError
from ernieq.pack import RawTensor, build_header, file_sha256, write_durably

_LENGTH_BYTES = 8
_NOTE = "ernieq"


@dataclass(frozen=True)
class TensorFile:
    """The contents of a file, and a note in its metadata that JSON can hold."""

    tensors: Mapping[str, RawTensor]
    note: Mapping[str, Any]

    def chunks(self) -> list[bytes | memoryview]:
        """The bytes of the file, in pieces."""
        described = [(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()]
        header = build_header(described, {_NOTE: json.dumps(self.note)})
        return [header, *(tensor.data for tensor in self.tensors.values())]


def parse_tensor_file(raw: bytes | bytearray) -> TensorFile:
    """Inverse of ``chunks``: tensors are views of the bytes, which must be as they were written."""
    begin = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
    header = json.loads(raw[_LENGTH_BYTES:begin])
    note = json.loads(header.pop("__metadata__")[_NOTE])
    data = memoryview(raw)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = RawTensor(entry["dtype"], tuple(entry["shape"]), data[begin + first : begin + last])
    return TensorFile(tensors, note)


def write_tensor_file(path: Path, chunks: list[bytes | memoryview]) -> str:
    """Write durably, read again and compare.

    Returns:
        sha256 (hex) of the file.

    Raises:
        StorageError: the disk refuses.
        VerificationError: what is read is not what was written.
    """
    digest = _sha256(chunks)
    write_durably(path, chunks)
    if file_sha256(path) != digest:
        raise VerificationError(f"{path} was written and read again, and is not the same: the disk is damaged")
    return digest


def write_large_file(path: Path, chunks: list[bytes | memoryview], queue: BackgroundQueue) -> str:
    """``write_tensor_file`` for hundreds of megabytes: hashed in a thread meanwhile, and not read again.

    The thread runs already: where memory has run out, Python may wait for ever for a new one to begin.
    """
    digests: list[str] = []
    queue.submit(lambda: digests.append(_sha256(chunks)))
    write_durably(path, chunks)
    queue.wait()
    return digests[0]


def read_tensor_file(path: Path, sha256: str) -> TensorFile | None:
    """The contents of a file; None if it is not there or not the one with that hash."""
    try:
        size = path.stat().st_size
        raw = bytearray(size)
        with path.open("rb") as file:
            if file.readinto(raw) != size:
                return None
    except OSError:
        return None
    return parse_tensor_file(raw) if hashlib.sha256(raw).hexdigest() == sha256 else None


def _sha256(chunks: list[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def array_of(tensor: RawTensor, dtype: str) -> NDArray[Any]:
    """A tensor as an array of that (little-endian) type."""
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tensor.shape)
