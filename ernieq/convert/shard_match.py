"""Compare a packed checkpoint with one that was made again: shards by hash, then tensors by their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ernieq.errors import FormatError
from ernieq.pack import PackedReader, file_sha256

SHOWN_TENSORS = 3
_CONFIG = "config.json"


@dataclass(frozen=True)
class FileMatch:
    """Whether a file came out the same.

    Args:
        name: of the file.
        same: whether its bytes are those of the packed checkpoint.
        tensors: of a shard that differs, how many tensors it holds.
        differing: how many of them have other bytes, another shape or no counterpart.
        first: names of the first of these.
    """

    name: str
    same: bool
    tensors: int = 0
    differing: int = 0
    first: tuple[str, ...] = ()


def match_packed(old: PackedReader, new: PackedReader) -> list[FileMatch]:
    """Every shard, then ``config.json``, then the copied files, by the hashes of both manifests."""
    before, after = old.manifest, new.manifest
    shards = sorted(set(before.shards) | set(after.shards))
    found = [
        FileMatch(name, True)
        if before.shards.get(name) == after.shards.get(name)
        else _differing(name, old, new)
        for name in shards
    ]
    found.append(FileMatch(_CONFIG, _sha256(old.path) == _sha256(new.path)))
    copied = sorted(set(before.files) | set(after.files))
    return found + [FileMatch(name, before.files.get(name) == after.files.get(name)) for name in copied]


def _differing(shard: str, old: PackedReader, new: PackedReader) -> FileMatch:
    """Look for the tensors of a shard in both checkpoints, wherever they lie in the new one."""
    owner = old if shard in old.shard_files() else new
    names = [entry.name for entry in owner.header_of(shard).entries]
    differing = [name for name in names if not _same_tensor(name, old, new)]
    return FileMatch(shard, False, len(names), len(differing), tuple(differing[:SHOWN_TENSORS]))


def _same_tensor(name: str, old: PackedReader, new: PackedReader) -> bool:
    try:
        first, second = old.tensor(name), new.tensor(name)
    except FormatError:  # only one of them has it
        return False
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return memoryview(first.data) == memoryview(second.data)


def _sha256(directory: Path) -> str:
    return file_sha256(directory / _CONFIG)
