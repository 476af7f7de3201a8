"""Every bad input is refused by both readers: the right error, by name, within a second, with little memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ernieq.checkpoint import open_checkpoint
from ernieq.errors import CheckpointError, ErnieqError, FormatError
from ernieq.pack import verify_packed
from tests.hostile.bad_files import case_ids, damage_of
from tests.hostile.refusal import refusal
from tests.pack.packed_factory import write_packed
from tests.tiny import write_tiny

# Bytes that may be allocated: sixteen megabytes of JSON are allowed, and become twelve times that in memory.
MOST_BYTES = 200_000_000


def packed_checkpoint(directory: Path, sharded: bool) -> Path:
    return write_packed(directory, shard_bytes=4000) if sharded else write_packed(directory)


def source_checkpoint(directory: Path, sharded: bool) -> Path:
    return write_tiny(directory, shards=3 if sharded else 1)


READERS: dict[str, tuple[Callable[[Path, bool], Path], Callable[[Path], object], type[ErnieqError]]] = {
    "packed": (packed_checkpoint, verify_packed, FormatError),
    "source": (source_checkpoint, lambda path: open_checkpoint(path).audit(), CheckpointError),
}


def contents(directory: Path) -> dict[str, str]:
    """What is in the regular files that are small enough to look at."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file() and path.stat().st_size < 2**26
    }


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("table", "case"), case_ids(), ids=lambda value: value)
def test_a_bad_input_is_refused(tmp_path: Path, reader: str, table: str, case: str) -> None:
    make, read, kind = READERS[reader]
    directory = make(tmp_path / "checkpoint", table == "index")
    read(directory)  # it was whole
    name, damage = damage_of(table, case)
    damage(directory)
    before = contents(directory)
    message = refusal(lambda: read(directory), kind, most_bytes=MOST_BYTES)
    assert name in message
    assert contents(directory) == before
