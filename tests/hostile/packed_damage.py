"""Doing damage to a packed checkpoint, and expecting its refusal at once, by name, with little memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.errors import FormatError
from ernieq.pack import file_sha256, verify_packed

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODULE = "model.layers.0.self_attn.q_proj"
MOST_SECONDS = 1.0
MOST_BYTES = 64_000_000


def refused(path: Path, match: str | None = None, kind: type[FormatError] = FormatError) -> str:
    """Verify, expect a refusal in one sentence, and bound its time and memory."""
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(kind, match=match) as caught:
        verify_packed(path)
    elapsed, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert elapsed < MOST_SECONDS
    assert peak < MOST_BYTES
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    message.encode("utf-8")
    return message


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a shard, keep its data, and make the manifest's hash agree."""
    raw = shard.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    write_shard(shard, text + b" " * (-(8 + len(text)) % 64), raw[end:])


def write_shard(shard: Path, text: bytes, data: bytes) -> None:
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    rehash(shard)


def rehash(shard: Path) -> None:
    edit_json(
        shard.parent / "ernieq.json",
        lambda manifest: manifest["shards"].update({shard.name: file_sha256(shard)}),
    )
