"""Writing tensors as they come into safetensors shards, with memory that does not grow.

Data is appended to a spool file; when a shard is full, its header and then the spooled data are written to the
shard in an order that keeps tensors aligned (below), and hashed on the way. The names of the shards hold their
number, which is known only at the end, so they get them then.

Alignment: safetensors forbids holes, so a tensor can be aligned only by what lies before it. Tensors are put in
falling order of the largest power of two (at most 64) that divides their length: each then starts at a multiple
of its own such power, and a tensor whose length is a multiple of 64 starts on a cache line.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ernieq.errors import FormatError
from ernieq.pack.atomic import storage_errors
from ernieq.pack.header import DATA_ALIGNMENT, RawTensor, build_header, tensor_bytes
from ernieq.pack.json_file import dump_json
from ernieq.pack.paths import check_tensor_name

DEFAULT_SHARD_BYTES = 2_000_000_000
SINGLE_SHARD = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_COPY_BYTES = 1024 * 1024


@dataclass(frozen=True)
class _Spooled:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def alignment(self) -> int:
        return math.gcd(self.nbytes, DATA_ALIGNMENT) if self.nbytes else DATA_ALIGNMENT


class ShardWriter:
    """Streams tensors into ``model.safetensors``, or into numbered shards and their index.

    Args:
        directory: where the files go; usually ``AtomicDirectory.path``.
        shard_bytes: a shard is closed before its data would exceed this; one larger tensor gets its own shard.
    """

    def __init__(self, directory: Path, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._spool_path = directory / "spool.partial"
        self._spool: BinaryIO | None = None
        self._spooled: list[_Spooled] = []
        self._spool_bytes = 0
        self._shards: list[tuple[Path, str, list[str]]] = []  # file, sha256, tensor names
        self._names: set[str] = set()
        self._total_bytes = 0

    def add(self, name: str, tensor: RawTensor) -> None:
        """Append one tensor.

        Raises:
            FormatError: the name was used before or is illegal, or the data does not fit the shape.
            StorageError: the disk refuses.
        """
        self.add_stream(name, tensor.dtype, tensor.shape, (tensor.data,))

    def add_stream(
        self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[bytes | memoryview]
    ) -> None:
        """Append one tensor whose bytes come in pieces, so that it need not be in memory at once.

        Raises:
            FormatError: the name was used before or is illegal, or the chunks do not add up to the shape.
            StorageError: the disk refuses.
        """
        check_tensor_name(name, "the new checkpoint")
        if name in self._names or name == "__metadata__":
            raise FormatError(f"{name} is written twice")
        nbytes = tensor_bytes(dtype, shape, name)
        if self._spooled and self._spool_bytes + nbytes > self._shard_bytes:
            self._close_shard()
        with storage_errors(self._spool_path):
            written = self._append(chunks)
        if written != nbytes:
            raise FormatError(f"{name} has {written} bytes of data; {dtype} {list(shape)} calls for {nbytes}")
        self._spooled.append(_Spooled(name, dtype, shape, self._spool_bytes, nbytes))
        self._spool_bytes += nbytes
        self._total_bytes += nbytes
        self._names.add(name)

    def finish(self) -> dict[str, str]:
        """Close the last shard, give all their names, and write the index if there is more than one.

        Returns:
            sha256 (hex) of every shard by file name.

        Raises:
            FormatError: no tensor was added.
            StorageError: the disk refuses.
        """
        if self._spooled:
            self._close_shard()
        if not self._shards:
            raise FormatError("a checkpoint without tensors can't be written")
        with storage_errors(self._directory):
            self._close_spool()
            self._spool_path.unlink(missing_ok=True)
            hashes: dict[str, str] = {}
            weight_map: dict[str, str] = {}
            for number, (path, digest, names) in enumerate(self._shards, start=1):
                final = shard_name(number, len(self._shards))
                path.rename(self._directory / final)
                hashes[final] = digest
                weight_map.update(dict.fromkeys(names, final))
            if len(self._shards) > 1:
                index = {
                    "metadata": {"total_size": self._total_bytes},
                    "weight_map": dict(sorted(weight_map.items())),
                }
                (self._directory / INDEX_NAME).write_bytes(dump_json(index))
        return hashes

    def close(self) -> None:
        """Close the spool file without finishing; what it still holds in its buffer is thrown away anyway."""
        with suppress(OSError):  # a full disk refuses the buffer a second time
            self._close_spool()

    def _append(self, chunks: Iterable[bytes | memoryview]) -> int:
        if self._spool is None:
            self._spool = self._spool_path.open("w+b")
        self._spool.seek(self._spool_bytes)
        written = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._spool.write(view)
            written += view.nbytes
        return written

    def _close_shard(self) -> None:
        assert self._spool is not None
        ordered = sorted(self._spooled, key=lambda tensor: -tensor.alignment)  # stable: order of arrival within
        header = build_header([(t.name, t.dtype, t.shape) for t in ordered], {"format": "pt"})
        path = self._directory / f"shard-{len(self._shards) + 1:05d}.partial"
        digest = hashlib.sha256(header)
        with storage_errors(path), path.open("wb") as shard:
            self._spool.flush()
            shard.write(header)
            for tensor in ordered:
                self._copy(tensor, shard, digest)
            self._spool.seek(0)
            self._spool.truncate()
        self._shards.append((path, digest.hexdigest(), [tensor.name for tensor in ordered]))
        self._spooled, self._spool_bytes = [], 0

    def _copy(self, tensor: _Spooled, shard: BinaryIO, digest: hashlib._Hash) -> None:
        assert self._spool is not None
        self._spool.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            block = self._spool.read(min(left, _COPY_BYTES))
            assert block, "the spool holds every byte that was appended"
            digest.update(block)
            shard.write(block)
            left -= len(block)

    def _close_spool(self) -> None:
        if self._spool is not None:
            spool, self._spool = self._spool, None
            spool.close()


def shard_name(number: int, count: int) -> str:
    """Name of shard ``number`` (from 1) of ``count``, as transformers and vLLM expect it."""
    return SINGLE_SHARD if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
