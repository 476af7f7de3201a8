"""One pass over the files of a packed checkpoint: every byte is read once, hashed, and shown to its checkers.

Shards are read from front to back in pieces, in memory that does not grow with them. What has to be known
before its turn (the scales and signs of a matrix whose tiles come first) is read ahead and hashed from memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ernieq.errors import VerificationError
from ernieq.pack.header import DTYPE_BYTES, TensorEntry
from ernieq.pack.paths import locate
from ernieq.pack.reader import PackedReader
from ernieq.untrusted import open_regular

_PIECE_BYTES = 1 << 20  # fits a cache, so that hashing and checking read memory once

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor's data, ``start`` bytes behind its beginning; ``data`` lasts until the next piece."""

    entry: TensorEntry
    start: int
    data: memoryview


class Sweep:
    """Reads and hashes the files of a checkpoint that has been opened.

    Args:
        reader: the checkpoint.
        on_bytes: called with the number of bytes read since the last call.
    """

    def __init__(self, reader: PackedReader, on_bytes: OnBytes) -> None:
        self._reader = reader
        self._on_bytes = on_bytes
        self._held: dict[str, bytes] = {}

    def hold(self, names: Iterable[str]) -> None:
        """Read tensors ahead of their turn; they are kept in memory."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._reader.file_of(name), []).append(name)
        for file_name, held in by_file.items():
            with self._open(file_name) as file:
                for name in held:
                    entry = self._reader.info(name)
                    file.seek(entry.begin)
                    self._held[name] = _read(file, memoryview(bytearray(entry.nbytes)), file_name).tobytes()
                    self._on_bytes(entry.nbytes)

    def held(self, name: str) -> bytes:
        """Data of a tensor that was read ahead."""
        return self._held[name]

    def shard(self, file_name: str, units: Mapping[str, int], inspect: Callable[[Piece], None]) -> str:
        """Read a shard and show it piece by piece.

        Args:
            file_name: the shard.
            units: bytes, by tensor, of which every piece holds a whole number; one element if not named.
            inspect: called with every piece, in the order of the file.

        Returns:
            sha256 (hex) of the whole file.

        Raises:
            VerificationError: the file can't be read, or is no longer as long as it was.
        """
        header = self._reader.header_of(file_name)
        digest = header.digest.copy()
        with self._open(file_name) as file, ThreadPoolExecutor(1) as hasher:
            pending: Future[None] | None = None
            for piece in self._pieces(file, file_name, header.entries, units):
                if pending is not None:
                    pending.result()
                pending = hasher.submit(digest.update, piece.data)
                inspect(piece)
            if pending is not None:
                pending.result()
            if file.read(1):
                raise VerificationError(f"{file_name} has grown while it was read")
        return digest.hexdigest()

    def file(self, file_name: str) -> str:
        """sha256 (hex) of a file that is no shard."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        with self._open(file_name) as file:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                digest.update(buffer[:count])
                self._on_bytes(count)
        return digest.hexdigest()

    def _pieces(
        self, file: BinaryIO, file_name: str, entries: Iterable[TensorEntry], units: Mapping[str, int]
    ) -> Iterator[Piece]:
        """Pieces of all tensors; two buffers in turn, so that one can be hashed while the other is filled."""
        buffers = [memoryview(bytearray(0))] * 2
        for entry in entries:
            if entry.name in self._held:
                file.seek(entry.end)
                yield Piece(entry, 0, memoryview(self._held[entry.name]))
                continue
            if file.tell() != entry.begin:
                file.seek(entry.begin)
            unit = units.get(entry.name, DTYPE_BYTES[entry.dtype])
            step = max(1, _PIECE_BYTES // unit) * unit
            for start in range(0, entry.nbytes, step):
                length = min(step, entry.nbytes - start)
                if len(buffers[0]) < length:
                    buffers[0] = memoryview(bytearray(max(length, min(step, _PIECE_BYTES))))
                data = _read(file, buffers[0][:length], file_name)
                self._on_bytes(length)
                yield Piece(entry, start, data)
                buffers.reverse()

    def _open(self, file_name: str) -> BinaryIO:
        return open_regular(locate(self._reader.path, file_name), VerificationError)


def file_sha256(path: Path, on_bytes: OnBytes = lambda _: None) -> str:
    """sha256 (hex) of a file, read in pieces; ``on_bytes`` is called with the length of each."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_PIECE_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def _read(file: BinaryIO, buffer: memoryview, file_name: str) -> memoryview:
    """Fill the buffer.

    Raises:
        VerificationError: the file ends before, or can't be read.
    """
    filled = 0
    try:
        while filled < len(buffer):
            count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
            if not count:
                raise VerificationError(f"{file_name} has become shorter while it was read")
            filled += count
    except OSError as error:
        raise VerificationError(f"{file_name} can't be read: {error.strerror}") from None
    return buffer
