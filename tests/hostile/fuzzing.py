"""What every input must lead to: a typed error or a correct read, within a second, with little memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open

from ernieq.errors import ErnieqError
from tests.hostile.refusal import MOST_BYTES, MOST_SECONDS


def read_or_refuse(read: Callable[[], object], *kinds: type[ErnieqError]) -> bool:
    """Whether the read succeeded; any exception but the kinds, or too much time or memory, fails the test."""
    tracemalloc.start()
    started = time.process_time()
    try:
        read()
    except kinds as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 1000, message
        return False
    finally:
        elapsed, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert elapsed < MOST_SECONDS
        assert peak < MOST_BYTES
    return True


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def split_shard(raw: bytes) -> tuple[bytes, bytes]:
    """Header text and data of a shard."""
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end].rstrip(), raw[end:]


def join_shard(text: bytes, data: bytes) -> bytes:
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


def library_reads(path: Path, names: set[str]) -> None:
    """What we accept, the safetensors library accepts too, and finds the same tensors in it."""
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == names
